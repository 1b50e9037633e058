"""How far the training of a part of a model has come, kept in a file beside its output until that is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvbuffer.errors import ConfigError
from kvbuffer.train.config import differences
from kvbuffer.train.optim import Optimizers


class Savepoint:
    """Lets a training that was cut off go on, with the same result as if it had not been.

    Args:
        out: what the training will write; the file is ``OUT.savepoint``.
        options: what the result depends on, as plain values; training goes on only with the same ones.
        part: what is trained.
        optimizers: of its parameters.
    """

    def __init__(self, out: Path, options: Mapping[str, Any], part: nn.Module, optimizers: Optimizers) -> None:
        self._path = out.with_name(out.name + ".savepoint")
        self._options = dict(options)
        self._part, self._optimizers = part, optimizers

    def resume(self) -> int:
        """Take up what is saved, random numbers too; return how many steps that was, 0 if nothing is.

        Raises:
            ConfigError: what is saved is of a training with other options.
        """
        if not self._path.exists():
            return 0
        saved = torch.load(self._path, weights_only=True)
        if changed := differences(saved["options"], self._options):
            raise ConfigError(f"{self._path} is of a training with other options: {changed}; remove it to start over")
        self._part.load_state_dict(saved["part"])
        self._optimizers.load(saved["optimizers"])
        torch.set_rng_state(saved["rng"])
        return int(saved["steps"])

    def save(self, steps: int) -> None:
        """Save the state after so many steps; a kill at any moment leaves this or what was saved before, whole."""
        partial = self._path.with_name(self._path.name + ".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "options": self._options,
            "steps": steps,
            "part": self._part.state_dict(),
            "optimizers": self._optimizers.state(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, partial)
        partial.replace(self._path)

    def remove(self) -> None:
        """Forget what was saved: the output is written."""
        self._path.unlink(missing_ok=True)
