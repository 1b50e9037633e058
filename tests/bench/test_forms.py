"""A cycle does what its form says, and moves the bytes that its table claims.

The calls of a cycle are recorded. What each has to read and write follows from its fills, folds and tokens alone; the
form's own formula must say the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvbuffer.bench import forms
from kvbuffer.bench.accuracy import error_limit, sample_error
from kvbuffer.bench.competitors import competitors
from kvbuffer.bench.forms import TimedForm, buffered, kv_only, prefill, recurrent, verify
from kvbuffer.bench.pools import Pools
from kvbuffer.ops.calibration import random_tokens
from kvbuffer.ops.layout import StatePool
from kvbuffer.ops.rule import FAMILIES
from tests.bench.conftest import SMALL

BUFFERED_FORMS = [buffered(1), buffered(5), kv_only(5), verify(4, 16), verify(8, 16), verify(2, 3)]
ALL_FORMS = [recurrent(), *BUFFERED_FORMS, prefill(70)]


class Ledger:
    """Stands in for the operators of a cycle and adds up bytes per request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = self.written = 0
        self.fills: list[int] = []
        for name in ("buffered_decode", "buffered_verify", "fold_records"):
            monkeypatch.setattr(forms, name, getattr(self, name))

    def _states(self, slots: torch.Tensor, *, write: bool) -> None:
        if slots[0] >= 0:
            self.read += SMALL.state_bytes
            self.written += SMALL.state_bytes * write

    def buffered_decode(
        self, rule: Any, tokens: Any, states: StatePool, slots: Any, records: Any, table: Any, fill: Any, fold: Any
    ) -> None:
        self._states(slots, write=bool(fold[0]))
        self.read += int(fill[0]) * SMALL.record_bytes
        self.written += SMALL.record_bytes
        self.fills.append(int(fill[0]))

    def buffered_verify(
        self, rule: Any, tokens: Any, states: Any, slots: Any, records: Any, table: Any, fill: Any, borders: Any
    ) -> None:
        self._states(slots, write=False)
        self.read += int(fill[0]) * SMALL.record_bytes
        self.written += int(borders[1]) * SMALL.record_bytes
        self.fills.append(int(fill[0]))

    def fold_records(self, rule: Any, states: Any, slots: Any, records: Any, table: Any, count: Any) -> None:
        self._states(slots, write=True)
        self.read += int(count[0]) * SMALL.record_bytes


@pytest.mark.parametrize("form", BUFFERED_FORMS, ids=lambda form: form.name)
def test_traffic_is_what_the_calls_of_a_cycle_move(form: TimedForm, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = Pools(SMALL, 3, 1, form.capacity, 0)
    ledger = Ledger(monkeypatch)
    step = form.bind(pools)
    tokens = random_tokens(SMALL.rule, 3 * form.tokens, 1, 2, 16, 32)
    for n in range(form.calls, 2 * form.calls):
        step(n, 0, tokens)
    moved = (ledger.read / form.calls, ledger.written / form.calls)
    assert form.traffic(SMALL) == pytest.approx(moved)
    assert len(ledger.fills) == form.calls
    assert max(ledger.fills) <= form.capacity


def test_the_cursor_of_a_buffer_moves_through_every_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(monkeypatch)
    step = buffered(4).bind(Pools(SMALL, 1, 1, 4, 0))
    for n in range(9):
        step(n, 0, random_tokens(SMALL.rule, 1, 1, 2, 16, 32))
    assert ledger.fills == [0, 1, 2, 3, 4, 1, 2, 3, 4]


@pytest.mark.parametrize("rule", FAMILIES.values(), ids=lambda rule: rule.name)
@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: form.name)
def test_what_is_timed_is_right(form: TimedForm, rule: Any) -> None:
    shape = replace(SMALL, rule=rule)
    for dtypes in ((torch.float32, torch.float32), (torch.int8, torch.bfloat16)):
        tier = shape.with_dtypes(*dtypes)
        assert sample_error(form, tier, "cpu") < error_limit(form, tier)


def test_other_projects_compute_the_same() -> None:
    (peer,) = competitors(SMALL.rule, "cpu")
    assert peer.peer == "transformers"
    assert sample_error(peer, SMALL, "cpu") < 1e-6


@pytest.mark.parametrize(("layers", "calls"), [(1, 5), (5, 5), (6, 10), (23, 25)])
def test_a_pass_is_whole_cycles_over_all_layers(layers: int, calls: int) -> None:
    form, tokens = buffered(5), random_tokens(SMALL.rule, 1, 1, 2, 16, 16)
    seen: list[tuple[int, int]] = []
    form.run_pass(lambda n, layer, tokens: seen.append((n, layer)) or tokens.v, layers, tokens)  # type: ignore[func-returns-value]
    assert len(seen) == form.calls_in_pass(layers) == calls
    assert [n for n, _ in seen] == [5, 6, 7, 8, 9] * (calls // 5)
    assert [layer for _, layer in seen] == [i % layers for i in range(calls)]


def test_pools_past_the_cache_have_states_of_the_working_set_and_no_more_pages_than_that() -> None:
    working_set = 100 * SMALL.state_bytes
    pools = Pools.past_the_cache(SMALL, 3, 40, working_set)
    assert working_set <= pools.states.data.nbytes < working_set + 3 * SMALL.state_bytes
    assert sum(pool.nbytes for pool in pools.records) <= working_set
    for page_table in pools.page_tables:
        assert len(page_table.unique()) == page_table.numel()
        assert page_table.max() < len(pools.records.keys)
    assert len(torch.cat(pools.slots).unique()) == len(pools.states.data)
