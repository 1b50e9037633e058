"""Costs are measured once, kept in a file, and believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvbuffer.ops import calibration
from kvbuffer.ops.calibration import bandwidth_from, costs_of, recalibrate, typical_times
from kvbuffer.ops.cost import KV_ONLY, RECURRENT, Bandwidth, Costs, LayerShape, Traffic, step_seconds
from kvbuffer.ops.rule import GATED_DELTANET, RWKV7

SHAPE = LayerShape(GATED_DELTANET, 2, 4, 32, 32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep costs in a folder of the test's own, and measure them with little patience."""
    monkeypatch.setattr(calibration, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(calibration, "_BUDGET_S", 0.0)
    monkeypatch.setattr(calibration, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(calibration, "last_level_cache", lambda device="cpu": 2**16)
    monkeypatch.setattr(calibration, "Interference", lambda: others_took(0.0))
    forget()
    return tmp_path / "cache"


@contextmanager
def others_took(fraction: float) -> Iterator[SimpleNamespace]:
    """Stand in for the measurement of other processes' load."""
    yield SimpleNamespace(fraction=fraction)


def forget() -> None:
    """Do as a new process would."""
    calibration._costs.cache_clear()


def test_a_second_process_measures_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = costs_of(SHAPE)
    assert first.recurrent_call > 0
    forget()
    monkeypatch.setattr(calibration, "typical_times", lambda *_: pytest.fail("measured again"))
    assert costs_of(SHAPE) == first


def test_what_was_measured_beside_others_is_used_but_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibration, "Interference", lambda: others_took(0.4))
    assert costs_of(SHAPE).recurrent_call > 0
    assert not folder.exists()
    assert "took 40 % of the cores" in caplog.text


def test_one_file_holds_every_family_and_pair_of_dtypes(folder: Path) -> None:
    costs_of(SHAPE)
    costs_of(SHAPE.with_dtypes(torch.bfloat16, torch.float32))
    costs_of(LayerShape(RWKV7, 2, 4, 32, 32))
    (path,) = folder.iterdir()
    assert set(json.loads(path.read_text())) == {
        "gated_deltanet-float32-float32",
        "gated_deltanet-bfloat16-float32",
        "rwkv7-float32-float32",
    }


def test_another_cpu_kernel_or_number_of_threads_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {calibration._path("cpu", 1), calibration._path("cpu", 2)}
    monkeypatch.setattr(calibration, "device_name", lambda device: "another processor")
    paths.add(calibration._path("cpu", 1))
    monkeypatch.setattr(calibration, "library", lambda: (None, "no compiler"))
    paths.add(calibration._path("cpu", 1))
    assert len(paths) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"gated_deltanet-float32-float32": 3}'])
def test_a_damaged_file_is_measured_anew(folder: Path, content: str) -> None:
    folder.mkdir()
    path = calibration._path("cpu", torch.get_num_threads())
    path.write_text(content)
    assert costs_of(SHAPE).bandwidth.read > 0
    assert json.loads(path.read_text())["gated_deltanet-float32-float32"]["read_bandwidth"] > 0


def test_recalibrating_measures_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs_of(SHAPE)
    monkeypatch.setattr(calibration, "bandwidth_from", lambda *_: Bandwidth(1.0, 2.0))
    recalibrate()
    assert costs_of(SHAPE).bandwidth == Bandwidth(1.0, 2.0)


def test_a_folder_that_cannot_be_written_costs_only_the_file(folder: Path) -> None:
    folder.write_text("not a folder")
    assert costs_of(SHAPE).bandwidth.read > 0


def test_bandwidth_takes_the_faster_reading_and_charges_writes_what_they_add() -> None:
    seconds = {"read (sum)": 4.0, "read (dot)": 2.0, "update": 3.0}
    assert bandwidth_from(seconds, 12) == Bandwidth(read=6.0, write=12.0)


def test_writes_are_never_faster_than_free() -> None:
    seconds = {"read (sum)": 2.0, "read (dot)": 2.0, "update": 1.9}
    read, write = bandwidth_from(seconds, 12)
    assert write > 50 * read > 0


def test_what_is_measured_is_what_the_cost_model_expects() -> None:
    """Made-up costs, the times that they amount to, and back."""
    bandwidth = Bandwidth(read=2e9, write=5e9)
    costs = Costs(bandwidth, 7e-6, 8e-6, 1e-9, 2e-9, 3e-9, 4e-11, 5e-10, 6e-7, 7e-10)
    shape = LayerShape(RWKV7, 8, 16, 128, 128, torch.bfloat16, torch.float32)
    state, record, elements = shape.state_bytes, shape.record_bytes, shape.state_elements
    times = {"recurrent": step_seconds(RECURRENT, shape, 1, 0, costs) - costs.recurrent_call}
    for name, count in (("few", calibration._FEW), ("many", calibration._MANY)):
        reads, attends = state + count * record, count * shape.record_elements * costs.record
        times[f"read {name}"] = bandwidth.seconds(Traffic(reads, record)) + elements * costs.read + attends
        folding = elements * (costs.fold + 2 * count * costs.fold_record)
        times[f"fold {name}"] = bandwidth.seconds(Traffic(reads, state + record)) + folding
    for name, count in (("few", calibration._KV_ONLY_FEW), ("many", calibration._KV_ONLY_MANY)):
        times[f"KV only {name}"] = step_seconds(KV_ONLY, shape, 1, count, costs) - costs.buffered_call
    calls = dict.fromkeys(times, 8e-6) | {"recurrent": 7e-6}
    made_up = {name: cost for name, cost in asdict(costs).items() if name != "bandwidth"}
    assert calibration._costs_from(shape, bandwidth, calls, times) == pytest.approx(made_up)


def test_slow_rounds_change_nothing_until_they_are_most(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 5.0, 30.0, 50.0, 1.1, 5.1, 40.0, 60.0])
    monkeypatch.setattr(calibration, "seconds_of", lambda call, device: next(seconds))
    monkeypatch.setattr(calibration, "_ROUNDS", 4)
    monkeypatch.setattr(calibration, "_BUDGET_S", 100.0)
    assert typical_times({"a": int, "b": int}) == {"a": 1.1, "b": 5.1}
