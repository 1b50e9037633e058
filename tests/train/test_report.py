"""What is read out of logs, on logs that are written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvbuffer.errors import ConfigError
from kvbuffer.train.report import read_results, summarize, write_report


def write_run(folder: Path, method: str, seed: int, losses: list[tuple[int, float]], finished: bool = True) -> None:
    """Write a run that evaluates these losses, each with its stage, at FLOPs 100, 200, ...; a second is 50 FLOPs."""
    run = folder / f"{method}-{seed}"
    run.mkdir(parents=True)
    stages = 1 + max(stage for stage, _ in losses)
    (run / "run.json").write_text(json.dumps({"options": {"method": method, "seed": seed}, "plan": [{}] * stages}))
    records: list[dict[str, Any]] = []
    for i, (stage, loss) in enumerate(losses, 1):
        costs = {"flops": 100 * i, "seconds": 2.0 * i, "cpu_seconds": 1.0 * i}
        records += [{"stage": stage, "loss": 9.0, **costs}]
        records += [{"stage": stage, "loss": loss, "held_out": loss, "bits_per_byte": loss / 2, **costs}]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"cut off')
    if finished:
        (run / "model").mkdir()


def test_savings_are_those_of_the_last_stage(tmp_path: Path) -> None:
    write_run(tmp_path, "scratch", 0, [(0, 4.0), (0, 3.0), (0, 2.5), (0, 2.0)])
    write_run(tmp_path, "scratch", 1, [(0, 4.0), (0, 3.0), (0, 2.5), (0, 2.2)])
    # Of seed 0, a small model that is better does not count, and 2.0 lies half way between the last two points.
    write_run(tmp_path, "v-cycle", 0, [(0, 1.0), (1, 2.5), (1, 1.5)])
    write_run(tmp_path, "v-cycle", 1, [(0, 4.0), (1, 2.2), (1, 2.1)])
    write_run(tmp_path, "stack", 0, [(0, 4.0), (1, 2.1)])
    write_run(tmp_path, "small-first", 0, [(0, 4.0)], finished=False)
    rows = {row["method"]: row for row in summarize(read_results(tmp_path))}
    assert rows.keys() == {"scratch", "v-cycle", "stack"}
    assert rows["scratch"]["saved"] == {"flops": 0.0, "cpu_seconds": 0.0, "seconds": 0.0}
    assert rows["scratch"]["held_out"] == pytest.approx(2.1)
    assert rows["v-cycle"]["saved"]["flops"] == pytest.approx(((1 - 250 / 400) + (1 - 200 / 400)) / 2)
    assert rows["v-cycle"]["seeds"] == [0, 1]
    assert rows["stack"]["saved"]["flops"] is None


def test_a_report_of_one_run_or_of_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="has been evaluated yet"):
        write_report(tmp_path)
    write_run(tmp_path, "scratch", 0, [(0, 4.0), (0, 3.0)])
    write_run(tmp_path, "stack", 0, [(0, 4.0), (1, 3.5)], finished=False)
    for folder in (tmp_path, tmp_path / "scratch-0"):
        write_report(folder)
        assert [row["method"] for row in json.loads((folder / "report.json").read_text())] == ["scratch"]
        assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "Not finished: stack (seed 0)" in capsys.readouterr().out
