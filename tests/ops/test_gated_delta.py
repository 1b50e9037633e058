"""Chunked prefill, buffered decode, fold and the recurrent baseline, each against the recurrence in float64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Generator, Tensor

from kvbuffer.ops import dispatch
from kvbuffer.ops.buffered import RecordPages, buffered_decode, fold_records, recurrent_decode
from kvbuffer.ops.chunked import CHUNK, chunked_prefill
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import DELTANET, GATED_DELTANET, GLA, KDA, LINEAR_ATTENTION, MAMBA2, Decay, UpdateRule

RULES = [LINEAR_ATTENTION, MAMBA2, GLA, DELTANET, GATED_DELTANET, KDA]
HEADS = [(2, 4), (3, 3)]  # key heads, value heads


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None

    def rows(self, index: slice | list[int]) -> Inputs:
        return Inputs(*(None if x is None else x[index].contiguous() for x in self))

    def double(self) -> Inputs:
        return Inputs(*(None if x is None else x.double() for x in self))


def make_inputs(rng: Generator, rule: UpdateRule, tokens: int, hk: int, hv: int, k: int, v: int) -> Inputs:
    """Unit-length keys, writing strengths over [0, 1] with both ends, decays from none to almost total."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    keys = torch.nn.functional.normalize(randn(tokens, hk, k), dim=-1)
    queries = torch.nn.functional.normalize(randn(tokens, hk, k), dim=-1) * k**-0.5
    shape = (tokens, hv) if rule.decay is Decay.SCALAR else (tokens, hv, k)
    g = -torch.exp(randn(*shape) * 2 - 3)
    g[torch.rand(shape, generator=rng) < 0.02] = -60.0
    beta = torch.sigmoid(randn(tokens, hv) * 2)
    beta[torch.rand(tokens, hv, generator=rng) < 0.05] = 0.0
    beta[torch.rand(tokens, hv, generator=rng) < 0.05] = 1.0
    return Inputs(
        queries,
        keys,
        randn(tokens, hv, v),
        None if rule.decay is Decay.NONE else g,
        beta if rule.delta else None,
    )


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    assert not actual.isnan().any()
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp_min(1e-30))


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


class Pool:
    """States and record pages of a few requests, poisoned wherever nothing was written."""

    def __init__(
        self,
        rule: UpdateRule,
        requests: int,
        hk: int,
        hv: int,
        k: int,
        v: int,
        m: int,
        page: int,
        rng: Generator,
    ):
        per_request = -(-m // page)
        self.rule, self.m = rule, m
        self.states = poisoned(requests + 2, hv, k, v)
        self.slots = torch.randperm(requests + 2, generator=rng)[:requests].int()
        self.states[self.slots.long()] = torch.randn(requests, hv, k, v, generator=rng)
        pages = torch.randperm(requests * per_request + 3, generator=rng)[: requests * per_request]
        self.page_table = pages.view(requests, per_request).int()
        self.records = RecordPages.allocate(rule, requests * per_request + 3, page, hk, hv, k, v)
        for pool in self.records:
            pool.fill_(float("nan"))
        self.fill = torch.zeros(requests, dtype=torch.int32)

    def start(self, b: int) -> Tensor:
        return self.states[self.slots[b]].clone()

    def decode(self, x: Inputs, rows: list[int] | None = None) -> Tensor:
        rows = list(range(len(self.slots))) if rows is None else rows
        fold = (self.fill[rows] == self.m).to(torch.uint8)
        out = buffered_decode(
            self.rule, *x, self.states, self.slots[rows], self.records, self.page_table[rows], self.fill[rows], fold
        )  # fmt: skip
        self.fill[rows] = torch.where(fold.bool(), 0, self.fill[rows]) + 1
        return out

    def fold(self) -> None:
        fold_records(self.rule, self.states, self.slots, self.records, self.page_table, self.fill)
        self.fill.zero_()


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("m", "page"), [(1, 16), (4, 16), (19, 8)])
def test_buffered_decode_is_the_recurrence(backend: str, rng: Generator, rule, heads, m, page) -> None:
    requests, steps, k, v = 3, 2 * m + 5, 32, 48
    pool = Pool(rule, requests, *heads, k, v, m, page, rng)
    sequences = [make_inputs(rng, rule, steps, *heads, k, v) for _ in range(requests)]
    expected = [recurrence(rule, *x.double(), pool.start(b).double())[0] for b, x in enumerate(sequences)]
    for t in range(steps):
        step = Inputs(
            *(None if xs[0] is None else torch.stack([x[t] for x in xs]) for xs in zip(*sequences, strict=True))
        )
        out = pool.decode(step)
        for b in range(requests):
            assert rms_ratio(out[b], expected[b][t]) < 5e-6


def test_requests_at_different_fills_share_a_call(backend: str, rng: Generator) -> None:
    """Request b joins b steps late, so every call mixes fills and folds; the rows that sit out are not touched."""
    rule, m, steps = GATED_DELTANET, 4, 20
    pool = Pool(rule, 5, 2, 4, 32, 32, m, 4, rng)
    sequences = [make_inputs(rng, rule, steps, 2, 4, 32, 32) for _ in range(5)]
    expected = [recurrence(rule, *x.double(), pool.start(b).double())[0] for b, x in enumerate(sequences)]
    for t in range(steps):
        rows = [b for b in range(5) if b <= t]
        step = Inputs(*(torch.stack([sequences[b][i][t - b] for b in rows]) for i in range(5)))
        for b, row in zip(rows, pool.decode(step, rows), strict=True):
            assert rms_ratio(row, expected[b][t - b]) < 5e-6


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_buffer_of_one_token_is_the_recurrence_exactly(rng: Generator, state_dtype: torch.dtype) -> None:
    """The anchor: the same bits as the recurrent kernel, in both state dtypes."""
    if dispatch.cpu_kernels() is None:
        pytest.skip(dispatch.explain())
    rule, steps = GATED_DELTANET, 50
    pool = Pool(rule, 2, 2, 4, 64, 128, 1, 16, rng)
    pool.states = pool.states.to(state_dtype)
    baseline = pool.states.clone()
    x = make_inputs(rng, rule, 2 * steps, 2, 4, 64, 128)
    for t in range(steps):
        step = x.rows(slice(2 * t, 2 * t + 2))
        assert torch.equal(pool.decode(step), recurrent_decode(rule, *step, baseline, pool.slots))
    pool.fold()
    assert torch.equal(pool.states[pool.slots.long()], baseline[pool.slots.long()])


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_recurrent_decode(backend: str, rng: Generator, rule: UpdateRule) -> None:
    pool = Pool(rule, 3, 2, 4, 32, 48, 1, 16, rng)
    sequences = [make_inputs(rng, rule, 40, 2, 4, 32, 48) for _ in range(3)]
    expected = [recurrence(rule, *x.double(), pool.start(b).double()) for b, x in enumerate(sequences)]
    for t in range(40):
        step = Inputs(
            *(None if xs[0] is None else torch.stack([x[t] for x in xs]) for xs in zip(*sequences, strict=True))
        )
        out = recurrent_decode(rule, *step, pool.states, pool.slots)
        for b in range(3):
            assert rms_ratio(out[b], expected[b][0][t]) < 5e-6
    for b in range(3):
        assert rms_ratio(pool.states[pool.slots[b]], expected[b][1]) < 5e-6


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_fold_at_any_fill(backend: str, rng: Generator, rule: UpdateRule) -> None:
    for fill in (0, 1, 7, 16):
        pool = Pool(rule, 2, 2, 4, 32, 48, 16, 8, rng)
        x = make_inputs(rng, rule, fill, 2, 4, 32, 48)
        expected = [recurrence(rule, *x.double(), pool.start(b).double())[1] for b in range(2)]
        for t in range(fill):
            pool.decode(x.rows([t, t]))
        pool.fold()
        for b in range(2):
            assert rms_ratio(pool.states[pool.slots[b]], expected[b]) < 5e-6


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_chunked_prefill_over_ragged_sequences(backend: str, rng: Generator, rule, heads) -> None:
    lengths = [0, 1, 63, 64, 65, 200, 0]
    fresh = torch.tensor([1, 0, 1, 0, 1, 0, 0], dtype=torch.uint8)
    x = make_inputs(rng, rule, sum(lengths), *heads, 32, 48)
    pool = Pool(rule, len(lengths), *heads, 32, 48, 1, 16, rng)
    pool.states[pool.slots[fresh.bool()].long()] = float("nan")  # a fresh sequence must not read its slot
    starts = [pool.start(b) for b in range(len(lengths))]
    borders = [0, *itertools.accumulate(lengths)]
    out = chunked_prefill(rule, *x, pool.states, pool.slots, int32(borders), fresh)
    for b, (begin, end) in enumerate(itertools.pairwise(borders)):
        state = torch.zeros_like(starts[b]) if fresh[b] else starts[b]
        if begin == end:
            assert torch.equal(pool.states[pool.slots[b]], starts[b]) or fresh[b]
            continue
        expected, final = recurrence(rule, *x.rows(slice(begin, end)).double(), state.double())
        assert rms_ratio(out[begin:end], expected) < 1e-5
        assert rms_ratio(pool.states[pool.slots[b]], final) < 1e-5


def test_splitting_a_prompt_at_chunk_borders_changes_no_bit(backend: str, rng: Generator) -> None:
    rule, length = GATED_DELTANET, 5 * CHUNK + 7
    x = make_inputs(rng, rule, length, 2, 4, 64, 64)
    whole = poisoned(1, 4, 64, 64)
    slot = int32([0])
    expected = chunked_prefill(rule, *x, whole, slot, int32([0, length]), torch.ones(1, dtype=torch.uint8))
    for split in (CHUNK, 2 * CHUNK, 5 * CHUNK):
        state = poisoned(1, 4, 64, 64)
        for begin, end, fresh in ((0, split, 1), (split, length, 0)):
            part = x.rows(slice(begin, end))
            flags = torch.tensor([fresh], dtype=torch.uint8)
            out = chunked_prefill(rule, *part, state, slot, int32([0, end - begin]), flags)
            assert torch.equal(out, expected[begin:end])
        assert torch.equal(state, whole)


def test_a_request_decodes_to_the_same_bits_alone_and_in_a_batch(backend: str, rng: Generator) -> None:
    rule, steps = GATED_DELTANET, 24
    pool = Pool(rule, 6, 2, 4, 64, 64, 8, 16, rng)
    alone = Pool(rule, 6, 2, 4, 64, 64, 8, 16, rng)
    alone.states, alone.slots = pool.states.clone(), pool.slots
    x = make_inputs(rng, rule, 6 * steps, 2, 4, 64, 64)
    for t in range(steps):
        together = pool.decode(x.rows(slice(6 * t, 6 * t + 6)))
        for b in range(6):
            assert torch.equal(alone.decode(x.rows([6 * t + b]), [b])[0], together[b])


def test_long_rollouts_do_not_drift(rng: Generator) -> None:
    """Deferred, exact folds: after thousands of tokens the error is no larger than the recurrence's own."""
    if dispatch.cpu_kernels() is None:
        pytest.skip(dispatch.explain())
    rule, steps = GATED_DELTANET, 4000
    pool = Pool(rule, 1, 1, 2, 64, 64, 16, 16, rng)
    x = make_inputs(rng, rule, steps, 1, 2, 64, 64)
    x = x._replace(g=-torch.exp(torch.randn(steps, 2, generator=rng) - 7))  # slow decay: errors would live long
    state, baseline = pool.start(0).double(), pool.states.clone()
    expected, _ = recurrence(rule, *x.double(), state)
    rows = [x.rows([t]) for t in range(steps)]
    buffered = torch.cat([pool.decode(row) for row in rows])
    recurrent = torch.cat([recurrent_decode(rule, *row, baseline, pool.slots) for row in rows])
    assert rms_ratio(buffered[-500:], expected[-500:]) < 1.2 * rms_ratio(recurrent[-500:], expected[-500:]) + 1e-7


def test_against_transformers(backend: str, rng: Generator) -> None:
    """Third-party oracle: transformers' chunked and recurrent gated delta rules."""
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

    length, hk, hv, dim = 100, 2, 4, 64
    x = make_inputs(rng, GATED_DELTANET, length, hk, hv, dim, dim)
    states = poisoned(1, hv, dim, dim)
    fresh = torch.ones(1, dtype=torch.uint8)
    out = chunked_prefill(GATED_DELTANET, *x, states, int32([0]), int32([0, length]), fresh)
    batched = [t.unsqueeze(0) for t in x.rows(slice(None))]
    batched[0] = batched[0] * dim**0.5  # transformers applies the scale itself
    for theirs in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        expected, final = theirs(*batched, output_final_state=True)
        assert rms_ratio(out, expected[0]) < 1e-5
        assert rms_ratio(states[0], final[0]) < 1e-5
