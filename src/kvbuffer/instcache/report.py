"""A plan for people: a table, a JSON file, a drawing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvbuffer.cache.plan import format_size
from kvbuffer.instcache.plan import Row

_WIDTH, _HEIGHT, _MARGIN = 640, 360, 60


def show(rows: Sequence[Row]) -> None:
    """Print a plan as a table."""
    table = Table(title="What a cache would hold and hit, with 95 % intervals", box=None, pad_edge=False)
    for name in ("sigma", "hit rate", "", "entries", "", "store", "to build"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.sigma:g}",
            f"{row.hit_rate.value:.1%}",
            f"{row.hit_rate.low:.1%}–{row.hit_rate.high:.1%}",
            f"{row.entries.value:,.0f}",
            f"{row.entries.low:,.0f}–{row.entries.high:,.0f}",
            format_size(row.num_bytes),
            f"{row.seconds / 3600:.2f} h" if row.seconds > 600 else f"{row.seconds:.1f} s",
        )
    Console().print(table)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write a plan as a list of objects."""
    fields = [row._asdict() | {"hit_rate": row.hit_rate._asdict(), "entries": row.entries._asdict()} for row in rows]
    path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def write_svg(rows: Sequence[Row], path: Path) -> None:
    """Draw the hit rate over sigma, with its interval, and the number of instructions at the same places."""
    last = rows[-1].sigma

    def x(sigma: float) -> float:
        return _MARGIN + sigma / last * (_WIDTH - 2 * _MARGIN)

    def y(share: float) -> float:
        return _HEIGHT - _MARGIN - share * (_HEIGHT - 2 * _MARGIN)

    def text(at: tuple[float, float], what: str, anchor: str = "middle") -> str:
        return f'<text x="{at[0]:.0f}" y="{at[1]:.0f}" text-anchor="{anchor}">{what}</text>'

    line = " ".join(f"{x(row.sigma):.1f},{y(row.hit_rate.value):.1f}" for row in rows)
    band = [(row.sigma, row.hit_rate.low) for row in rows] + [(row.sigma, row.hit_rate.high) for row in rows[::-1]]
    points = " ".join(f"{x(sigma):.1f},{y(share):.1f}" for sigma, share in band)
    labelled = rows[max(0, (len(rows) - 1) % 4) :: 4]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<polygon points="{points}" fill="#cfe0f5"/>',
        f'<polyline points="{line}" fill="none" stroke="#1f5fa8" stroke-width="2"/>',
        f'<path d="M{x(0)},{y(1)} V{y(0)} H{x(last)}" fill="none" stroke="black"/>',
        *(text((x(0) - 8, y(share) + 4), f"{share:.0%}", "end") for share in (0, 0.25, 0.5, 0.75, 1)),
        *(text((x(row.sigma), y(0) + 16), f"{row.sigma:g}") for row in labelled),
        *(text((x(row.sigma), y(0) + 32), f"{row.entries.value:,.0f}") for row in labelled),
        text((_WIDTH / 2, _HEIGHT - 8), "sigma (nats), and instructions to be found"),
        text((x(0), y(1) - 12), "hit rate", "start"),
        "</svg>",
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
