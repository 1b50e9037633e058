"""The tables of precision.py as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from statistics import fmean

import torch

from kvbuffer.ops.cost import RECURRENT, Form, FormKind, LayerShape, step_traffic
from kvbuffer.ops.rule import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_CLOSE_UP = 16  # the buffer length that the detailed tables look at
_SHOWN_HEADS = 8


def markdown(result: dict) -> str:
    """Return every table of a result."""
    return "\n\n".join(part for name, family in result["families"].items() for part in _sections(name, family))


def _sections(name: str, family: dict) -> list[str]:
    def slow_and_fast(variant: dict) -> str:
        last = variant["errors"][-1]
        return f"{last[0]:.1e} / {last[-1]:.1e}"

    def error_and_bytes(variant: dict) -> str:
        stored = variant["checkpoint"] in DTYPES
        return f"{_rms(variant['errors'][-1]):.1e}" + (f" / {_kib_per_step(family, variant):.0f}" if stored else "")

    def growth(variant: dict) -> str:
        first, last = variant["errors"][0], variant["errors"][-1]
        return f"{last[0] / first[0]:.2f} / {last[-1] / first[-1]:.2f}"

    shape = "{heads} heads, K = {k}, V = {v}".format(**family["shape"])
    return [
        f"## {name}: {family['tokens']:,} tokens, {shape}",
        "Relative RMS error of the last tenth, slowest head / fastest head:",
        _by_length(family, slow_and_fast),
        "The same over all heads, and KiB that a head moves per token:",
        _by_length(family, error_and_bytes),
        "Growth of the error, last tenth over first, slowest head / fastest head:",
        _by_length(family, growth),
        f"Error of the last tenth per head, by its memory, m = {_CLOSE_UP}:",
        _by_head(family),
        f"Error over all heads with int8 checkpoints for the fast ones only (bfloat16 records, m = {_CLOSE_UP}):",
        _mixed(family),
    ]


def _kib_per_step(family: dict, variant: dict) -> float:
    """What one head moves per decoded token, averaged over whole buffers, with a key head of its own."""
    k, v = family["shape"]["k"], family["shape"]["v"]
    dtypes = DTYPES[variant["checkpoint"]], DTYPES[variant["records"] or "float32"]
    form = Form(FormKind.BUFFERED, variant["length"]) if variant["records"] else RECURRENT
    return step_traffic(form, LayerShape(FAMILIES[family["rule"]], 1, 1, k, v, *dtypes)).total / 1024


def _rms(errors: Iterable[float]) -> float:
    return sqrt(fmean(error**2 for error in errors))


def _by_length(family: dict, cell: Callable[[dict], str]) -> str:
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for variant in family["variants"]:
        # The recurrence has no records: it stands beside both kinds.
        records = [variant["records"]] if variant["records"] else ["float32", "bfloat16"]
        for record in records if variant["checkpoint"] != "reference" else [""]:
            rows.setdefault((variant["checkpoint"], record), {})[variant["length"]] = cell(variant)
    lengths = sorted({variant["length"] for variant in family["variants"]})
    header = ["checkpoint", "records", *("recurrent" if length == 1 else f"m = {length}" for length in lengths)]
    return _table(header, ([*key, *(cells.get(length, "") for length in lengths)] for key, cells in rows.items()))


def _by_head(family: dict) -> str:
    rows, every = [], slice(None, None, max(1, len(family["heads"]) // _SHOWN_HEADS))
    for variant in family["variants"]:
        if variant["records"] is None or variant["length"] == _CLOSE_UP:
            label = variant["checkpoint"], variant["records"] or "recurrent"
            rows.append([*label, *(f"{error:.1e}" for error in variant["errors"][-1][every])])
    return _table(["checkpoint", "records", *family["heads"][every]], rows)


def _mixed(family: dict) -> str:
    errors = {
        variant["checkpoint"]: variant["errors"][-1]
        for variant in family["variants"]
        if variant["records"] == "bfloat16" and variant["length"] == _CLOSE_UP
    }
    if not {"bfloat16", "int8"} <= errors.keys():
        return "(not measured)"
    wide, narrow = errors["bfloat16"], errors["int8"]
    heads, v = len(wide), family["shape"]["v"]
    rows = []
    for slow in (0, heads // 8, heads // 4, heads // 2, heads):
        share = (slow + (heads - slow) * (v + 4) / (2 * v)) / heads  # a row of int8 has a scale of 4 bytes
        rows.append([f"{slow} of {heads}", f"{100 * share:.0f} %", f"{_rms([*wide[:slow], *narrow[slow:]]):.1e}"])
    return _table(["slow heads in bfloat16", "state bytes against bfloat16", "error"], rows)


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table whose first two columns are labels."""
    lines = [header, [*["---"] * 2, *["---:"] * (len(header) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
