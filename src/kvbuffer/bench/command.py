"""The command ``kvbuffer bench``; torch is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbuffer.cli_options import Threads, parse_size

if TYPE_CHECKING:
    import torch

bench = typer.Typer(help="Measure the speed of this machine's kernels.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Keep ``ops`` a sub-command though it is the only one."""


@bench.command()
def ops(
    families: Annotated[str | None, typer.Option(help="Names, as in gated_deltanet,kda; default: all.")] = None,
    batch: Annotated[str | None, typer.Option(help="Requests per call; default: 1,8,32.")] = None,
    heads: Annotated[str, typer.Option(metavar="HKxHV", help="Key and value heads.")] = "16x32",
    dim: Annotated[str, typer.Option(metavar="KxV", help="Key and value dims.")] = "128x128",
    dtypes: Annotated[
        str | None,
        typer.Option(help="States and records, as in float32,bfloat16/float32,int8/bfloat16; default: all."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first impression in a minute or two.")] = False,
    working_set: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="States in use; default: twice the last-level cache."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write everything to this JSON file.")] = None,
) -> None:
    """Time the linear-attention operators beside what memory allows, with their errors.

    A form whose error against float64 is too large gets no speed. Whatever else runs on the machine slows it down.
    """
    import torch
    from rich.console import Console

    from kvbuffer.bench.ops import Settings, run
    from kvbuffer.bench.report import show

    if threads is not None:
        torch.set_num_threads(threads)
    given: dict[str, Any] = {"families": ("gated_deltanet",), "batches": (1, 8)} if quick else {}
    if families is not None:
        given["families"] = tuple(families.split(","))
    if batch is not None:
        given["batches"] = _integers(batch, ",", "--batch")
    if dtypes is not None:
        given["tiers"] = tuple(_tier(name) for name in dtypes.split(","))
    elif quick:
        given["tiers"] = tuple(_tier(name) for name in ("float32", "bfloat16"))
    settings = Settings(
        heads=_pair(heads, "--heads"),
        dim=_pair(dim, "--dim"),
        quick=quick,
        working_set=working_set,
        device=device,
        **given,
    )
    with Console(stderr=True).status("calibrating") as status:
        results = run(settings, lambda text: status.update(f"measuring {text}"))
    show(results)
    if out is not None:
        out.write_text(json.dumps(results.as_json(), indent=1) + "\n", encoding="utf-8")


def _integers(text: str, separator: str, option: str) -> tuple[int, ...]:
    parts = text.lower().split(separator)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(
            f"{text!r} is not positive numbers with {separator!r} between them.", param_hint=option
        )
    return tuple(map(int, parts))


def _pair(text: str, option: str) -> tuple[int, int]:
    numbers = _integers(text, "x", option)
    if len(numbers) != 2:
        raise typer.BadParameter(f"{text!r} is not two numbers, as in 16x32.", param_hint=option)
    return numbers[0], numbers[1]


def _tier(name: str) -> tuple[torch.dtype, torch.dtype]:
    import torch

    state, _, record = name.partition("/")
    states = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    records = {"": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if state not in states or record not in records:
        raise typer.BadParameter(
            f"{name!r} is not STATE or STATE/RECORD with STATE one of {', '.join(states)} "
            "and RECORD float32 or bfloat16.",
            param_hint="--dtypes",
        )
    return states[state], records[record]
