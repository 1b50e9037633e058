"""The compiled verification in every dtype tier: as portable PyTorch has it, whatever else is in the batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from kvbuffer.ops import dispatch, portable
from kvbuffer.ops.buffered import buffered_verify
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, UpdateRule
from tests.support.operators import Pool, int32, make_tokens, rms_ratio, stack

pytestmark = pytest.mark.skipif(dispatch.cpu_kernels() is None, reason="no compiled kernels")

RULES = list(FAMILIES.values())
TIERS = list(itertools.product((torch.float32, torch.bfloat16, torch.int8), (torch.float32, torch.bfloat16)))


def copied(pool: Pool) -> tuple[StatePool, RecordPages]:
    data, scales = pool.states
    return StatePool(data.clone(), None if scales is None else scales.clone()), RecordPages(
        *(x.clone() for x in pool.records)
    )


def both(pool: Pool, tokens: Tokens, slots: Tensor, borders: Tensor, parents: Tensor | None) -> tuple[Any, Any]:
    """Outputs and record pages of the kernels and of portable PyTorch, from the same start."""
    results = []
    for verify in (buffered_verify, portable.buffered_verify):
        states, records = copied(pool)
        out = verify(pool.rule, tokens, states, slots, records, pool.page_table, pool.fill, borders, parents)
        torch.testing.assert_close(states.data, pool.states.data, rtol=0, atol=0, equal_nan=True)
        results.append((out, records))
    return results[0], results[1]


def assert_same_records(ours: RecordPages, theirs: RecordPages, tolerance: float) -> None:
    """The same places are written, with the same numbers up to rounding."""
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert rms_ratio(a.float().nan_to_num(), b.float().nan_to_num()) < tolerance


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize(("state_dtype", "record_dtype"), TIERS, ids=str)
def test_every_tier(rng: Generator, rule: UpdateRule, state_dtype: torch.dtype, record_dtype: torch.dtype) -> None:
    """Ragged chains, one of them empty and one without a state, on buffers at different fills."""
    requests, steps = 5, 11
    pool = Pool(rule, requests, 2, 4, 24, 32, 48, 4, rng, state_dtype, record_dtype)
    for _ in range(steps):
        pool.decode(make_tokens(rng, rule, requests, 2, 4, 24, 32))
    pool.fill = int32([11, 0, 7, 3, 9])
    slots = pool.slots.clone()
    slots[3] = -1
    tokens = make_tokens(rng, rule, 14, 2, 4, 24, 32)
    (out, records), (expected, expected_records) = both(pool, tokens, slots, int32([0, 1, 4, 4, 9, 14]), None)
    # A value that lies on a rounding border of bfloat16 records may go either way.
    tolerance = 5e-6 if record_dtype == torch.float32 else 2e-3
    assert rms_ratio(out, expected) < tolerance
    assert_same_records(records, expected_records, tolerance)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rule=st.sampled_from(RULES), seed=st.integers(0, 1 << 20))
def test_trees_of_any_shape(data: st.DataObject, rule: UpdateRule, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=3))
    parents = [data.draw(st.integers(-1, t - 1)) for n in lengths for t in range(n)]
    pool = Pool(rule, len(lengths), 1, 3, 20, 16, 20, 3, rng)
    pool.fill = int32(data.draw(st.lists(st.integers(0, 6), min_size=len(lengths), max_size=len(lengths))))
    for records in pool.records:  # any records do: those of some other history
        records.copy_(torch.randn(records.shape, generator=rng) * 0.1)
    pool.records.decays.neg_().clamp_max_(0.0)
    tokens = make_tokens(rng, rule, len(parents), 1, 3, 20, 16)
    borders = int32([0, *itertools.accumulate(lengths)])
    (out, records), (expected, expected_records) = both(pool, tokens, pool.slots, borders, int32(parents))
    if parents:
        assert rms_ratio(out, expected) < 5e-6
    assert_same_records(records, expected_records, 5e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_prompt_of_many_blocks_without_a_state(rng: Generator, rule: UpdateRule) -> None:
    """Blocks of a long chain meet one another as records; total decay and none are among the gates."""
    length = 150
    pool = Pool(rule, 1, 2, 2, 32, 32, length, 16, rng)
    tokens = make_tokens(rng, rule, length, 2, 2, 32, 32)
    if tokens.g is not None:
        tokens.g[40], tokens.g[41] = 0.0, -60.0
    (out, records), (expected, expected_records) = both(pool, tokens, int32([-1]), int32([0, length]), None)
    assert rms_ratio(out, expected) < 1e-5
    assert_same_records(records, expected_records, 1e-5)


@pytest.mark.parametrize("parents", [None, [-1, 0, 0, 1, -1]], ids=["chain", "tree"])
def test_a_request_has_the_same_bits_alone_and_in_a_batch(rng: Generator, parents: list[int] | None) -> None:
    rule, requests, m = GATED_DELTANET, 4, 5
    pool = Pool(rule, requests, 2, 4, 64, 64, 16, 4, rng)
    for _ in range(6):
        pool.decode(make_tokens(rng, rule, requests, 2, 4, 64, 64))
    parts = [make_tokens(rng, rule, m, 2, 4, 64, 64) for _ in range(requests)]
    tree = None if parents is None else int32(parents)
    batch = None if parents is None else int32(parents * requests)
    borders = int32([m * b for b in range(requests + 1)])
    fixed = pool.page_table, pool.fill
    together = buffered_verify(rule, stack(parts), pool.states, pool.slots, pool.records, *fixed, borders, batch)
    for b in range(requests):
        own = slice(b, b + 1)
        alone = buffered_verify(
            rule, parts[b], pool.states, pool.slots[own], pool.records, *(x[own] for x in fixed), int32([0, m]), tree
        )
        assert torch.equal(alone, together[m * b : m * b + m])


def test_one_token_is_a_decode(rng: Generator) -> None:
    for rule in RULES:
        pool = Pool(rule, 3, 2, 4, 32, 48, 8, 4, rng)
        for _ in range(3):
            pool.decode(make_tokens(rng, rule, 3, 2, 4, 32, 48))
        token = make_tokens(rng, rule, 3, 2, 4, 32, 48)
        verified = buffered_verify(
            rule, token, pool.states, pool.slots, pool.records, pool.page_table, pool.fill, int32([0, 1, 2, 3])
        )
        assert rms_ratio(verified, pool.decode(token)) < 1e-6
