"""One small layer, and a cost file of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvbuffer.bench.accuracy import sample_error
from kvbuffer.ops import calibration
from kvbuffer.ops.cost import LayerShape
from kvbuffer.ops.rule import GATED_DELTANET

SMALL = LayerShape(GATED_DELTANET, 1, 2, 16, 32)


@pytest.fixture
def own_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep costs in a folder of the test's own, and measure them with little patience."""
    monkeypatch.setattr(calibration, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(calibration, "_BUDGET_S", 0.0)
    monkeypatch.setattr(calibration, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(calibration, "last_level_cache", lambda device="cpu": 2**16)
    calibration._costs.cache_clear()
    return tmp_path


@pytest.fixture(autouse=True)
def fresh_samples() -> None:
    """Errors are remembered per form and shape; a test that breaks a kernel must not leave its own behind."""
    sample_error.cache_clear()
    torch.manual_seed(0)
