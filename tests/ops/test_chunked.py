"""Chunked prefill against the recurrence in float64, and against implementations that we did not write."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Generator

from kvbuffer.ops.chunked import CHUNK, chunked_prefill
from kvbuffer.ops.layout import StatePool
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET
from tests.support.operators import Pool, double, int32, make_tokens, poison, rms_ratio

RULES = list(FAMILIES.values())
HEADS = [(2, 4), (3, 3)]  # key heads, value heads


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_ragged_sequences(backend: str, rng: Generator, rule, heads) -> None:
    lengths = [0, 1, 63, 64, 65, 200, 0]
    fresh = torch.tensor([1, 0, 1, 0, 1, 0, 0], dtype=torch.uint8)
    x = make_tokens(rng, rule, sum(lengths), *heads, 32, 48)
    pool = Pool(rule, len(lengths), *heads, 32, 48, 1, 16, rng)
    pool.states.data[pool.slots[fresh.bool()].long()] = float("nan")  # a fresh sequence must not read its slot
    starts = [pool.state(b) for b in range(len(lengths))]
    borders = [0, *itertools.accumulate(lengths)]
    out = chunked_prefill(rule, x, pool.states, pool.slots, int32(borders), fresh)
    for b, (begin, end) in enumerate(itertools.pairwise(borders)):
        state = torch.zeros_like(starts[b]) if fresh[b] else starts[b]
        if begin == end:
            assert torch.equal(pool.state(b), starts[b]) or fresh[b]
            continue
        expected, final = recurrence(rule, double(x.rows(slice(begin, end))), state)
        assert rms_ratio(out[begin:end], expected) < 1e-5
        assert rms_ratio(pool.state(b), final) < 1e-5


def test_splitting_a_prompt_at_chunk_borders_changes_no_bit(backend: str, rng: Generator) -> None:
    rule, length = GATED_DELTANET, 5 * CHUNK + 7
    x = make_tokens(rng, rule, length, 2, 4, 64, 64)
    slot = int32([0])

    def prefill(*borders: int) -> tuple[torch.Tensor, torch.Tensor]:
        states = StatePool.allocate(1, 4, 64, 64)
        poison(*states)
        out = [
            chunked_prefill(
                rule, x.rows(slice(begin, end)), states, slot, int32([0, end - begin]),
                torch.tensor([begin == 0], dtype=torch.uint8),
            )
            for begin, end in itertools.pairwise([0, *borders, length])
        ]  # fmt: skip
        return torch.cat(out), states.data

    whole, final = prefill()
    for split in (CHUNK, 2 * CHUNK, 5 * CHUNK):
        out, state = prefill(split)
        assert torch.equal(out, whole)
        assert torch.equal(state, final)


def test_against_transformers(backend: str, rng: Generator) -> None:
    """Third-party oracle: transformers' chunked and recurrent gated delta rules."""
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

    length, hk, hv, dim = 100, 2, 4, 64
    x = make_tokens(rng, GATED_DELTANET, length, hk, hv, dim, dim)
    states = StatePool.allocate(1, hv, dim, dim)
    fresh = torch.ones(1, dtype=torch.uint8)
    out = chunked_prefill(GATED_DELTANET, x, states, int32([0]), int32([0, length]), fresh)
    batched = [t.unsqueeze(0) for t in x[:5]]
    batched[0] = batched[0] * dim**0.5  # transformers applies the scale itself
    for theirs in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        expected, final = theirs(*batched, output_final_state=True)
        assert rms_ratio(out, expected[0]) < 1e-5
        assert rms_ratio(states.data[0], final[0]) < 1e-5
