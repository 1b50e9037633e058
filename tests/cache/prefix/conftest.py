"""A cache with its writer, and a text."""

from __future__ import annotations

import pytest
import torch

from tests.support.prefixes import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def text(rng: torch.Generator) -> list[int]:
    return torch.randint(0, 1000, (200,), generator=rng).tolist()
