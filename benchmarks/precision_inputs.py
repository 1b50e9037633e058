"""The tokens that precision.py decodes: synthetic ones per family, and those of the demo model reading a text.

Synthetic heads remember from 4096 down to 3 tokens (the time in which the decay alone takes a state to 1/e), each gate
varying from token to token. Queries, keys and values pass through SiLU as they do behind the short convolutions of the
models, so that keys overlap instead of being nearly orthogonal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize, silu

from kvbuffer.ops.layout import Tokens
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, RETNET, Correction, Decay, UpdateRule

_RWKV7_MAX_RATE = 0.606531  # its decay is exp(-e^-0.5 sigmoid(...))
_DEMO_TOKENS = 6000


@dataclass
class Source:
    """A stream of tokens of one sequence.

    Attributes:
        rule: the family.
        heads: labels of the value heads, slow to fast.
        take: gives the next tokens.
        max_tokens: how many there are.
    """

    rule: UpdateRule
    heads: list[str]
    take: Callable[[int], Tokens]
    max_tokens: int


def synthetic(rule: UpdateRule, seed: int, heads: int, dim: int) -> Source:
    rng = Generator().manual_seed(seed)
    memory = 2 ** torch.linspace(12, 1.5, heads)  # tokens, slow to fast
    labels = [f"{tokens:.0f} tokens" for tokens in memory.tolist()]
    return Source(rule, labels, lambda count: _random_tokens(rule, count, memory, dim, rng), 10**9)


def _random_tokens(rule: UpdateRule, count: int, memory: Tensor, dim: int, rng: Generator) -> Tokens:
    def randn(*shape: int) -> Tensor:
        return torch.randn(count, len(memory), *shape, generator=rng)

    q, k = (normalize(silu(randn(dim)), dim=-1) for _ in range(2))
    v, g, beta, read, write = silu(randn(dim)), None, None, None, None
    if rule == RETNET:
        g = (-1 / memory).expand(count, -1).contiguous()
    elif rule.decay is not Decay.NONE:
        vector = rule.decay is Decay.VECTOR
        step = torch.exp(0.5 * randn(dim) if vector else 0.5 * randn())  # its median is 1
        g = -step / (memory.unsqueeze(-1) if vector else memory)
        if rule.correction is Correction.NONE and not vector:
            v = v * step.unsqueeze(-1)  # Mamba-2's step size scales both
    if rule.correction is Correction.DELTA:
        beta = torch.sigmoid(randn())
    if rule.correction is Correction.REMOVAL:
        assert g is not None
        rate = torch.sigmoid(randn(dim))
        g, read, write, k = g.clamp_min(-_RWKV7_MAX_RATE), k, k * rate, k * rate
    return Tokens(q * dim**-0.5, k, v, g, beta, read, write)


def demo_model() -> Source:
    """The demo model's linear-attention layers on pages of Python's documentation, all heads as one layer."""
    from kvbuffer import LLM, SamplingParams
    from kvbuffer.models import layers

    calls: list[Tokens] = []
    prefill = layers.chunked_prefill

    def recording(rule: UpdateRule, tokens: Tokens, *where: Tensor) -> Tensor:
        calls.append(Tokens(*(None if x is None else x.clone() for x in tokens)))
        return prefill(rule, tokens, *where)

    layers.chunked_prefill = recording
    try:
        llm = LLM("demo", dtype="float32", max_num_seqs=1, show_progress=False)
        num_layers = llm.engine.model_config.layer_types.count("linear_attention")
        text = llm.engine.tokenizer.encode("\n\n".join(topics.values())[: 4 * _DEMO_TOKENS])
        llm.generate([text[:_DEMO_TOKENS]], SamplingParams(max_tokens=1))
    finally:
        layers.chunked_prefill = prefill
    per_layer = [_join(calls[layer::num_layers], 0) for layer in range(num_layers)]
    tokens = _join(per_layer, 1)
    assert tokens.g is not None
    rates = -tokens.g.mean(0)
    # Value heads are sorted by memory, which needs a key head for each.
    repeats = tokens.v.shape[1] // tokens.k.shape[1]
    order = rates.argsort()
    q, k = (x.repeat_interleave(repeats, 1)[:, order].contiguous() for x in (tokens.q, tokens.k))
    v, g, beta = (x[:, order].contiguous() for x in (tokens.v, tokens.g, tokens.beta) if x is not None)
    tokens, position = Tokens(q, k, v, g, beta), 0

    def take(count: int) -> Tokens:
        nonlocal position
        position += count
        return tokens.rows(slice(position - count, position))

    return Source(GATED_DELTANET, [f"{1 / rate:.3g} tokens" for rate in rates[order].tolist()], take, _DEMO_TOKENS)


def _join(parts: list[Tokens], dim: int) -> Tokens:
    return Tokens(*(None if xs[0] is None else torch.cat(xs, dim) for xs in zip(*parts, strict=True)))


DEMO_MODEL = "demo_model"


def source(name: str, seed: int, heads: int, dim: int) -> Source:
    """Return the stream of a family, or of the demo model, which has one text, and heads of its own."""
    return demo_model() if name == DEMO_MODEL else synthetic(FAMILIES[name], seed, heads, dim)
