"""The Triton kernels, interpreted on the CPU, against the recurrence in float64: the same tests as of other backends,
on shapes that are no powers of two.

Interpreted, float32 is exact to its last places, but a conversion to bfloat16 truncates where a GPU rounds to nearest.
"""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import pytest
import torch
from torch import Generator, Tensor

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from kvbuffer.ops import dispatch
from kvbuffer.ops.buffered import buffered_verify, compact_records, fold_records, recurrent_decode
from kvbuffer.ops.chunked import chunked_prefill
from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, GLA, RETNET, RWKV7, UpdateRule
from kvbuffer.ops.triton import backend
from tests.support.operators import Pool, double, int32, make_tokens, rms_ratio, stack

RULES = list(FAMILIES.values())
HEADS = (1, 2)  # key heads, value heads
K, V = 20, 24


@pytest.fixture(autouse=True)
def _triton_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the public operators run the kernels on CPU tensors."""
    monkeypatch.setattr(dispatch, "_BACKENDS", {"cpu": (backend.__name__,)})


def one(tokens: Tokens, t: int) -> Tokens:
    return tokens.rows(slice(t, t + 1))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_decode_folds_as_it_goes(rng: Generator, rule: UpdateRule) -> None:
    """Across page borders, over two folds by the decode step and one by itself, and into other slots."""
    m, steps = 3, 8
    pool = Pool(rule, 1, *HEADS, K, V, m, 2, rng)
    x = make_tokens(rng, rule, steps, *HEADS, K, V)
    start = pool.state(0)
    expected, _ = recurrence(rule, double(x), start)
    for t in range(steps):
        assert rms_ratio(pool.decode(one(x, t))[0], expected[t]) < 1e-6
    before = pool.state(0)
    free = int32([i for i in range(3) if i != pool.slots[0]])
    where = pool.records, pool.page_table, pool.fill
    fold_records(rule, pool.states, pool.slots, *where, free[:1])
    fold_records(rule, pool.states, int32([-1]), *where, free[1:])
    assert torch.equal(pool.state(0), before)
    pool.fold()
    assert rms_ratio(pool.state(0), recurrence(rule, double(x), start)[1]) < 1e-6
    assert torch.equal(pool.states.data[free[0]].double(), pool.state(0))
    if rule.correction.value == "none":  # otherwise the records depend on the state
        folded = pool.state(0) - pool.states.data[free[1]]
        tail = double(x.rows(slice(6, 8)))
        assert rms_ratio(folded, recurrence(rule, tail, before)[1] - recurrence(rule, tail, before * 0)[1]) < 1e-6


def test_requests_at_different_fills_share_a_call_and_keep_their_bits(rng: Generator) -> None:
    rule, m, steps = GATED_DELTANET, 2, 5
    together, alone = (Pool(rule, 3, *HEADS, K, V, m, 16, rng) for _ in range(2))
    alone.states, alone.slots = StatePool(together.states.data.clone()), together.slots
    sequences = [make_tokens(rng, rule, steps, *HEADS, K, V) for _ in range(3)]
    for t in range(steps):
        rows = [b for b in range(3) if b <= t]
        steps_of = {b: one(sequences[b], t - b) for b in rows}
        for b, row in zip(rows, together.decode(stack(list(steps_of.values())), rows), strict=True):
            assert torch.equal(alone.decode(steps_of[b], [b])[0], row)


def test_a_buffer_of_one_token_is_the_recurrence_exactly(rng: Generator) -> None:
    for rule in (GATED_DELTANET, RWKV7):
        pool = Pool(rule, 1, *HEADS, K, V, 1, 16, rng)
        baseline = StatePool(pool.states.data.clone())
        x = make_tokens(rng, rule, 3, *HEADS, K, V)
        for t in range(3):
            assert torch.equal(pool.decode(one(x, t)), recurrent_decode(rule, one(x, t), baseline, pool.slots))
        pool.fold()
        assert torch.equal(pool.states.data[pool.slots.long()], baseline.data[pool.slots.long()])


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_verify_then_accept_a_prefix(rng: Generator, rule: UpdateRule) -> None:
    """Three requests, the last KV only, with some, no and more new tokens; a rejected token leaves no trace."""
    pool = Pool(rule, 3, *HEADS, K, V, 8, 2, rng)
    sequences = [make_tokens(rng, rule, 5, *HEADS, K, V) for _ in range(3)]
    starts = [pool.state(0), pool.state(1), pool.state(2) * 0]
    slots = torch.where(torch.arange(3) == 2, -1, pool.slots).int()
    before = pool.states.data.clone()
    position = [0, 0, 0]
    for lengths, accepted in (((2, 0, 3), (1, 0, 3)), ((2, 2, 2), (2, 2, 2))):
        parts = [x.rows(slice(p, p + n)) for x, p, n in zip(sequences, position, lengths, strict=True)]
        borders = [0, *itertools.accumulate(lengths)]
        out = buffered_verify(
            rule, stack(parts), pool.states, slots, pool.records, pool.page_table, pool.fill, int32(borders)
        )
        for b in range(3):
            expected = recurrence(rule, double(sequences[b]), starts[b])[0][position[b] : position[b] + lengths[b]]
            if lengths[b]:
                assert rms_ratio(out[borders[b] : borders[b + 1]], expected) < 1e-6
            position[b] += accepted[b]
        pool.fill += int32(list(accepted))
    torch.testing.assert_close(pool.states.data, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_every_path_of_a_tree_is_as_if_decoded_alone(rng: Generator, rule: UpdateRule) -> None:
    parents = [-1, -1, 0, 2, 1]
    paths = [[0], [1], [0, 2], [0, 2, 3], [1, 4]]
    pool = Pool(rule, 1, *HEADS, K, V, 8, 4, rng)
    start = pool.state(0)
    lead, after = make_tokens(rng, rule, 2, *HEADS, K, V), make_tokens(rng, rule, 1, *HEADS, K, V)
    drafts = make_tokens(rng, rule, 5, *HEADS, K, V)

    def verify(x: Tokens, parents: Tensor | None) -> Tensor:
        where = pool.records, pool.page_table, pool.fill, int32([0, x.v.shape[0]])
        return buffered_verify(rule, x, pool.states, pool.slots, *where, parents)

    verify(lead, None)
    pool.fill += 2
    out = verify(drafts, int32(parents))
    for t, path in enumerate(paths):
        expected, _ = recurrence(rule, double(stack([lead, *(one(drafts, j) for j in path)])), start)
        assert rms_ratio(out[t], expected[-1]) < 1e-6
    compact_records(pool.records, pool.page_table, pool.fill, int32(paths[3]), int32([0, 3]))
    pool.fill += 3
    expected, _ = recurrence(rule, double(stack([lead, *(one(drafts, j) for j in paths[3]), after])), start)
    assert rms_ratio(pool.decode(after)[0], expected[-1]) < 1e-6


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_recurrence(rng: Generator, rule: UpdateRule) -> None:
    """A prefill of ragged sequences, some fresh and one empty, then two tokens of decode."""
    lengths = [3, 0, 2]
    pool = Pool(rule, 3, *HEADS, K, V, 1, 16, rng)
    pool.states.data[pool.slots[2].long()] = float("nan")  # a fresh sequence must not read its slot
    starts = [pool.state(0), pool.state(1), torch.zeros(HEADS[1], K, V, dtype=torch.float64)]
    sequences = [make_tokens(rng, rule, n + 2, *HEADS, K, V) for n in lengths]
    prompts = stack([x.rows(slice(n)) for x, n in zip(sequences, lengths, strict=True)])
    fresh = torch.tensor([0, 0, 1], dtype=torch.uint8)
    borders = [0, *itertools.accumulate(lengths)]
    out = chunked_prefill(rule, prompts, pool.states, pool.slots, int32(borders), fresh)
    assert torch.equal(pool.state(1), starts[1])
    after = [
        recurrent_decode(
            rule, stack([one(x, n + t) for x, n in zip(sequences, lengths, strict=True)]), pool.states, pool.slots
        )
        for t in range(2)
    ]
    for b in range(3):
        expected, final = recurrence(rule, double(sequences[b]), starts[b])
        ours = torch.cat([out[borders[b] : borders[b + 1]], *(row[b : b + 1] for row in after)])
        assert rms_ratio(ours, expected) < 1e-6
        assert rms_ratio(pool.state(b), final) < 1e-6


@pytest.mark.parametrize("rule", [GATED_DELTANET, RWKV7], ids=lambda r: r.name)
@pytest.mark.parametrize(
    ("state_dtype", "record_dtype", "bound"),
    [
        (torch.float32, torch.bfloat16, 1e-2),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.int8, torch.bfloat16, 2e-2),
        (torch.int8, torch.float32, 1e-2),
    ],
    ids=str,
)
def test_low_precision(rng: Generator, rule: UpdateRule, state_dtype, record_dtype, bound) -> None:
    """Two folds and a verification; records and state are rounded, nothing else is."""
    m, steps = 2, 5
    pool = Pool(rule, 1, *HEADS, K, V, 4, 2, rng, state_dtype, record_dtype)
    x = make_tokens(rng, rule, steps + 2, *HEADS, K, V)
    expected, _ = recurrence(rule, double(x), pool.state(0))
    pool.m = m
    out = [pool.decode(one(x, t)) for t in range(steps)]
    where = pool.records, pool.page_table, pool.fill, int32([0, 2])
    out.append(buffered_verify(rule, x.rows(slice(steps, steps + 2)), pool.states, pool.slots, *where))
    assert rms_ratio(torch.cat(out), expected) < bound
    # The first tokens meet unrounded inputs only.
    assert rms_ratio(out[0][0], expected[0]) < 1e-6


def test_int8_rows_are_scaled_by_their_largest_element_and_rounded_to_even(rng: Generator) -> None:
    rule = GLA
    pool = Pool(rule, 1, 1, 1, K, V, 1, 16, rng, torch.int8)
    slot = int(pool.slots[0])
    pool.states.data[slot] = 0
    x = make_tokens(rng, rule, 1, 1, 1, K, V)
    row = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 63.49, 63.51] * 3)
    x = x._replace(v=row.view(1, 1, V), k=torch.ones(1, 1, K))
    x.k[..., 0] = 0.0
    pool.decode(x)
    pool.fold()
    assert pool.states.scales is not None
    assert pool.states.scales[slot, 0].tolist() == [0.0] + [1.0] * (K - 1)
    assert (pool.states.data[slot, 0, 0] == 0).all()
    assert pool.states.data[slot, 0, 1].tolist() == [127, 0, 2, 2, 0, -2, 63, 64] * 3


def test_several_value_blocks_and_a_buffer_of_several_blocks(rng: Generator) -> None:
    """K = 16 and V = 72 take two programs per head, the second masked; 19 records take three rounds."""
    rule, k, v, steps = GATED_DELTANET, 16, 72, 20
    pool = Pool(rule, 1, 1, 1, k, v, steps, 4, rng)
    x = make_tokens(rng, rule, steps, 1, 1, k, v)
    start = pool.state(0)
    expected, final = recurrence(rule, double(x), start)
    where = pool.records, pool.page_table, pool.fill, int32([0, steps - 1])
    out = buffered_verify(rule, x.rows(slice(steps - 1)), pool.states, pool.slots, *where)
    pool.fill += steps - 1
    assert rms_ratio(torch.cat([out, pool.decode(one(x, steps - 1))]), expected) < 1e-6
    pool.fold()
    assert rms_ratio(pool.state(0), final) < 1e-6


def test_rows_of_tokens_may_be_strided_and_a_constant_decay_expanded(rng: Generator) -> None:
    """q, k and v are parts of one fused row, and the decay is the same for all tokens; two heads of each kind."""
    hk, hv = 2, 4
    pool = Pool(RETNET, 1, hk, hv, K, V, 2, 16, rng)
    q, k, v = torch.randn(3, 2 * hk * K + hv * V, generator=rng).split([hk * K, hk * K, hv * V], 1)
    g = torch.rand(hv, generator=rng).neg().expand(3, -1)
    x = Tokens(q.unflatten(1, (hk, K)), k.unflatten(1, (hk, K)), v.unflatten(1, (hv, V)), g)
    assert x.q.stride(0) > hk * K
    assert g.stride(0) == 0
    expected, _ = recurrence(RETNET, double(x), pool.state(0))
    for t in range(3):
        assert rms_ratio(pool.decode(one(x, t))[0], expected[t]) < 1e-6


def test_folding_no_records_copies_a_state(rng: Generator) -> None:
    pool = Pool(GLA, 1, *HEADS, K, V, 2, 16, rng, torch.int8)
    before = pool.state(0)
    free = int32([i for i in range(3) if i != pool.slots[0]])[:1]
    for target in (free, None):
        fold_records(GLA, pool.states, pool.slots, pool.records, pool.page_table, pool.fill, target)
    assert torch.equal(pool.state(0), before)
    pool.slots = free
    assert rms_ratio(pool.state(0), before) < 1e-2  # rounded again, by rows that need not hold a 127


def test_supports_every_family_and_dtype() -> None:
    for rule, state, record in itertools.product(
        RULES, (torch.float32, torch.bfloat16, torch.int8), (torch.float32, torch.bfloat16, None)
    ):
        assert backend.supports(dispatch.Call("cuda", rule, 128, 256, state, record)) == (True, "")
    ok, reason = backend.supports(dispatch.Call("cuda", RETNET, 512, 128, torch.float32, None))
    assert not ok
    assert "512" in reason
