"""Every form against implementations that we did not write: transformers' and flash-linear-attention's.

Theirs compute in float32 and run from the same initial state over the same inputs; ours are the recurrence in float64
and every operator. Where theirs want as many key heads as value heads, ours share keys and theirs get copies.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from kvbuffer.ops.layout import Tokens
from kvbuffer.ops.mamba2 import mamba2_skip, mamba2_tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import (
    DELTANET,
    GATED_DELTANET,
    GLA,
    KDA,
    LINEAR_ATTENTION,
    MAMBA2,
    RETNET,
    RWKV7,
    Correction,
    UpdateRule,
)
from tests.support.forms import FORMS
from tests.support.operators import Pool, double, make_tokens, rms_ratio

# Theirs want whole chunks of 64 in places.
LENGTH, KEY_HEADS, VALUE_HEADS, K, V = 128, 2, 4, 32, 48
BOUND = 1e-5


def ours(rng: Generator, rule: UpdateRule, tokens: Tokens, start: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs [T, HV, V] and final state [HV, K, V] of every form from the same start."""
    results = {"recurrence": recurrence(rule, double(tokens), start.double())}
    for name, form in FORMS.items():
        if name == "kv_only" and start.any():
            continue
        pool = Pool(rule, 1, tokens.k.shape[1], *start.shape, 12, 8, rng)
        pool.states.data[pool.slots.long()] = start
        (out,) = form(pool, [tokens])
        results[name] = out, pool.state(0)
    return results


def assert_equal_to_ours(
    rng: Generator, rule: UpdateRule, tokens: Tokens, start: Tensor, out: Tensor, final: Tensor | None
) -> None:
    for name, (our_out, our_final) in ours(rng, rule, tokens, start).items():
        assert rms_ratio(our_out, out) < BOUND, name
        assert final is None or rms_ratio(our_final, final) < BOUND, name


def random_case(rng: Generator, rule: UpdateRule) -> tuple[Tokens, Tensor]:
    tokens = make_tokens(rng, rule, LENGTH, KEY_HEADS, VALUE_HEADS, K, V)
    return tokens, torch.randn(VALUE_HEADS, K, V, generator=rng)


def arguments(rule: UpdateRule, x: Tokens) -> dict[str, Tensor]:
    """Tokens as the others name them: [1, T, HV, ...], queries before their scale, g under either of its names."""

    def shared(keys: Tensor) -> Tensor:
        return keys.repeat_interleave(x.v.shape[1] // keys.shape[1], 1).unsqueeze(0)

    named = {"q": shared(x.q) * x.q.shape[-1] ** 0.5, "k": shared(x.k), "v": x.v.unsqueeze(0)}
    if x.g is not None:
        named["g"] = named["gk"] = x.g.unsqueeze(0)
    if x.beta is not None:
        named["beta"] = x.beta.unsqueeze(0)
    if rule.correction is Correction.REMOVAL:
        assert x.removal_read is not None
        assert x.removal_write is not None
        named["alpha"], named["beta"] = shared(x.removal_read), -shared(x.removal_write)
    return named


def transformers_function(module: str, name: str) -> Callable[..., Any]:
    """Return transformers' own PyTorch, also where it would call kernels that happen to be installed."""
    models = pytest.importorskip(f"transformers.models.{module}")
    return inspect.unwrap(getattr(models, name))


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_gated_deltanet_of_transformers(backend: str, rng: Generator, form: str) -> None:
    theirs = transformers_function("qwen3_next.modeling_qwen3_next", f"torch_{form}_gated_delta_rule")
    x, start = random_case(rng, GATED_DELTANET)
    named = arguments(GATED_DELTANET, x)
    out, final = theirs(
        *(named[name] for name in ("q", "k", "v", "g", "beta")), initial_state=start[None], output_final_state=True
    )
    assert_equal_to_ours(rng, GATED_DELTANET, x, start, out[0], final[0])


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_kda_of_transformers(backend: str, rng: Generator, form: str) -> None:
    theirs = transformers_function("kimi_linear.modeling_kimi_linear", f"{form}_kimi_delta_attention")
    x, start = random_case(rng, KDA)
    named = arguments(KDA, x)
    out, final = theirs(
        *(named[name] for name in ("q", "k", "v", "g", "beta")), initial_state=start[None], output_final_state=True
    )
    assert_equal_to_ours(rng, KDA, x, start, out[0], final[0])


@pytest.mark.parametrize("form", ["chunk", "recurrent"])
def test_mamba2_of_transformers(backend: str, rng: Generator, form: str) -> None:
    """Groups, time steps and skip connection included; their state is the transpose of ours."""
    x, dt = torch.randn(LENGTH, VALUE_HEADS, V, generator=rng), torch.randn(LENGTH, VALUE_HEADS, generator=rng)
    b, c = torch.randn(2, LENGTH, KEY_HEADS, K, generator=rng)
    a_log, dt_bias, d = torch.randn(3, VALUE_HEADS, generator=rng)
    start = torch.randn(VALUE_HEADS, K, V, generator=rng)
    a = -a_log.exp()
    if form == "chunk":
        scan = transformers_function("mamba2.modeling_mamba2", "mamba2_chunk_scan")
        out, final = scan(
            x[None], dt[None], a, b[None], c[None], 32, D=d, dt_bias=dt_bias, initial_states=start.mT[None],
            dt_softplus=True, return_final_states=True,
        )  # fmt: skip
        out = out[0]
    else:
        update = transformers_function("mamba2.modeling_mamba2", "mamba2_selective_state_update")
        final = start.mT[None].clone()

        def wide(per_head: Tensor, *trailing: int) -> Tensor:
            return per_head.view(*per_head.shape, *[1] * len(trailing)).expand(*per_head.shape, *trailing)

        out = torch.cat([
            update(final, x[t, None], wide(dt[t, None], V), wide(a, V, K), b[t, None], c[t, None], wide(d, V),
                   dt_bias=wide(dt_bias, V), dt_softplus=True)
            for t in range(LENGTH)
        ])  # fmt: skip
    tokens = mamba2_tokens(x, dt, b, c, a_log, dt_bias)
    for name, (our_out, our_final) in ours(rng, MAMBA2, tokens, start).items():
        assert rms_ratio(mamba2_skip(our_out, x, d), out) < BOUND, name
        assert rms_ratio(our_final, final[0].mT) < BOUND, name


def test_lightning_attention_of_transformers(backend: str, rng: Generator) -> None:
    """MiniMax's layer between its projections: what it multiplies, and what it hands to its norm."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=32, num_attention_heads=VALUE_HEADS, head_dim=K, num_hidden_layers=4, block_size=48,
        layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    layer = MiniMaxLightningAttention(config, layer_idx=1)
    seen: dict[str, Tensor] = {}
    layer.qkv_proj.register_forward_hook(lambda module, inputs, output: seen.update(qkv=layer.act_fn(output)))
    layer.norm.register_forward_pre_hook(lambda module, inputs: seen.update(out=inputs[0]))
    with torch.no_grad():
        layer.qkv_proj.weight.copy_(torch.randn(layer.qkv_proj.weight.shape, generator=rng) / 4)
        _, final = layer(torch.randn(1, LENGTH, 32, generator=rng), (torch.empty(0), torch.empty(0)), None)
    q, k, v = seen["qkv"].view(LENGTH, VALUE_HEADS, 3 * K).split(K, -1)
    tokens = Tokens(q, k, v, -layer.slope_rate.flatten().expand(LENGTH, VALUE_HEADS).contiguous())
    out = seen["out"].view(LENGTH, VALUE_HEADS, K)
    assert_equal_to_ours(rng, RETNET, tokens, torch.zeros(VALUE_HEADS, K, K), out, final[0])


def flash_linear_attention(operator: str) -> ModuleType:
    """Load the naive reference of an operator by its file: importing its package would need Triton.

    It is not among the packages that tests install: where it is, transformers runs its Triton kernels, on CPUs too.
    ``pip install --no-deps --target DIR fla-core==0.6.0 einops`` and DIR on PYTHONPATH are enough for this file.
    """
    pytest.importorskip("einops")
    package = find_spec("fla")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("flash-linear-attention is not installed")
    path = Path(package.submodule_search_locations[0], "ops", operator, "naive.py")
    spec = spec_from_file_location(f"fla_naive_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


#: Family, its operator in flash-linear-attention, the function, whether that takes heads before tokens.
NAIVE = [
    (LINEAR_ATTENTION, "linear_attn", "naive_recurrent_linear_attn", False),
    (RETNET, "simple_gla", "naive_recurrent_simple_gla", False),
    (MAMBA2, "simple_gla", "naive_chunk_simple_gla", False),
    (GLA, "gla", "naive_recurrent_gla", False),
    (DELTANET, "delta_rule", "delta_rule_recurrence", True),
    (GATED_DELTANET, "gated_delta_rule", "naive_recurrent_gated_delta_rule", False),
    (GATED_DELTANET, "gated_delta_rule", "naive_chunk_gated_delta_rule", False),
    (KDA, "kda", "naive_recurrent_kda", False),
    (KDA, "kda", "naive_chunk_kda", False),
    (RWKV7, "generalized_delta_rule/dplr", "dplr_recurrence", True),
    (RWKV7, "generalized_delta_rule/dplr", "dplr_chunkwise", True),
]


@pytest.mark.parametrize(
    ("rule", "operator", "function", "heads_first"), NAIVE, ids=[f"{case[0].name}-{case[2]}" for case in NAIVE]
)
def test_naive_references_of_flash_linear_attention(
    backend: str, rng: Generator, rule: UpdateRule, operator: str, function: str, heads_first: bool
) -> None:
    theirs = getattr(flash_linear_attention(operator), function)
    x, start = random_case(rng, rule)
    accepted = inspect.signature(theirs).parameters
    named = {name: part for name, part in arguments(rule, x).items() if name in accepted}
    if heads_first:
        named = {name: part.transpose(1, 2) for name, part in named.items()}
    out, final = theirs(**named, initial_state=start[None].clone(), output_final_state=True)
    out = out.transpose(1, 2) if heads_first else out
    assert_equal_to_ours(rng, rule, x, start, out[0], final[0])


def test_retention_of_flash_linear_attention(backend: str, rng: Generator) -> None:
    """RetNet's own decays, a constant per head."""
    theirs = flash_linear_attention("retention").naive_retention
    x, start = random_case(rng, RETNET)
    x = x._replace(g=(1 - 2.0 ** (-5 - torch.arange(VALUE_HEADS))).log().expand(LENGTH, VALUE_HEADS).contiguous())
    out = theirs(*(arguments(RETNET, x)[name].transpose(1, 2) for name in "qkv"))
    assert_equal_to_ours(rng, RETNET, x, torch.zeros_like(start), out[0].transpose(0, 1), None)
