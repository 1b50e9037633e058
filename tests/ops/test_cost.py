"""The cost model on machines with made-up numbers, where the right choice can be computed by hand."""

from __future__ import annotations

from dataclasses import fields, replace
from math import inf, sqrt

import pytest
import torch

from kvbuffer.ops.cost import (
    BUFFER_LENGTHS,
    KV_ONLY,
    RECURRENT,
    Bandwidth,
    Costs,
    Form,
    FormKind,
    LayerShape,
    choose,
    step_seconds,
    step_traffic,
)
from kvbuffer.ops.layout import RecordPages, StatePool
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, KDA, LINEAR_ATTENTION, UpdateRule

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
#: Moves a byte per second either way and computes for nothing: seconds are bytes.
BYTES = Costs(Bandwidth(read=1.0, write=1.0))
LONG = 10**6


def square(d: int, state: torch.dtype = F32, record: torch.dtype = BF16, hk: int = 8, hv: int = 8) -> LayerShape:
    """A family without decays, so that records are keys and values alone."""
    return LayerShape(LINEAR_ATTENTION, hk, hv, d, d, state, record)


def buffered(m: int) -> Form:
    return Form(FormKind.BUFFERED, m)


@pytest.mark.parametrize("rule", FAMILIES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (INT8, BF16)])
def test_bytes_are_those_of_the_pools(rule: UpdateRule, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    shape = LayerShape(rule, 2, 6, 16, 32, *dtypes)
    states = StatePool.allocate(1, 6, 16, 32, dtypes[0])
    assert shape.state_bytes == sum(pool.nbytes for pool in states if pool is not None)
    records = RecordPages.allocate(rule, 1, 1, 2, 6, 16, 32, dtypes[1])
    assert shape.record_bytes == sum(pool.nbytes for pool in records)


def test_a_cycle_reads_one_to_m_records_and_writes_the_state_once() -> None:
    shape, m = square(64), 5
    state, record = shape.state_bytes, shape.record_bytes
    steps = [(state + n * record, record) for n in range(1, m)] + [(state + m * record, state + record)]
    read, written = (sum(column) / m for column in zip(*steps, strict=True))
    assert step_traffic(buffered(m), shape) == pytest.approx((read, written))


def test_a_buffer_of_one_token_moves_the_state_as_the_recurrence_does() -> None:
    shape = square(64)
    read, written = step_traffic(buffered(1), shape)
    assert (read - shape.record_bytes, written - shape.record_bytes) == step_traffic(RECURRENT, shape)


@pytest.mark.parametrize("d", [32, 64, 128, 256])
@pytest.mark.parametrize(("state", "factor"), [(F32, 2.0), (BF16, 1.0)])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_the_best_length_is_near_the_root_of_the_dim(d: int, state: torch.dtype, factor: float, group: int) -> None:
    """Square heads with bfloat16 records: sqrt(2 d) under a float32 state, sqrt(d) under a bfloat16 one.

    Value heads that share a key shift it up: their records are the smaller by the keys.
    """
    lengths = range(1, 129)
    shape = square(d, state, hk=8 // group)
    best = choose(shape, 1, LONG, BYTES, buffer_lengths=lengths).buffer_len
    assert best == pytest.approx(sqrt(factor * d * 2 * group / (group + 1)), abs=1)


def test_the_lengths_to_choose_from_lose_under_one_percent() -> None:
    for d in (16, 32, 64, 128, 256):
        for state in (F32, BF16, INT8):
            shape = square(d, state)
            some, every = (
                step_seconds(choose(shape, 1, LONG, BYTES, buffer_lengths=lengths), shape, 1, LONG, BYTES)
                for lengths in (BUFFER_LENGTHS, range(1, 200))
            )
            assert some < 1.01 * every


def test_writes_that_cost_nothing_make_the_recurrence_best() -> None:
    free_writes = Costs(Bandwidth(read=1.0, write=inf))
    assert choose(square(128), 8, LONG, free_writes) == RECURRENT


def test_cheaper_writes_make_shorter_buffers() -> None:
    shape = square(128)
    lengths = [
        choose(shape, 1, LONG, Costs(Bandwidth(1.0, write)), buffer_lengths=range(1, 200)).buffer_len
        for write in (0.25, 1.0, 4.0, 16.0)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1] > 1


@pytest.mark.parametrize("cost", ["record", "fold_record"])
def test_arithmetic_on_records_makes_no_buffer_longer(cost: str) -> None:
    shape = square(128)
    lengths = []
    for price in (0.0, 1.0, 10.0, 100.0):
        costs = replace(BYTES, **{cost: price * (1.0 if cost == "record" else 0.01)})
        lengths.append(choose(shape, 1, LONG, costs).buffer_len)
    assert lengths == sorted(lengths, reverse=True)


def test_a_request_lives_on_its_records_while_they_are_less_than_a_state() -> None:
    """KV only ends where reading the context costs what state, buffer and folds do."""
    shape = square(128)
    contexts = range(1, 200)
    chosen = [choose(shape, 4, context, BYTES) for context in contexts]
    assert chosen[0] == KV_ONLY
    assert chosen[-1].kind is FormKind.BUFFERED
    ends = chosen.index(chosen[-1])
    assert set(chosen[:ends]) == {KV_ONLY}
    with_state = step_traffic(chosen[-1], shape).total
    assert ends == pytest.approx(with_state / shape.record_bytes - 1, abs=1)


def test_a_request_with_a_state_has_no_records_to_live_on() -> None:
    assert choose(square(128), 1, 1, BYTES, has_state=True) != KV_ONLY


def test_calls_that_cost_more_than_the_bytes_decide_small_batches() -> None:
    """What buffering saves grows with the batch, what its call costs does not."""
    shape = square(128)
    costs = replace(BYTES, buffered_call=3.0 * shape.state_bytes)
    forms = [choose(shape, batch, LONG, costs).kind for batch in (1, 2, 4, 16, 64)]
    assert forms[0] is FormKind.RECURRENT
    assert forms[-1] is FormKind.BUFFERED
    assert forms == sorted(forms, key=lambda kind: kind is FormKind.BUFFERED)


@pytest.mark.parametrize("form", [RECURRENT, KV_ONLY, buffered(1), buffered(16)], ids=str)
def test_time_grows_with_batch_and_context_and_every_cost(form: Form) -> None:
    shape = LayerShape(KDA, 4, 8, 64, 128, BF16, BF16)
    costs = Costs(Bandwidth(2.0, 3.0), *(0.5,) * 9)
    seconds = step_seconds(form, shape, 4, 32, costs)
    assert step_seconds(form, shape, 5, 32, costs) > seconds
    assert step_seconds(form, shape, 4, 33, costs) >= seconds
    assert step_seconds(form, shape, 4, 32, replace(costs, bandwidth=Bandwidth(1.0, 3.0))) > seconds
    assert step_seconds(form, shape, 4, 32, replace(costs, bandwidth=Bandwidth(2.0, 1.0))) > seconds
    for name in (field.name for field in fields(costs) if field.name != "bandwidth"):
        assert step_seconds(form, shape, 4, 32, replace(costs, **{name: 1.0})) >= seconds


def test_arithmetic_is_counted_per_step_of_the_cycle() -> None:
    shape, m = LayerShape(GATED_DELTANET, 1, 2, 16, 32), 4
    free = Bandwidth(inf, inf)
    elements, record = 2 * 16 * 32, 2 * (16 + 32)

    def seconds(form: Form, **costs: float) -> float:
        return step_seconds(form, shape, 3, 10, Costs(free, **costs)) / 3

    assert seconds(RECURRENT, recurrent=1.0) == elements
    assert seconds(KV_ONLY, kv_only=1.0) == 2
    assert seconds(KV_ONLY, kv_only_record=1.0) == 10 * record
    assert seconds(KV_ONLY, record=1.0) == 0
    assert seconds(buffered(m), read=1.0) == elements * 3 / 4
    assert seconds(buffered(m), fold=1.0) == elements / 4
    assert seconds(buffered(m), fold_record=1.0) == elements
    assert seconds(buffered(m), record=1.0) == record * (1 + 2 + 3) / 4
