"""Prefixes to save, made up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvbuffer.cache.disk import DiskTier, Geometry, entry
from kvbuffer.cache.disk.entry import SUFFIX
from kvbuffer.cache.disk.tier import SUBFOLDER

MIB = 1 << 20
Open = Callable[..., DiskTier]


def geometry(start: int, end: int) -> Geometry:
    """Geometry of a prefix that can be cut back to ``start`` tokens."""
    checkpoint = start // 2
    return Geometry(start, end, checkpoint, checkpoint > 0, attention_pages=-(-end // 16), record_pages=1)


def content(seed: int, num_bytes: int) -> Tensor:
    """Bytes that differ from seed to seed."""
    return torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int, length: int = 40) -> list[int]:
    """A text that no other seed's text begins like."""
    return [seed, *range(length - 1)]


def save(tier: DiskTier, seed: int, num_bytes: int = 1000, salt: str | None = None) -> bool:
    """Save the prompt of ``seed`` with the content of ``seed``, and wait until it is on the disk."""
    accepted = tier.save(prompt(seed), salt, geometry(30, 40), content(seed, num_bytes))
    tier.flush()
    return accepted


def load(tier: DiskTier, seed: int, salt: str | None = None) -> Tensor | None:
    """What the tier has for the prompt of ``seed``."""
    match = tier.match(prompt(seed), salt, 40)
    return None if match is None else tier.load(match)


def files(folder: Path) -> list[Path]:
    """The entries in the test's folder."""
    return sorted((folder / SUBFOLDER).glob(f"*{SUFFIX}"))


def same(left: Tensor | None, right: Tensor) -> bool:
    return left is not None and torch.equal(left, right)


def break_disk(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let every write fail when it is to reach the disk."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(entry.os, "fsync", fail)
