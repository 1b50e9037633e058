"""The table's arithmetic on made-up times, and the gate that withholds a speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbuffer.bench import forms, measure
from kvbuffer.bench.forms import buffered, kv_only, prefill, recurrent, verify
from kvbuffer.bench.measure import Row
from kvbuffer.ops.cost import Bandwidth
from tests.bench.conftest import SMALL

TIERS = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]
SETTINGS = {"batch": 2, "working_set": 2**15, "rounds": 1}


def by_form(rows: list[Row]) -> dict[tuple[str, str, str, str], Row]:
    found = {
        (row.form, row.backend if row.backend == "transformers" else "", row.state_dtype, row.record_dtype): row
        for row in rows
    }
    assert len(found) == len(rows)
    return found


def test_each_form_is_timed_once_per_dtype_that_matters_to_it() -> None:
    rows, _ = measure.measure(SMALL, TIERS, [recurrent(), buffered(4), kv_only(4), prefill(8)], **SETTINGS)
    f32, bf16 = "float32", "bfloat16"
    assert set(by_form(rows)) == {
        ("recurrent", "", f32, ""),
        ("recurrent", "transformers", f32, ""),
        ("recurrent", "", bf16, ""),
        ("prefill 8", "", f32, ""),
        ("prefill 8", "", bf16, ""),
        ("KV only, 4 tokens", "", "", f32),
        ("KV only, 4 tokens", "", "", bf16),
        *(("buffered m=4", "", *tier) for tier in ((f32, f32), (bf16, f32), (bf16, bf16))),
    }


def test_bytes_bounds_and_ratios_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the clock takes a second, and the memory moves a byte in one."""
    monkeypatch.setattr(measure, "seconds_of", lambda call, device: 1.0)
    monkeypatch.setattr(measure, "bandwidth_from", lambda times, size: Bandwidth(1.0, 1.0))
    rows, _ = measure.measure(SMALL, TIERS[:1], [buffered(4), verify(1, 4), prefill(8)], **SETTINGS)
    found = {row.form: row for row in rows if row.backend != "transformers"}
    base, decode, check, prompt = (
        found[name] for name in ("recurrent", "buffered m=4", "verify 1 drafts", "prefill 8")
    )
    for row, calls in ((base, 1), (decode, 4), (check, 2)):
        assert row.seconds is not None
        assert row.bytes is not None
        assert row.seconds == 1 / (calls * -(-row.layers // calls))
        assert row.bandwidth == pytest.approx(row.bytes / row.seconds)
        assert row.of_bound == pytest.approx(row.bytes / row.seconds)
    assert base.bytes == 2 * 2 * SMALL.state_bytes
    assert base.vs_recurrent == 1.0
    assert check.seconds is not None
    assert base.seconds is not None
    assert check.vs_recurrent == pytest.approx(check.seconds / 2 / base.seconds)
    assert prompt.of_bound is None


def test_slow_forms_are_timed_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes of the bandwidth are quick; passes of a form take longer than all of a form's time, but the first."""
    timed: list[object] = []

    def seconds_of(call: object, device: str) -> float:
        timed.append(call)
        return 1.1 * measure._CASE_S if "run_pass" in str(call) else 1e-3 * measure._CASE_S

    monkeypatch.setattr(measure, "seconds_of", seconds_of)
    measure.measure(SMALL, TIERS[:1], [buffered(4)], **{**SETTINGS, "rounds": 9})
    passes = [call for call in timed if "run_pass" in str(call)]
    probes = {call for call in timed if "lambda" not in str(call)} - set(passes)
    assert all(passes.count(call) == measure._LEAST_ROUNDS for call in passes)
    assert probes
    assert all(timed.count(call) == 9 for call in probes)


def test_wrong_results_get_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffered decode that reads one record too few is fast and wrong."""
    honest = forms.buffered_decode

    def forgetful(
        rule: Any, tokens: Any, states: Any, slots: Any, records: Any, table: Any, fill: Any, fold: Any
    ) -> Any:
        return honest(rule, tokens, states, slots, records, table, (fill - 1).clamp_min(0), fold)

    monkeypatch.setattr(forms, "buffered_decode", forgetful)
    rows, _ = measure.measure(SMALL, TIERS, [recurrent(), buffered(4)], **SETTINGS)
    for row in rows:
        if row.form == "buffered m=4":
            assert (row.seconds, row.bandwidth, row.vs_recurrent) == (None, None, None)
            assert "error" in row.gate
        else:
            assert row.seconds is not None


def test_without_a_right_baseline_there_are_no_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "recurrent_decode", lambda rule, tokens, states, slots: torch.zeros_like(tokens.v))
    rows, _ = measure.measure(SMALL, TIERS[:1], [buffered(4)], **SETTINGS)
    assert next(row for row in rows if row.form == "recurrent").gate
    assert all(row.vs_recurrent is None for row in rows)
    assert next(row for row in rows if row.form == "buffered m=4").seconds is not None
