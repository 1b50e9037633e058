"""Shared fixtures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

# Triton's kernels run interpreted, on the CPU. Triton reads this when it is first imported, by whichever test.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from kvbuffer.ops import dispatch

# The models here are tiny: a second thread saves nothing, and on a busy machine waiting for it costs whole time slices.
torch.set_num_threads(1)


@pytest.fixture(params=["cpu", "portable"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the compiled kernels and on portable PyTorch."""
    if request.param == "portable":
        monkeypatch.setattr(dispatch, "cpu_kernels", lambda: None)
    elif dispatch.cpu_kernels() is None:
        pytest.skip(dispatch.explain())
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """A setter of the number of threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded by the test's own name: fresh inputs per test, the same on every run."""
    return torch.Generator().manual_seed(hash_name(request.node.name))


def hash_name(name: str) -> int:
    """Return a small stable hash (Python's own differs from run to run)."""
    return int.from_bytes(name.encode(), "big") % (2**31 - 1)
