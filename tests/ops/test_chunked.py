"""Chunked prefill against the recurrence in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Generator

from kvbuffer.ops.chunked import CHUNK, chunked_prefill
from kvbuffer.ops.layout import StatePool
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, Decay, UpdateRule
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


@pytest.mark.parametrize("rule", [r for r in RULES if r.decay is not Decay.NONE], ids=lambda r: r.name)
def test_decays_of_any_strength(backend: str, rng: Generator, rule: UpdateRule) -> None:
    """Neighbouring tokens and channels that keep all, lose a little, or lose everything, over two chunks and a half."""
    x = make_tokens(rng, rule, 160, *HEADS[0], 32, 48)
    assert x.g is not None
    strengths = torch.tensor([0.0, -1e-6, -0.1, -3.0, -60.0, -1e4])
    x = x._replace(g=strengths[torch.randint(len(strengths), x.g.shape, generator=rng)])
    pool = Pool(rule, 1, *HEADS[0], 32, 48, 1, 16, rng)
    expected, final = recurrence(rule, double(x), pool.state(0))
    out = chunked_prefill(rule, x, pool.states, pool.slots, int32([0, 160]), torch.zeros(1, dtype=torch.uint8))
    assert rms_ratio(out, expected) < 1e-5
    assert rms_ratio(pool.state(0), final) < 1e-5


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_splitting_a_prompt_at_chunk_borders_changes_no_bit(backend: str, rng: Generator, rule: UpdateRule) -> None:
    length = 5 * CHUNK + 7
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
