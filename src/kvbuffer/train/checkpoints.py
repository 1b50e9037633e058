"""Hugging Face checkpoint folders as config and parameters, read whole and written in one move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from kvbuffer.errors import ConfigError, ModelError
from kvbuffer.train.operators import LevelMap, Pairing, Parameters, coalesced_config, interpolate

#: What a tokenizer and a model's defaults are made of: copied from checkpoint to checkpoint.
COMPANIONS = (
    "tokenizer*", "*.jinja", "generation_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "*.model",
)  # fmt: skip


class Checkpoint(NamedTuple):
    """``config.json`` and the parameters under their names in the files."""

    config: dict[str, Any]
    parameters: Parameters


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json``, given it or its folder.

    Raises:
        ModelError: there is none, or it holds no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold a JSON object, got {type(config).__name__}")
    return config


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder, sharded or not.

    Raises:
        ModelError: config or weights are missing or broken.
    """
    config = read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no .safetensors files in {folder}")
    parameters: Parameters = {}
    for file in files:
        try:
            parameters |= load_file(file)
        except Exception as error:  # safetensors raises its own error, and OSError, and more
            raise ModelError(f"cannot read {file}: {error}") from None
    return Checkpoint(config, parameters)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, companions: Path) -> None:
    """Write a checkpoint folder, with tokenizer and defaults from ``companions``.

    Raises:
        ConfigError: ``folder`` exists.
    """
    with new_folder(folder) as partial:
        (partial / "config.json").write_text(json.dumps(checkpoint.config, indent=2) + "\n", encoding="utf-8")
        save_torch_state_dict(checkpoint.parameters, partial)
        copy_companions(companions, partial)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation defaults."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder that becomes ``folder`` at the end, whole; on an error nothing is left.

    Raises:
        ConfigError: ``folder`` exists.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists already; remove it or give another folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def coalesce_files(source: Path, out: Path, width: int, depth: int, pairing: Pairing) -> None:
    """Write the small model of checkpoint ``source``; see :meth:`LevelMap.coalesce`."""
    large = read_checkpoint(source)
    config = coalesced_config(large.config, width, depth)
    small = LevelMap(large.config, config, pairing).coalesce(large.parameters)
    write_checkpoint(out, Checkpoint(config, small), source)


def decoalesce_files(source: Path, like: Path, out: Path, pairing: Pairing) -> None:
    """Write checkpoint ``source`` grown to the shape of ``like``; see :meth:`LevelMap.decoalesce`."""
    small, config = read_checkpoint(source), read_config(like)
    large = LevelMap(config, small.config, pairing).decoalesce(small.parameters)
    write_checkpoint(out, Checkpoint(config, large), source)


def interpolate_files(source: Path, grown: Path, out: Path, alpha: float) -> None:
    """Write the mean of two checkpoints; see :func:`~kvbuffer.train.operators.interpolate`."""
    large = read_checkpoint(source)
    mixed = interpolate(large.parameters, read_checkpoint(grown).parameters, alpha)
    write_checkpoint(out, Checkpoint(large.config, mixed), source)
