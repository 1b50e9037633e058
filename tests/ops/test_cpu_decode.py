"""Compiled decode, fold and recurrence: every dtype is rounded as portable PyTorch rounds it, any layout is read."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from kvbuffer.ops import dispatch, portable
from kvbuffer.ops.buffered import fold_records, recurrent_decode
from kvbuffer.ops.cpu import backend as kernels
from kvbuffer.ops.layout import RecordPages, StatePool
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, LINEAR_ATTENTION, RETNET, UpdateRule
from tests.support.operators import Pool, double, int32, make_tokens, rms_ratio, stack

RULES = list(FAMILIES.values())
STATE_DTYPES = [torch.float32, torch.bfloat16, torch.int8]
RECORD_DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if dispatch.cpu_kernels() is None:
        pytest.skip(dispatch.explain())


def state_copy(states: StatePool) -> StatePool:
    return StatePool(*(None if x is None else x.clone() for x in states))


def assert_same_rounding(ours: Tensor, theirs: Tensor) -> None:
    """Stored numbers are those of portable PyTorch, but for a few that lay between two and fell the other way."""
    assert (ours != theirs).float().mean() < 0.005
    # One step: 1, or the last bit of eight.
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-7, atol=1e-4 if ours.is_floating_point() else 1)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("record_dtype", RECORD_DTYPES, ids=str)
def test_every_step_is_portable_pytorchs(rng: Generator, rule: UpdateRule, state_dtype, record_dtype) -> None:
    """Each step starts from the same stored bits on both sides: what a step stores is rounded alike."""
    steps, m = 9, 4
    pool = Pool(rule, 3, 2, 4, 32, 48, m, 2, rng, state_dtype, record_dtype)
    rows = pool.slots.long()
    for _ in range(steps):
        x = make_tokens(rng, rule, 3, 2, 4, 32, 48)
        fold = (pool.fill == m).to(torch.uint8)
        states, records = state_copy(pool.states), RecordPages(*(pages.clone() for pages in pool.records))
        args = pool.page_table, pool.fill.clone(), fold
        expected = portable.buffered_decode(rule, x, states, pool.slots, records, *args)
        # A state that was just rounded, the other way here and there, answers a little differently.
        bound = 2e-6 if state_dtype == torch.float32 or not fold.any() else 5e-4
        assert rms_ratio(pool.decode(x), expected) < bound
        for b, n in enumerate(pool.fill.tolist()):
            place = int(pool.page_table[b, (n - 1) // 2]), slice(None), (n - 1) % 2
            for ours, theirs in zip(pool.records, records, strict=True):
                assert rms_ratio(ours[place], theirs[place]) < (bound if record_dtype == torch.float32 else 1e-3)
        if fold.any():
            if state_dtype == torch.float32:
                assert rms_ratio(pool.states.data[rows], states.data[rows]) < 1e-6
            else:
                assert_same_rounding(pool.states.data[rows], states.data[rows])
            if states.scales is not None and pool.states.scales is not None:
                torch.testing.assert_close(pool.states.scales[rows], states.scales[rows], rtol=1e-5, atol=0)


def test_an_int8_row_of_zeros_and_rows_of_every_size(rng: Generator) -> None:
    """A row's scale follows its largest element, which is stored as 127, from nothing up to huge."""
    rule, k, v = LINEAR_ATTENTION, 24, 32
    pool = Pool(rule, 1, 1, 1, k, v, 1, 1, rng, torch.int8)
    x = make_tokens(rng, rule, 1, 1, 1, k, v)
    sizes = torch.logspace(-30, 30, k)
    sizes[0] = 0
    x = x._replace(k=sizes.view(1, 1, k))
    for pages, value in zip(pool.records, (x.k, x.v, torch.zeros(1, 1, 1)), strict=True):
        pages[int(pool.page_table[0, 0]), :, 0] = value[0]
    fold_records(rule, pool.states, int32([-1]), pool.records, pool.page_table, int32([1]), pool.slots)
    slot = int(pool.slots[0])
    assert pool.states.scales is not None
    data, scales = pool.states.data[slot, 0], pool.states.scales[slot, 0]
    assert scales[0] == 0
    assert not data[0].any()
    assert torch.equal(data[1:].abs().amax(-1), torch.full((k - 1,), 127, dtype=torch.int8))
    torch.testing.assert_close(scales, sizes * x.v.abs().max() / 127, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("heads", [(1, 4), (4, 4)], ids=str)
@pytest.mark.parametrize(("k", "v"), [(1, 16), (20, 80), (100, 192)])
def test_any_key_dim(rng: Generator, rule: UpdateRule, heads: tuple[int, int], k: int, v: int) -> None:
    pool = Pool(rule, 2, *heads, k, v, 3, 2, rng)
    sequences = [make_tokens(rng, rule, 8, *heads, k, v) for _ in range(2)]
    expected = [recurrence(rule, double(x), pool.state(b)) for b, x in enumerate(sequences)]
    for t in range(8):
        out = pool.decode(stack([x.rows(slice(t, t + 1)) for x in sequences]))
        for b in range(2):
            assert rms_ratio(out[b], expected[b][0][t]) < 5e-6
    pool.fold()
    for b in range(2):
        assert rms_ratio(pool.state(b), expected[b][1]) < 5e-6


def test_a_value_dim_that_is_no_multiple_of_the_vector_width_runs_portably(rng: Generator) -> None:
    call = dispatch.Call("cpu", GATED_DELTANET, 32, 20, torch.float32, torch.float32)
    width = dispatch.cpu_kernels().kvb_vector_width()  # type: ignore[union-attr]
    if 20 % width == 0:
        pytest.skip("20 is a multiple of this machine's vector width")
    assert kernels.supports(call) == (False, f"value dim 20 is no multiple of {width}")
    pool = Pool(GATED_DELTANET, 1, 2, 4, 32, 20, 2, 2, rng)
    x = make_tokens(rng, GATED_DELTANET, 5, 2, 4, 32, 20)
    expected, _ = recurrence(GATED_DELTANET, double(x), pool.state(0))
    out = torch.cat([pool.decode(x.rows(slice(t, t + 1))) for t in range(5)])
    assert rms_ratio(out, expected) < 5e-6


def test_dtypes_without_a_kernel_are_named() -> None:
    call = dispatch.Call("cpu", GATED_DELTANET, 32, 64, torch.float16, torch.float32)
    assert kernels.supports(call) == (False, "no kernel for torch.float16 states with torch.float32 records")


def test_strided_rows_and_an_expanded_decay(rng: Generator) -> None:
    """q, k and v are often slices of one projection's output, RetNet's decay one row for all tokens."""
    hk, hv, k, v, requests = 2, 4, 32, 48, 3
    x = make_tokens(rng, RETNET, requests, hk, hv, k, v)
    assert x.g is not None
    x = x._replace(g=x.g[:1].expand(requests, hv))
    joined = torch.cat([x.q.flatten(1), x.k.flatten(1), x.v.flatten(1)], 1)
    q, keys, values = joined.split([hk * k, hk * k, hv * v], 1)
    strided = x._replace(q=q.unflatten(1, (hk, k)), k=keys.unflatten(1, (hk, k)), v=values.unflatten(1, (hv, v)))
    plain = x._replace(g=x.g.contiguous())
    pool = Pool(RETNET, requests, hk, hv, k, v, 2, 2, rng)
    other = Pool(RETNET, requests, hk, hv, k, v, 2, 2, rng)
    other.states, other.slots = state_copy(pool.states), pool.slots
    for _ in range(3):
        assert torch.equal(pool.decode(strided), other.decode(plain))
    ours = recurrent_decode(RETNET, strided, pool.states, pool.slots)
    assert torch.equal(ours, recurrent_decode(RETNET, plain, other.states, pool.slots))


@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_folding_into_another_slot(rng: Generator, state_dtype: torch.dtype) -> None:
    """A fork has the bits of a fold in place and leaves its source alone; without records it is a copy."""
    rule = GATED_DELTANET
    pool = Pool(rule, 3, 2, 4, 32, 48, 8, 4, rng, state_dtype)
    for _ in range(5):
        pool.decode(make_tokens(rng, rule, 3, 2, 4, 32, 48))
    free = [slot for slot in range(5) if slot not in pool.slots.tolist()]
    before = state_copy(pool.states)
    where = pool.records, pool.page_table[:2], int32([5, 0])
    fold_records(rule, pool.states, pool.slots[:2], *where, int32(free))
    for ours, source in zip(pool.states, before, strict=True):
        if ours is not None and source is not None:
            assert torch.equal(ours[pool.slots.long()], source[pool.slots.long()])
            assert torch.equal(ours[free[1]], source[pool.slots[1]])
    fold_records(rule, pool.states, pool.slots[:2], *where)
    for ours in pool.states:
        if ours is not None:
            assert torch.equal(ours[free[0]], ours[pool.slots[0]])
    fold_records(rule, pool.states, int32([-1]), pool.records, pool.page_table[:1], int32([0]), int32(free[:1]))
    for ours in pool.states:
        if ours is not None:
            assert not ours[free[0]].any()
