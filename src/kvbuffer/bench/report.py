"""The tables that ``kvbuffer bench ops`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.table import Table

from kvbuffer.bench.choices import Choice
from kvbuffer.bench.measure import Row
from kvbuffer.bench.ops import Results

#: Regret above which a choice of the cost model is marked.
MAX_REGRET = 0.05
_MAX_FOREIGN_LOAD = 0.05
# Tables are not wrapped wherever the output goes: a wrapped table is no table.
_WIDTH = 130


def show(results: Results, console: Console | None = None) -> None:
    """Print a table per family and batch, the cost model's choices, and what casts doubt on them."""
    console = console or Console(width=max(_WIDTH, Console().width))
    console.print(f"{_machine_line(results)}; {results.kernels}", highlight=False)
    for (family, batch), rows in groupby(results.rows, key=lambda row: (row.family, row.batch)):
        console.print(_speed_table(results, family, batch, rows))
    if results.choices:
        console.print(_choice_table(results.choices))
    if results.foreign_load > _MAX_FOREIGN_LOAD:
        share = f"{100 * results.foreign_load:.0f} %"
        console.print(f"[yellow]Other processes took up to {share} of the cores during a measurement.[/]")


def _machine_line(results: Results) -> str:
    machine = results.machine
    name = machine.get("device") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{name}, working set {machine['working_set'] / 1e6:.0f} MB, commit {results.commit}"


def _speed_table(results: Results, family: str, batch: int, rows: Iterable[Row]) -> Table:
    bandwidth = results.bandwidths[f"{family}, batch {batch}"]
    heads, dim = ("x".join(map(str, pair)) for pair in (results.settings.heads, results.settings.dim))
    both = 2 / (1 / bandwidth.read + 1 / bandwidth.write)
    title = (
        f"{family}, batch {batch}, {heads} heads of {dim}; "
        f"memory reads {bandwidth.read / 1e9:.1f} GB/s, updates {both / 1e9:.1f} GB/s both ways"
    )
    table = _table(title, "form", "backend", "state", "records")
    for name in ("us/call", "MB", "GB/s", "of bound", "time/token", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.form, row.backend, row.state_dtype, row.record_dtype, *_speed(row), f"{row.error:.1e}")
    return table


def _speed(row: Row) -> list[str]:
    if row.seconds is None or row.bytes is None or row.bandwidth is None:
        return [f"[red]{row.gate}[/]", "", "", "", ""]
    return [
        f"{1e6 * row.seconds:,.1f}",
        f"{row.bytes / 1e6:.2f}",
        f"{row.bandwidth / 1e9:.1f}",
        "" if row.of_bound is None else f"{100 * row.of_bound:.0f} %",
        "" if row.vs_recurrent is None else f"{row.vs_recurrent:.3f}x",
    ]


def _choice_table(choices: list[Choice]) -> Table:
    worst = max(choice.regret for choice in choices)
    table = _table(f"Choices of the cost model, worst regret {100 * worst:.1f} %", "family", "state", "records")
    for name in ("batch", "context", "chosen", "best", "us", "best us", "expected us", "regret"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in choices:
        colour = "red" if choice.regret > MAX_REGRET else "green"
        table.add_row(
            choice.family,
            choice.state_dtype,
            choice.record_dtype,
            str(choice.batch),
            str(choice.context),
            choice.chosen,
            choice.best,
            *(f"{1e6 * seconds:,.1f}" for seconds in (choice.chosen_s, choice.best_s, choice.expected_s)),
            f"[{colour}]{100 * choice.regret:.1f} %[/]",
        )
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, no_wrap=True)
    return table
