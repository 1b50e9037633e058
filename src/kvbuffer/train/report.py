"""What runs have reached, and what each method takes to be as good as training from scratch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from kvbuffer.errors import ConfigError
from kvbuffer.train.records import read_log

#: Costs that a log counts, and what they are called.
COSTS = {"flops": "FLOPs", "cpu_seconds": "CPU time", "seconds": "wall clock"}


@dataclass(frozen=True)
class Result:
    """One run's evaluations.

    Attributes:
        points: records of the log with held-out loss and costs, in order.
        last_stage: number of the stage that trains the whole model last.
        finished: whether the run has ended.
    """

    method: str
    seed: int
    points: list[dict[str, Any]]
    last_stage: int
    finished: bool

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation."""
        return self.points[-1]

    def cost_to_reach(self, loss: float, cost: str) -> float | None:
        """Return the cost at which the last stage first evaluates at ``loss`` or below, or None if it never does.

        Between the evaluation before and that one, the loss is taken to fall in a straight line.
        """
        before = None
        for point in self.points:
            if point["stage"] != self.last_stage:
                continue
            if point["held_out"] <= loss:
                if before is None or before["held_out"] == point["held_out"]:
                    return float(point[cost])
                share = (before["held_out"] - loss) / (before["held_out"] - point["held_out"])
                return float(before[cost] + share * (point[cost] - before[cost]))
            before = point
        return None


def read_results(folder: Path) -> list[Result]:
    """Return the runs in ``folder``, or the one that it is, in the order of their names.

    Raises:
        ConfigError: there is none that has been evaluated.
    """
    results = []
    for path in sorted({folder / "run.json", *folder.glob("*/run.json")}):
        if path.exists() and (path.parent / "log.jsonl").exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
            points = [record for record in read_log(path.parent) if "held_out" in record]
            if points:
                options = saved["options"]
                finished = (path.parent / "model").exists()
                results.append(Result(options["method"], options["seed"], points, len(saved["plan"]) - 1, finished))
    if not results:
        raise ConfigError(f"no run in {folder} has been evaluated yet")
    return results


def summarize(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row per method: means over its finished runs, and costs relative to training from scratch.

    ``saved`` is the share of each cost that the method saves in reaching the final held-out loss of the run from
    scratch with the same seed; None where there is no such run, or one of its runs does not reach it.
    """
    done = [result for result in results if result.finished]
    baselines = {result.seed: result for result in done if result.method == "scratch"}
    rows = []
    for method in dict.fromkeys(result.method for result in done):
        runs = [result for result in done if result.method == method]
        rows.append(
            {
                "method": method,
                "seeds": [run.seed for run in runs],
                "held_out": mean(run.final["held_out"] for run in runs),
                "bits_per_byte": mean(run.final["bits_per_byte"] for run in runs),
                **{cost: mean(run.final[cost] for run in runs) for cost in COSTS},
                "saved": {cost: _saved(runs, baselines, cost) for cost in COSTS},
            }
        )
    return rows


def _saved(runs: Sequence[Result], baselines: dict[int, Result], cost: str) -> float | None:
    shares = []
    for run in runs:
        if run.seed not in baselines:
            return None
        final = baselines[run.seed].final
        reached = run.cost_to_reach(final["held_out"], cost)
        if reached is None:
            return None
        shares.append(1 - reached / float(final[cost]))
    return mean(shares)


def write_report(folder: Path) -> None:
    """Print a table of the runs in ``folder``, and write ``report.json`` and, with matplotlib, ``report.png`` there."""
    results = read_results(folder)
    rows = summarize(results)
    console = Console()
    console.print(_table(rows) if rows else "No run has finished yet.")
    if unfinished := [f"{r.method} (seed {r.seed})" for r in results if not r.finished]:
        console.print(f"Not finished: {', '.join(unfinished)}.", highlight=False)
    (folder / "report.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    try:
        plot(results, folder / "report.png")
    except ImportError:
        console.print("No plot: matplotlib is not installed (pip install 'kvbuffer[plot]').")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="Costs, and what is saved in reaching the loss from scratch", title_justify="left")
    table.add_column("method", no_wrap=True)
    for name in (
        "seeds",
        "held-out loss",
        "bits/byte",
        "PFLOP",
        "CPU s",
        *(f"{name} saved" for name in COSTS.values()),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        saved = ["not reached" if share is None else f"{100 * share:.1f} %" for share in row["saved"].values()]
        table.add_row(
            row["method"],
            str(len(row["seeds"])),
            f"{row['held_out']:.4f}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['flops'] / 1e15:.3g}",
            f"{row['cpu_seconds']:,.0f}",
            *saved,
        )
    return table


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot held-out losses over FLOPs and over CPU time, a line per run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    methods = list(dict.fromkeys(result.method for result in results))
    for axes, cost in zip(figure.subplots(1, 2, sharey=True), ("flops", "cpu_seconds"), strict=True):
        for result in results:
            # A model is not comparable with another of its own run, so the line is broken between stages.
            for stage in range(result.last_stage + 1):
                points = [point for point in result.points if point["stage"] == stage]
                last = stage == result.last_stage
                axes.plot(
                    [point[cost] for point in points],
                    [point["held_out"] for point in points],
                    color=f"C{methods.index(result.method) % 10}",
                    linestyle="-" if last else ":",
                    label=result.method if last and result.seed == results[0].seed else None,
                )
        axes.set_xlabel(COSTS[cost] if cost == "flops" else "CPU time, s")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss, nats per token")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)
