"""Compiled verification: what portable PyTorch computes, in every dtype, over every shape of chain and tree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from kvbuffer.ops import dispatch, portable
from kvbuffer.ops.buffered import buffered_verify
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, KDA, LINEAR_ATTENTION, RETNET, RWKV7, UpdateRule
from tests.support.operators import Pool, double, int32, make_tokens, rms_ratio

RULES = list(FAMILIES.values())
STATE_DTYPES = [torch.float32, torch.bfloat16, torch.int8]
RECORD_DTYPES = [torch.float32, torch.bfloat16]
# A corrected value that is rounded the other way is seen by all tokens after it.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2e-4}


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if dispatch.cpu_kernels() is None:
        pytest.skip(dispatch.explain())


def borders(lengths: list[int]) -> Tensor:
    return int32([0, *torch.tensor(lengths).cumsum(0).tolist()])


def copy(records: RecordPages) -> RecordPages:
    return RecordPages(*(pages.clone() for pages in records))


def random_parents(rng: Generator, lengths: list[int]) -> Tensor:
    return int32([int(torch.randint(-1, t, (), generator=rng)) for n in lengths for t in range(n)])


def filled_pool(
    rng: Generator, rule: UpdateRule, fills: list[int], room: int, dims: tuple[int, int, int, int], page: int, **dtypes
) -> Pool:
    """A pool whose request b has `fills[b]` records and room for `room` more; all else is poison."""
    pool = Pool(rule, len(fills), *dims, max(fills) + room, page, rng, **dtypes)
    lead = make_tokens(rng, rule, sum(fills), *dims)
    where = pool.states, pool.slots, pool.records, pool.page_table
    portable.buffered_verify(rule, lead, *where, pool.fill, borders(fills), None)
    pool.fill = int32(fills)
    return pool


def check_against_portable(
    pool: Pool, tokens: Tokens, slots: Tensor, lengths: list[int], parents: Tensor | None, bound: float
) -> None:
    """The same outputs and new records; nothing else is written."""
    records, states = copy(pool.records), StatePool(*(None if x is None else x.clone() for x in pool.states))
    rest = pool.page_table, pool.fill, borders(lengths), parents
    expected = portable.buffered_verify(pool.rule, tokens, states, slots, records, *rest)
    out = buffered_verify(pool.rule, tokens, pool.states, slots, pool.records, *rest)
    for b, n in enumerate(lengths):
        rows = slice(int(rest[2][b]), int(rest[2][b]) + n)
        assert n == 0 or rms_ratio(out[rows], expected[rows]) < bound
    assert torch.equal(pool.records.decays.nan_to_num(1), records.decays.nan_to_num(1))
    assert torch.equal(pool.records.keys.float().nan_to_num(99), records.keys.float().nan_to_num(99))
    assert torch.equal(pool.records.values.isnan(), records.values.isnan())
    assert rms_ratio(pool.records.values.nan_to_num(0), records.values.nan_to_num(0)) < 10 * bound
    for ours, before in zip(pool.states, states, strict=True):
        if ours is not None and before is not None:
            assert torch.equal(ours.float().nan_to_num(99), before.float().nan_to_num(99))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
@pytest.mark.parametrize("record_dtype", RECORD_DTYPES, ids=str)
def test_every_family_and_dtype(rng: Generator, rule: UpdateRule, state_dtype, record_dtype) -> None:
    """Ragged and empty requests at different fills across page borders, one without a state; a chain, then a tree."""
    dims, lengths = (2, 4, 20, 48), [5, 0, 1, 9]
    dtypes = {"state_dtype": state_dtype, "record_dtype": record_dtype}
    pool = filled_pool(rng, rule, [3, 7, 0, 6], 9, dims, 4, **dtypes)
    slots = pool.slots.clone()
    slots[3] = -1
    for parents in (None, random_parents(rng, lengths)):
        tokens = make_tokens(rng, rule, sum(lengths), *dims)
        check_against_portable(pool, tokens, slots, lengths, parents, BOUNDS[record_dtype])


@pytest.mark.parametrize("v", [32, 96, 128])
@pytest.mark.parametrize("length", [1, 5, 13, 40])
def test_int8_states_in_integers(rng: Generator, v: int, length: int) -> None:
    """Rows of whole words are multiplied as integers; what that rounds is far below what the state has lost."""
    dims = (1, 2, 40, v)
    pool = filled_pool(rng, GATED_DELTANET, [3, 0], length, dims, 4, state_dtype=torch.int8)
    tokens = make_tokens(rng, GATED_DELTANET, 2 * length, *dims)
    check_against_portable(pool, tokens, pool.slots, [length, length], None, 1e-4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(RULES),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 2), (2, 4)]),
    k=st.integers(1, 40),
    v=st.sampled_from([16, 32, 48, 144]),
    page=st.integers(1, 17),
    fills=st.lists(st.integers(0, 20), min_size=3, max_size=3),
    lengths=st.lists(st.integers(0, 40), min_size=3, max_size=3),
    tree=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(rule, heads, k, v, page, fills, lengths, tree, seed) -> None:
    rng = Generator().manual_seed(seed)
    dims = (*heads, k, v)
    pool = filled_pool(rng, rule, fills, max(lengths), dims, page)
    parents = random_parents(rng, lengths) if tree else None
    tokens = make_tokens(rng, rule, sum(lengths), *dims)
    check_against_portable(pool, tokens, pool.slots, lengths, parents, 1e-5)


@pytest.mark.parametrize("rule", [GATED_DELTANET, KDA, RWKV7], ids=lambda r: r.name)
@pytest.mark.parametrize("g", [0.0, -1e-6, -60.0, -1e4], ids=str)
def test_gates_of_any_strength(rng: Generator, rule: UpdateRule, g: float) -> None:
    """Nothing overflows, nothing is lost: also where every other token forgets all there was."""
    dims, m = (1, 2, 16, 32), 50
    pool = Pool(rule, 1, *dims, m, 16, rng)
    tokens = make_tokens(rng, rule, m, *dims)
    assert tokens.g is not None
    tokens.g[:] = g
    for mixed in (False, True):
        if mixed:
            tokens.g[::2] = -0.01
        expected, _ = recurrence(rule, double(tokens), pool.state(0))
        where = pool.states, pool.slots, pool.records, pool.page_table
        out = buffered_verify(rule, tokens, *where, pool.fill, int32([0, m]))
        assert rms_ratio(out, expected) < 2e-6


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_a_long_prompt_without_a_state(rng: Generator, rule: UpdateRule) -> None:
    """Hundreds of tokens in one call are the recurrence from nothing; cut in two calls, they are the same."""
    dims, m, cut = (1, 2, 16, 32), 300, 123
    pool = Pool(rule, 1, *dims, m, 16, rng)
    tokens, none = make_tokens(rng, rule, m, *dims), int32([-1])
    expected, _ = recurrence(rule, double(tokens), torch.zeros_like(pool.state(0)))
    where = pool.states, none, pool.records, pool.page_table
    whole = buffered_verify(rule, tokens, *where, int32([0]), int32([0, m]))
    head = buffered_verify(rule, tokens.rows(slice(cut)), *where, int32([0]), int32([0, cut]))
    tail = buffered_verify(rule, tokens.rows(slice(cut, m)), *where, int32([cut]), int32([0, m - cut]))
    assert rms_ratio(whole, expected) < 1e-5
    assert rms_ratio(torch.cat([head, tail]), expected) < 1e-5


def test_a_wide_tree(rng: Generator) -> None:
    """More branches than a chain's tokens would be worked on together: each is the first token after the buffer."""
    rule, dims, m = GATED_DELTANET, (1, 2, 16, 32), 100
    pool = filled_pool(rng, rule, [5], m, dims, 16)
    tokens = make_tokens(rng, rule, m, *dims)
    check_against_portable(pool, tokens, pool.slots, [m], torch.full((m,), -1, dtype=torch.int32), 2e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_one_token_is_a_decode_step(rng: Generator, rule: UpdateRule, state_dtype) -> None:
    dims = (2, 4, 32, 48)
    pool = filled_pool(rng, rule, [6, 0, 3], 1, dims, 4, state_dtype=state_dtype)
    tokens = make_tokens(rng, rule, 3, *dims)
    args = pool.states, pool.slots, pool.records, pool.page_table, pool.fill.clone()
    verified = buffered_verify(rule, tokens, *args, borders([1, 1, 1]))
    appended = copy(pool.records)
    assert rms_ratio(verified, pool.decode(tokens)) < 1e-6
    for ours, theirs in zip(appended, pool.records, strict=True):
        assert rms_ratio(ours.nan_to_num(0), theirs.nan_to_num(0)) < 1e-6


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_a_request_has_the_same_bits_alone_and_in_a_batch(rng: Generator, tree: bool) -> None:
    """Whatever the other requests are, and however many threads share the work."""
    rule, dims, lengths = GATED_DELTANET, (2, 4, 64, 64), [3, 40, 0, 8, 1]
    pool = filled_pool(rng, rule, [5, 2, 4, 0, 16], max(lengths), dims, 8)
    tokens, parents = make_tokens(rng, rule, sum(lengths), *dims), random_parents(rng, lengths)
    before, starts = copy(pool.records), borders(lengths)
    where = pool.states, pool.slots, pool.records, pool.page_table
    torch.set_num_threads(2)
    try:
        together = buffered_verify(rule, tokens, *where, pool.fill, starts, parents if tree else None)
    finally:
        torch.set_num_threads(1)
    alone = copy(before)
    for b, n in enumerate(lengths):
        rows = slice(int(starts[b]), int(starts[b]) + n)
        out = buffered_verify(
            rule, tokens.rows(rows), pool.states, pool.slots[b : b + 1], alone, pool.page_table[b : b + 1],
            pool.fill[b : b + 1], int32([0, n]), parents[rows] if tree else None,
        )  # fmt: skip
        assert torch.equal(out, together[rows])
    for ours, theirs in zip(alone, pool.records, strict=True):
        assert torch.equal(ours.nan_to_num(99), theirs.nan_to_num(99))


@pytest.mark.parametrize("rule", [RETNET, LINEAR_ATTENTION], ids=lambda r: r.name)
def test_strided_rows_and_expanded_decays(rng: Generator, rule: UpdateRule) -> None:
    """Queries, keys and values may be columns of one wide tensor, a decay the same memory for every token."""
    hk, hv, k, v = dims = (2, 4, 16, 32)
    pool = filled_pool(rng, rule, [3, 0], 6, dims, 4)
    wide = torch.randn(10, 2 * hk * k + hv * v, generator=rng)
    q, key, value = wide.split([hk * k, hk * k, hv * v], 1)
    g = (-torch.rand(1, hv, generator=rng)).expand(10, hv) if rule is RETNET else None
    tokens = Tokens(q.unflatten(1, (hk, k)), key.unflatten(1, (hk, k)), value.unflatten(1, (hv, v)), g)
    check_against_portable(pool, tokens, pool.slots, [6, 4], None, 2e-6)
