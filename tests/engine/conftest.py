"""A tiny checkpoint that the engine's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvbuffer.engine.engine import Engine
from tests.support.checkpoints import make_checkpoint
from tests.support.plans import check_idle, sized_engine


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One linear-attention layer, one full-attention layer, random weights; not to be written to."""
    layers = ["linear_attention", "full_attention"]
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3_5", num_hidden_layers=2, layer_types=layers)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Waking a second thread costs more than a tiny model's whole step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared(tiny: Path) -> Engine:
    """One engine for all tests that leave it idle; its memory is used again and again."""
    return sized_engine(tiny, max_model_len=128)


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    for request_id in list(shared._requests):
        shared.abort_request(request_id)
    check_idle(shared)
