"""Costs are measured once, kept in a file, and believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvbuffer.ops import calibration
from kvbuffer.ops.calibration import bandwidth_from, costs_of, recalibrate
from kvbuffer.ops.cost import Bandwidth, LayerShape
from kvbuffer.ops.rule import GATED_DELTANET, RWKV7

SHAPE = LayerShape(GATED_DELTANET, 2, 4, 32, 32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep costs in a folder of the test's own, and measure them with little patience."""
    monkeypatch.setattr(calibration, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(calibration, "_BUDGET_S", 0.0)
    monkeypatch.setattr(calibration, "_COLD_ROUNDS", 1)
    monkeypatch.setattr(calibration, "last_level_cache", lambda device="cpu": 2**16)
    forget()
    return tmp_path / "cache"


def forget() -> None:
    """Do as a new process would."""
    calibration._costs.cache_clear()
    calibration._bandwidth.cache_clear()


def test_a_second_process_measures_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = costs_of(SHAPE)
    assert first.recurrent > 0
    forget()
    monkeypatch.setattr(calibration, "best_times", lambda *_: pytest.fail("measured again"))
    assert costs_of(SHAPE) == first


def test_one_file_holds_every_family_and_pair_of_dtypes(folder: Path) -> None:
    costs_of(SHAPE)
    costs_of(SHAPE.with_dtypes(torch.bfloat16, torch.float32))
    costs_of(LayerShape(RWKV7, 2, 4, 32, 32))
    (path,) = folder.iterdir()
    assert set(json.loads(path.read_text())) == {
        "bandwidth",
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


@pytest.mark.parametrize("content", ["", "{", "[]", '{"bandwidth": 3}'])
def test_a_damaged_file_is_measured_anew(folder: Path, content: str) -> None:
    folder.mkdir()
    path = calibration._path("cpu", torch.get_num_threads())
    path.write_text(content)
    assert costs_of(SHAPE).bandwidth.read > 0
    assert json.loads(path.read_text())["bandwidth"]["read"] > 0


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


def test_a_miss_is_what_cold_records_add_per_head_beyond_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm calls take 1 s per request, cold ones 33 s and 100 s more; 8 s are the bytes, of 8 heads."""
    requests = iter([1, 16])
    monkeypatch.setattr(calibration, "seconds_of", lambda call, device: 100.0 + 33.0 * next(requests))
    monkeypatch.setattr(calibration, "best_times", lambda calls, device: {batch: 1.0 * batch for batch in calls})
    shape = LayerShape(GATED_DELTANET, 8, 8, 128, 128)
    bandwidth = Bandwidth(read=shape.record_bytes / 6, write=shape.record_bytes / 2)
    miss = calibration._measure_miss(GATED_DELTANET, torch.float32, torch.float32, "cpu", bandwidth)
    assert miss == pytest.approx((33.0 - 1.0 - 8.0) / 8)


def test_costs_come_from_differences_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times made up of a call's 7 s and per head 3 s, 5 s with 1 and 8 s with 2 records more."""
    few, many = calibration._FEW, calibration._MANY
    per_head = {"recurrent": 3.0, "read few": 5.0 + few, "read many": 5.0 + many}
    per_head["KV only few"] = 4.0
    per_head |= {"fold few": 8.0 + 2 * few, "fold many": 8.0 + 2 * many}
    threads = torch.get_num_threads()

    def made_up(calls: dict[tuple[str, int], object], device: str) -> dict[tuple[str, int], float]:
        return {(name, size): 7.0 + threads * (1, 8)[size] * per_head[name] for name, size in calls}

    monkeypatch.setattr(calibration, "best_times", made_up)
    kernels = calibration._measure_kernels(RWKV7, torch.float32, torch.float32, "cpu")
    elements, record = 128 * 128, 2 * (128 + 128)
    assert kernels == pytest.approx(
        {
            "recurrent_call": 7.0,
            "buffered_call": 7.0,
            "recurrent": 3.0 / elements,
            "read": 5.0 / elements,
            "fold": 8.0 / elements,
            "fold_record": 2.0 / elements / 2,
            "record": 1.0 / record,
        }
    )
