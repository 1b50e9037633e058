"""The training data of an instruction predictor."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kvbuffer.errors import ConfigError
from kvbuffer.instcache.logs import read_log, selected


class Counts(NamedTuple):
    """How many instructions were asked, and went where."""

    asked: int
    train: int
    held_out: int


def prepare(log: Path, folder: Path, held_out: float = 0.05, min_users: int = 1, unique: bool = False) -> Counts:
    """Write ``train.jsonl`` and ``held-out.jsonl``: one conversation of one user's message per line.

    A model trained on these, with the loss on the user's message, is a predictor. The held-out part is the end of the
    log, as what is to be predicted comes later; it is not selected, as those who will ask are not, either.

    Args:
        log: as :func:`~kvbuffer.instcache.logs.read_log` takes it.
        folder: for the two files; made if it is not there.
        held_out: share of the log.
        min_users: only instructions that so many different users asked are trained on.
        unique: train on each instruction once.

    Raises:
        ConfigError: the log cannot be read, or nothing is left to train on.
    """
    asked = sum(1 for _ in read_log(log))
    border = asked - int(held_out * asked)
    folder.mkdir(parents=True, exist_ok=True)
    train = _write(folder / "train.jsonl", selected(itertools.islice(read_log(log), border), min_users, unique))
    if not train:
        raise ConfigError(f"nothing in {log} was asked by {min_users} users: lower --min-users")
    kept = _write(
        folder / "held-out.jsonl", (logged.instruction for logged in itertools.islice(read_log(log), border, None))
    )
    return Counts(asked, train, kept)


def _write(path: Path, instructions: Iterable[str]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for text in instructions:
            file.write(json.dumps({"messages": [{"role": "user", "content": text}]}, ensure_ascii=False) + "\n")
            count += 1
    return count
