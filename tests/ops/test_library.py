"""The operators under torch.compile: registered as PyTorch's own checks want it, traced whole, not a bit changed.

The oracle is the same call without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kvbuffer.ops.buffered import buffered_decode, buffered_verify, compact_records, fold_records, recurrent_decode
from kvbuffer.ops.chunked import chunked_prefill
from kvbuffer.ops.layout import Tokens
from kvbuffer.ops.rule import GATED_DELTANET, KDA, LINEAR_ATTENTION, RWKV7, UpdateRule
from tests.support.operators import Pool, int32, make_tokens

OPERATORS = [
    "buffered_decode", "buffered_verify", "chunked_prefill", "compact_records", "fold_records", "recurrent_decode",
]  # fmt: skip
#: No optional inputs, scalar ones, vector ones, two pairs per token.
RULES = [LINEAR_ATTENTION, GATED_DELTANET, KDA, RWKV7]

#: Two requests' drafts: a chain cut short by a branch, and two tokens.
BORDERS, PARENTS = int32([0, 3, 5]), int32([-1, 0, 0, -1, 0])


def inputs(rng: Generator, rule: UpdateRule, state_dtype: torch.dtype = torch.float32) -> tuple[Pool, Tokens, Tokens]:
    """Two requests with three and five records, one token for each, and five drafts."""
    pool = Pool(rule, 2, 2, 4, 16, 16, 12, 4, rng, state_dtype)
    for x in (*pool.states, *pool.records):
        if x is not None:
            x.nan_to_num_(0.5)  # compared below, and NaN equals nothing
    pool.fill = int32([3, 5])
    return pool, make_tokens(rng, rule, 2, 2, 4, 16, 16), make_tokens(rng, rule, 5, 2, 4, 16, 16)


def flat_arguments(
    name: str, rng: Generator, rule: UpdateRule, state_dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """A call of one operator as the dispatcher takes it."""
    pool, tokens, drafts = inputs(rng, rule, state_dtype)
    flags = torch.tensor([0, 1], dtype=torch.uint8)
    buffers = [*pool.records, pool.page_table, pool.fill]
    return {
        "buffered_decode": (rule.name, *tokens, *pool.states, pool.slots, *buffers, flags),
        "buffered_verify": (rule.name, *drafts, *pool.states, pool.slots, *buffers, BORDERS, PARENTS),
        "chunked_prefill": (rule.name, *drafts, *pool.states, pool.slots, BORDERS, flags),
        "compact_records": (*buffers, int32([0, 2, 1]), int32([0, 2, 3])),
        "fold_records": (rule.name, *pool.states, pool.slots, *buffers, pool.slots.flip(0)),
        "recurrent_decode": (rule.name, *tokens, *pool.states, pool.slots),
    }[name]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(rng: Generator, name: str, rule: UpdateRule) -> None:
    """The schema says what is written, the fake implementation what comes out, and tracing changes neither."""
    torch.library.opcheck(getattr(torch.ops.kvbuffer, name).default, flat_arguments(name, rng, rule))


@pytest.mark.parametrize("name", ["buffered_decode", "chunked_prefill", "fold_records", "recurrent_decode"])
def test_opcheck_with_scales(rng: Generator, name: str) -> None:
    arguments = flat_arguments(name, rng, GATED_DELTANET, torch.int8)
    torch.library.opcheck(getattr(torch.ops.kvbuffer, name).default, arguments)


def serve(rule: UpdateRule, tokens: Tokens, drafts: Tokens, pool: Pool) -> list[Tensor]:
    """Every operator in one function, each going on from what those before it wrote; what came out and what is left."""
    states, slots, records, page_table = memory = pool.states, pool.slots, pool.records, pool.page_table
    flags, fill = torch.ones_like(slots, dtype=torch.uint8), torch.zeros_like(slots)
    outputs = [chunked_prefill(rule, drafts, states, slots, BORDERS, fresh=flags)]
    for fold in (flags - 1, flags - 1, flags):
        outputs.append(buffered_decode(rule, tokens, *memory, fill, fold))
        fill = torch.where(fold.bool(), 0, fill) + 1
    outputs.append(buffered_verify(rule, drafts, *memory, fill, BORDERS, parents=PARENTS))
    compact_records(records, page_table, fill, accepted=int32([0, 2, 1]), cu_accepted=int32([0, 2, 3]))
    fold_records(rule, *memory, count=fill + 1)
    outputs.append(recurrent_decode(rule, tokens, states, slots))
    return [x for x in (*outputs, *states, *records) if x is not None]


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_compiled_in_one_graph(backend: str, rng: Generator, rule: UpdateRule, state_dtype: torch.dtype) -> None:
    seed = rng.get_state()

    def run(function: Callable[..., list[Tensor]]) -> list[Tensor]:
        rng.set_state(seed)
        pool, *tokens = inputs(rng, rule, state_dtype)
        return function(rule, *tokens, pool)

    torch.compiler.reset()
    compiled = run(torch.compile(serve, fullgraph=True, backend="aot_eager"))
    for actual, expected in zip(compiled, run(serve), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_fake_tensors_compute_nothing(rng: Generator, name: str) -> None:
    """Shapes come out right although no kernel can run: a fake tensor has no memory."""
    arguments = flat_arguments(name, rng, GATED_DELTANET)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
        out = getattr(torch.ops.kvbuffer, name)(*fakes)
    if name in ("compact_records", "fold_records"):
        assert out is None
    else:
        assert out.shape == fakes[3].shape
        assert out.dtype == torch.float32


def test_a_family_is_looked_up_by_its_name(rng: Generator) -> None:
    _, *arguments = flat_arguments("recurrent_decode", rng, GATED_DELTANET)
    with pytest.raises(ValueError, match=r"hyperbolic.*gated_deltanet"):
        torch.ops.kvbuffer.recurrent_decode("hyperbolic", *arguments)


def test_other_callers_do_not_go_through_the_dispatcher(rng: Generator) -> None:
    pool, tokens, _ = inputs(rng, GATED_DELTANET)
    with torch.profiler.profile() as profile:
        recurrent_decode(GATED_DELTANET, tokens, pool.states, pool.slots)
        torch.ops.kvbuffer.recurrent_decode(GATED_DELTANET.name, *tokens, *pool.states, pool.slots)
    assert sum(event.name == "kvbuffer::recurrent_decode" for event in profile.events()) == 1
