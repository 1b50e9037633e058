"""A tier in the test's folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbuffer.cache.disk import DiskTier
from tests.cache.disk.saved import MIB, Open


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    """Opens the tier in the test's folder; the one opened before is closed."""
    tiers: list[DiskTier] = []

    def reopen(max_bytes: int = MIB, fingerprint: str = "model", queue_bytes: int = MIB) -> DiskTier:
        for one in tiers:
            one.close()
        tiers.append(DiskTier(tmp_path, max_bytes, fingerprint, queue_bytes))
        return tiers[-1]

    yield reopen
    for one in tiers:
        one.close()
