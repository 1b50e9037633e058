"""Buffered decode and verify, fold, compaction and the recurrent baseline, each against the recurrence in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from kvbuffer.ops import dispatch
from kvbuffer.ops.buffered import buffered_verify, compact_records, fold_records, recurrent_decode
from kvbuffer.ops.layout import StatePool
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, RWKV7, UpdateRule
from tests.support.operators import Pool, double, int32, make_tokens, rms_ratio, stack

RULES = list(FAMILIES.values())
HEADS = [(2, 4), (3, 3)]  # key heads, value heads
# Dtypes of states and records, and the largest error of the outputs that they may cause.
TIERS = [
    (torch.float32, torch.float32, 5e-6),
    (torch.float32, torch.bfloat16, 4e-3),
    (torch.bfloat16, torch.float32, 6e-3),
    (torch.bfloat16, torch.bfloat16, 6e-3),
    (torch.int8, torch.float32, 1.5e-2),
    (torch.int8, torch.bfloat16, 1.5e-2),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("m", "page"), [(1, 16), (4, 16), (19, 8)])
def test_buffered_decode_is_the_recurrence(backend: str, rng: Generator, rule, heads, m, page) -> None:
    requests, steps, k, v = 3, 2 * m + 5, 32, 48
    pool = Pool(rule, requests, *heads, k, v, m, page, rng)
    sequences = [make_tokens(rng, rule, steps, *heads, k, v) for _ in range(requests)]
    expected = [recurrence(rule, double(x), pool.state(b))[0] for b, x in enumerate(sequences)]
    for t in range(steps):
        out = pool.decode(stack([x.rows(slice(t, t + 1)) for x in sequences]))
        for b in range(requests):
            assert rms_ratio(out[b], expected[b][t]) < 5e-6


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize(("state_dtype", "record_dtype", "bound"), TIERS, ids=str)
def test_precision_tiers(backend: str, rng: Generator, rule, state_dtype, record_dtype, bound) -> None:
    """Rounded states and records cost what their dtypes cost, and no more: a fold every 8 tokens, over 5 folds."""
    steps, m, k, v = 45, 8, 32, 48
    pool = Pool(rule, 2, 2, 4, k, v, m, 8, rng, state_dtype, record_dtype)
    sequences = [make_tokens(rng, rule, steps, 2, 4, k, v) for _ in range(2)]
    expected = [recurrence(rule, double(x), pool.state(b))[0] for b, x in enumerate(sequences)]
    out = torch.stack([pool.decode(stack([x.rows(slice(t, t + 1)) for x in sequences])) for t in range(steps)], 1)
    for b in range(2):
        assert rms_ratio(out[b], expected[b]) < bound


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_decode_without_a_state(backend: str, rng: Generator, rule: UpdateRule) -> None:
    """KV only: the whole past is records; requests with a state may share the call, and no slot is written."""
    steps = 12
    pool = Pool(rule, 2, 2, 4, 32, 48, steps, 4, rng)
    sequences = [make_tokens(rng, rule, steps, 2, 4, 32, 48) for _ in range(2)]
    starts = [pool.state(0) * 0, pool.state(1)]
    expected = [recurrence(rule, double(x), starts[b])[0] for b, x in enumerate(sequences)]
    pool.slots[0] = -1
    before = pool.states.data.clone()
    for t in range(steps):
        out = pool.decode(stack([x.rows(slice(t, t + 1)) for x in sequences]))
        for b in range(2):
            assert rms_ratio(out[b], expected[b][t]) < 5e-6
    torch.testing.assert_close(pool.states.data, before, rtol=0, atol=0, equal_nan=True)


def test_requests_at_different_fills_share_a_call(backend: str, rng: Generator) -> None:
    """Request b joins b steps late, so every call mixes fills and folds; the rows that sit out are not touched."""
    rule, m, steps = GATED_DELTANET, 4, 20
    pool = Pool(rule, 5, 2, 4, 32, 32, m, 4, rng)
    sequences = [make_tokens(rng, rule, steps, 2, 4, 32, 32) for _ in range(5)]
    expected = [recurrence(rule, double(x), pool.state(b))[0] for b, x in enumerate(sequences)]
    for t in range(steps):
        rows = [b for b in range(5) if b <= t]
        step = stack([sequences[b].rows(slice(t - b, t - b + 1)) for b in rows])
        for b, row in zip(rows, pool.decode(step, rows), strict=True):
            assert rms_ratio(row, expected[b][t - b]) < 5e-6


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "kv-only"])
def test_verify_then_accept_any_prefix(backend: str, rng: Generator, rule: UpdateRule, with_state: bool) -> None:
    """Drafts are verified across page borders, part of them is accepted, and what follows never knows."""
    hk, hv, k, v, steps, drafts = 2, 4, 32, 48, 60, 5
    pool = Pool(rule, 3, hk, hv, k, v, steps + drafts, 4, rng)
    sequences = [make_tokens(rng, rule, steps + drafts, hk, hv, k, v) for _ in range(3)]
    starts = [pool.state(b) * with_state for b in range(3)]
    expected = [recurrence(rule, double(x), starts[b])[0] for b, x in enumerate(sequences)]
    slots = pool.slots if with_state else torch.full((3,), -1, dtype=torch.int32)
    before = pool.states.data.clone()
    position = [0, 0, 0]
    for step in range(12):
        lengths = [(step + b) % (drafts + 1) for b in range(3)]  # ragged, and empty at times
        wrong = [make_tokens(rng, rule, drafts, hk, hv, k, v) for _ in range(3)]
        accepted = [min(n, (step * 3 + b) % 4) for b, n in enumerate(lengths)]
        parts = []
        for b in range(3):
            right = sequences[b].rows(slice(position[b], position[b] + accepted[b]))
            parts.append(stack([right, wrong[b].rows(slice(accepted[b], lengths[b]))]))
        borders = int32([0, *torch.tensor(lengths).cumsum(0).tolist()])
        out = buffered_verify(rule, stack(parts), pool.states, slots, pool.records, pool.page_table, pool.fill, borders)
        for b in range(3):
            if accepted[b]:
                ours = out[borders[b] : borders[b] + accepted[b]]
                assert rms_ratio(ours, expected[b][position[b] : position[b] + accepted[b]]) < 1e-5
            position[b] += accepted[b]
            pool.fill[b] += accepted[b]
    torch.testing.assert_close(pool.states.data, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_every_path_of_a_tree_is_as_if_decoded_alone(backend: str, rng: Generator, rule: UpdateRule) -> None:
    hk, hv, k, v = 2, 4, 32, 48
    parents = [-1, -1, 0, 0, 1, 3, 3, 6]
    paths: list[list[int]] = []
    for t, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), t])
    for leaf in range(len(parents)):
        pool = Pool(rule, 2, hk, hv, k, v, 24, 4, rng)
        lead = make_tokens(rng, rule, 7, hk, hv, k, v)
        starts = [pool.state(b) for b in range(2)]
        for t in range(7):
            pool.decode(stack([lead.rows(slice(t, t + 1))] * 2))
        drafts, after = (make_tokens(rng, rule, n, hk, hv, k, v) for n in (len(parents), 2))
        out = buffered_verify(
            rule, stack([drafts, drafts]), pool.states, pool.slots, pool.records, pool.page_table, pool.fill,
            int32([0, 8, 16]), int32(parents * 2),
        )  # fmt: skip
        path = paths[leaf]
        compact_records(pool.records, pool.page_table, pool.fill, int32(path * 2), int32([0, len(path), 2 * len(path)]))
        pool.fill += len(path)
        later = [pool.decode(stack([after.rows(slice(t, t + 1))] * 2)) for t in range(2)]
        for b in range(2):
            taken = [drafts.rows(slice(t, t + 1)) for t in path]
            expected, _ = recurrence(rule, double(stack([lead, *taken, after])), starts[b])
            assert rms_ratio(out[8 * b + leaf], expected[7 + len(path) - 1]) < 1e-5
            for t in range(2):
                assert rms_ratio(later[t][b], expected[t - 2]) < 1e-5


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_buffer_of_one_token_is_the_recurrence_exactly(
    rng: Generator, rule: UpdateRule, state_dtype: torch.dtype
) -> None:
    """The anchor: the same bits as the recurrent kernel, in every state dtype."""
    if dispatch.cpu_kernels() is None:
        pytest.skip(dispatch.explain())
    steps = 20
    pool = Pool(rule, 2, 2, 4, 64, 128, 1, 16, rng, state_dtype)
    baseline = StatePool(*(None if x is None else x.clone() for x in pool.states))
    x = make_tokens(rng, rule, 2 * steps, 2, 4, 64, 128)
    for t in range(steps):
        step = x.rows(slice(2 * t, 2 * t + 2))
        assert torch.equal(pool.decode(step), recurrent_decode(rule, step, baseline, pool.slots))
    pool.fold()
    for ours, theirs in zip(pool.states, baseline, strict=True):
        if ours is not None:
            assert torch.equal(ours[pool.slots.long()], theirs[pool.slots.long()])


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_recurrent_decode(backend: str, rng: Generator, rule: UpdateRule) -> None:
    pool = Pool(rule, 3, 2, 4, 32, 48, 1, 16, rng)
    sequences = [make_tokens(rng, rule, 40, 2, 4, 32, 48) for _ in range(3)]
    expected = [recurrence(rule, double(x), pool.state(b)) for b, x in enumerate(sequences)]
    for t in range(40):
        step = stack([x.rows(slice(t, t + 1)) for x in sequences])
        out = recurrent_decode(rule, step, pool.states, pool.slots)
        for b in range(3):
            assert rms_ratio(out[b], expected[b][0][t]) < 5e-6
    for b in range(3):
        assert rms_ratio(pool.state(b), expected[b][1]) < 5e-6


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
def test_the_state_at_any_buffered_token(backend: str, rng: Generator, rule: UpdateRule) -> None:
    """Folded in place, into another slot, or from no state at all; other slots keep what they held."""
    for count in (0, 1, 7, 16):
        pool = Pool(rule, 1, 2, 4, 32, 48, 16, 8, rng)
        x = make_tokens(rng, rule, 16, 2, 4, 32, 48)
        start = pool.state(0)
        for t in range(16):
            pool.decode(x.rows(slice(t, t + 1)))
        where = pool.records, pool.page_table, int32([count])
        free = int32([i for i in range(3) if i != pool.slots[0]])
        fold_records(rule, pool.states, pool.slots, *where, free[:1])
        fold_records(rule, pool.states, int32([-1]), *where, free[1:])
        assert torch.equal(pool.state(0), start)
        fold_records(rule, pool.states, pool.slots, *where)
        prefix = double(x.rows(slice(count)))
        expected = recurrence(rule, prefix, start)[1]
        assert rms_ratio(pool.state(0), expected) < 5e-6
        assert rms_ratio(pool.states.data[free[0]], expected) < 5e-6
        if rule.num_pairs == 1 and rule.correction.value == "none":  # otherwise the records depend on the state
            assert rms_ratio(pool.states.data[free[1]], recurrence(rule, prefix, start * 0)[1]) < 5e-6


@pytest.mark.parametrize("rule", [GATED_DELTANET, RWKV7], ids=lambda r: r.name)
def test_a_request_decodes_to_the_same_bits_alone_and_in_a_batch(backend: str, rng: Generator, rule) -> None:
    steps = 24
    pool = Pool(rule, 6, 2, 4, 64, 64, 8, 16, rng)
    alone = Pool(rule, 6, 2, 4, 64, 64, 8, 16, rng)
    alone.states, alone.slots = StatePool(pool.states.data.clone()), pool.slots
    x = make_tokens(rng, rule, 6 * steps, 2, 4, 64, 64)
    for t in range(steps):
        together = pool.decode(x.rows(slice(6 * t, 6 * t + 6)))
        for b in range(6):
            row = 6 * t + b
            assert torch.equal(alone.decode(x.rows(slice(row, row + 1)), [b])[0], together[b])
