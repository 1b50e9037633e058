"""Results as tables: for the terminal (rich) and for the README (Markdown)."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from peers import OURS

#: Names the profile of a step of prefill among those of decode steps, which are named by their number of requests.
PREFILL = "prefill"

_WITHHELD = "withheld (accuracy gate red)"
_SHOWN = {
    "output_tps": ("end to end tok/s", 1, 1),
    "decode_tps": ("decode tok/s", 1, 1),
    "tpot_s": ("time per token ms", 1e3, 1),
    "ttft_s": ("first token ms", 1e3, 0),
    "prefill_tps": ("prefill tok/s", 1, 0),
}


def speed_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per metric and workload, one column per system, then ours over the best other."""
    medians, ratios = result["summary"]["medians"], result["summary"]["ratios"]
    names = list(result["systems"])
    rows = []
    for metric, (label, scale, digits) in _SHOWN.items():
        for workload, systems in medians.items():
            values = {name: systems[name][metric] for name in names if metric in systems.get(name, {})}
            if not values:
                continue
            shown = {name: f"{value * scale:,.{digits}f}" for name, value in values.items()}
            best = min((entry[metric] for entry in ratios.get(workload, {}).values() if metric in entry), default=None)
            if result["accuracy"]["green"] is False:
                shown[OURS] = _WITHHELD
            ratio = "" if best is None else f"{best:.2f}x"
            where = f"{label}, {workload}" if workload not in label else label
            rows.append([where, *(shown.get(name, "") for name in names), ratio])
    return ["", *names, "ours / best other"], rows


def accuracy_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the accuracy gate: one row per system."""
    rows = [
        [
            name,
            *(f"{100 * judged[key]:.2f} %" for key in ("agreement", "ties", "wrong")),
            f"{1e3 * judged['regret']:.3f}",
            f"{judged['first_divergence']:g}",
        ]
        for name, judged in result["accuracy"]["systems"].items()
    ]
    return ["system", "float32's choice", "ties", "wrong", "regret (mnat)", "first divergence"], rows


def show(result: dict, console: Console) -> None:
    """Prints everything to the terminal."""
    machine = result["machine"]
    console.print(
        f"[bold]{result['settings']['model']}[/] on {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['read_bandwidth'] / 1e9:.0f} GB/s, {machine['fp32_peak'] / 1e9:.0f} GFLOP/s fp32, "
        f"{machine['bf16_peak'] / 1e9:.0f} bf16, {machine['dense_layer_peak'] / 1e9:.0f} our dense layer; "
        f"commit {result['commit']}"
    )
    _table(console, "Speed, medians over rounds", *speed_rows(result))
    _table(console, f"Accuracy, {result['accuracy']['verdict']}", *accuracy_rows(result))
    show_operators(result["operators"], console)
    foreign = max((entry["foreign_load"] for entry in result["rounds"]), default=0)
    if foreign > 0.05:
        console.print(f"[yellow]Other processes took up to {100 * foreign:.0f} % of the cores during a measurement.[/]")


def show_operators(profiles: dict[str, list[dict]], console: Console) -> None:
    """Prints a table per profile."""
    for name, rows in profiles.items():
        total, bound = sum(row["seconds"] for row in rows), sum(row["bound_s"] for row in rows)
        what = "One step of prefill" if name == PREFILL else f"One decode step, {name} requests"
        title = f"{what}: {1e3 * total:.2f} ms (bound {1e3 * bound:.2f} ms)"
        table = Table("operator", title=title, title_justify="left")
        for column in ("calls", "us", "share", "MB", "MFLOP", "bound us"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            moves = bool(row["bytes"])
            table.add_row(
                row["operator"],
                f"{row['calls']:.0f}",
                f"{1e6 * row['seconds']:,.0f}",
                f"{100 * row['seconds'] / total:.1f} %",
                f"{row['bytes'] / 1e6:.2f}" if moves else "",
                f"{row['flops'] / 1e6:.1f}" if row["flops"] else "",
                f"{1e6 * row['bound_s']:,.0f}" if moves else "",
            )
        console.print(table)


def markdown(result: dict) -> str:
    """The same tables for a README."""
    parts = [_markdown_table(*speed_rows(result)), _markdown_table(*accuracy_rows(result))]
    return "\n\n".join(part for part in parts if part)


def _table(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
