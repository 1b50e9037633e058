"""The command ``kvbuffer train``; torch and transformers are imported when a sub-command runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

train = typer.Typer(help="Train models, and grow and shrink their checkpoints.", no_args_is_help=True)


class PairingOption(StrEnum):
    """Which layers are merged."""

    ADJACENT = "adjacent"
    STACKED = "stacked"


CheckpointIn = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Checkpoint folder.")]
CheckpointOut = Annotated[Path, typer.Argument(help="Folder to write; must not exist.")]
Pairing = Annotated[
    PairingOption,
    typer.Option(help="Merge neighbouring blocks of layers, or layer i with i + L/2."),
]


@train.command()
def coalesce(
    source: CheckpointIn,
    out: CheckpointOut,
    width: Annotated[int, typer.Option(min=1, help="Factor by which widths shrink; heads are merged whole.")] = 2,
    depth: Annotated[int, typer.Option(min=1, help="Factor by which layers shrink, in whole blocks.")] = 2,
    pairing: Pairing = PairingOption.ADJACENT,
) -> None:
    """Shrink a checkpoint: average its units and layers."""
    from kvbuffer.train.checkpoints import coalesce_files

    coalesce_files(source, out, width, depth, pairing.value)


@train.command()
def decoalesce(
    source: CheckpointIn,
    out: CheckpointOut,
    like: Annotated[Path, typer.Option(exists=True, help="Checkpoint, or config.json, whose shape OUT gets.")],
    pairing: Pairing = PairingOption.ADJACENT,
) -> None:
    """Grow a checkpoint; in width it goes on computing the same function."""
    from kvbuffer.train.checkpoints import decoalesce_files

    decoalesce_files(source, like, out, pairing.value)


@train.command()
def interpolate(
    large: CheckpointIn,
    grown: CheckpointIn,
    out: CheckpointOut,
    alpha: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the second checkpoint.")] = 0.25,
) -> None:
    """Mix two checkpoints of one shape: (1 - ALPHA) * LARGE + ALPHA * GROWN."""
    from kvbuffer.train.checkpoints import interpolate_files

    interpolate_files(large, grown, out, alpha)
