"""The options of a training run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvbuffer.errors import ConfigError
from kvbuffer.train import defaults
from kvbuffer.train.operators import Pairing

#: Options that say how a run is kept and shown, not what comes out of it: they may change when it is resumed.
PRESENTATION = ("out", "save_every", "tensorboard")


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how.

    Attributes:
        data: folder made by ``kvbuffer train prepare``.
        out: folder of the run; a run that was cut off there goes on.
        model: ``config.json`` (or its folder) of the model to train; vocabulary and special tokens are the data's.
        init: checkpoint folder whose weights the first stage begins with, grown where its model is larger.
        method: how to get there, see :func:`~kvbuffer.train.plan.make_plan`.
        steps: training steps from scratch; other methods get the same FLOPs.
        budget: FLOPs to spend, as a share of those of ``steps`` steps.
        batch_size: sequences per step, over all processes.
        seq_len: tokens per sequence.
        optimizer: ``muon`` (for matrices; AdamW for the rest) or ``adamw``.
        lr: peak learning rate, for both optimizers; Muon's updates are scaled to the size of AdamW's.
        weight_decay: of matrices and embeddings.
        warmup: steps of rising learning rate for new weights.
        rewarm: the same for weights that were trained before (coalesced, grown or interpolated).
        decay: share of the last stage's steps in which the learning rate falls to zero.
        small_decay: the same for stages of small models.
        clip: largest norm of the gradient.
        precision: ``float32``, or ``bfloat16`` for matrix products and the finished model (in training, weights stay
            in float32).
        seed: of weights and of the order of the data.
        alpha: share of the grown model in interpolation.
        first_share: first stage of the large model, as a share of ``steps``; E_a in the paper.
        small_share: stage of a small model, as a share of ``steps``; E_small in the paper.
        optimizer_state: ``reset``, or ``keep``: the large model takes up the moments that it had when it was coalesced.
        pairing: layers that are merged, ``adjacent`` blocks or ``stacked``.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations on held-out text.
        eval_sequences: how much held-out text that is, in sequences.
        tensorboard: also log for TensorBoard.

    Raises:
        ConfigError: a value is out of range.
    """

    data: Path
    out: Path
    model: Path
    init: Path | None = None
    method: str = defaults.METHOD
    steps: int = defaults.STEPS
    budget: float = 1.0
    batch_size: int = defaults.BATCH_SIZE
    seq_len: int = defaults.SEQ_LEN
    optimizer: str = defaults.OPTIMIZER
    lr: float = defaults.LR
    weight_decay: float = defaults.WEIGHT_DECAY
    warmup: int = defaults.WARMUP
    rewarm: int = defaults.REWARM
    decay: float = defaults.DECAY
    small_decay: float = 0.0
    clip: float = defaults.CLIP
    precision: str = "float32"
    seed: int = 0
    alpha: float = defaults.ALPHA
    first_share: float = defaults.FIRST_SHARE
    small_share: float = defaults.SMALL_SHARE
    optimizer_state: str = "reset"
    pairing: Pairing = "adjacent"
    save_every: int = defaults.SAVE_EVERY
    eval_every: int = defaults.EVAL_EVERY
    eval_sequences: int = defaults.EVAL_SEQUENCES
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "save_every", "eval_every", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("decay", "small_decay", "alpha", "first_share", "small_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "budget"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "rewarm", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, allowed in defaults.CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")

    def as_json(self) -> dict[str, Any]:
        """Return the options with paths as text."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def check_same(self, earlier: Mapping[str, Any]) -> None:
        """Check that a run with options ``earlier`` may go on with these.

        Raises:
            ConfigError: they differ in more than how the run is kept and shown.
        """
        now = {name: value for name, value in self.as_json().items() if name not in PRESENTATION}
        if changed := differences(earlier, now):
            raise ConfigError(f"{self.out} holds a run with other options: {changed}; give another folder")


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words which of the options ``now`` had other values ``earlier``; empty if none."""
    changed = [name for name, value in now.items() if earlier.get(name) != value]
    return ", ".join(f"{name} was {earlier.get(name)!r}, is {now[name]!r}" for name in changed)


def read_options(path: Path) -> dict[str, Any]:
    """Read the options of a run from a YAML file.

    Raises:
        ConfigError: it cannot be read, or has options that do not exist.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold options and their values, as in 'steps: 1000'")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"{path} has unknown options: {', '.join(unknown)}; see kvbuffer train run --help")
    return values
