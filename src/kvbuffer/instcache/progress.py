"""How far a long run has come, on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Told how many are done, and of how many (None: nobody knows).
Report = Callable[[int, int | None], None]


def no_report(done: int, total: int | None) -> None:
    """Tell nobody."""


@contextmanager
def progress_bar(what: str) -> Iterator[Report]:
    """Draw a bar with the rate per second, and the time that is left where the total is known."""
    columns = (
        SpinnerColumn(),
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=None, rate="")
        began_at: int | None = None

        def report(done: int, total: int | None) -> None:
            nonlocal began_at
            if began_at is None:  # what an earlier run did is not this run's speed
                began_at = done
            elapsed = progress.tasks[task].elapsed or 0.0
            rate = f"{(done - began_at) / elapsed:,.0f}/s" if elapsed else ""
            progress.update(task, completed=done, total=total, rate=rate)

        yield report
