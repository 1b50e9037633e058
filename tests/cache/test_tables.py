"""Every block that is held is named by just those who hold it."""

from __future__ import annotations

import pytest

from kvbuffer.cache.memory import RequestMemory
from tests.support.memories import admit, plan


@pytest.mark.parametrize("pool", range(4))
def test_check_integrity_finds_a_lost_block(pool: int) -> None:
    memory = RequestMemory(plan())
    admit(memory, [1] * 60)
    memory.pools[pool].take(1)
    with pytest.raises(RuntimeError, match="not held by just the requests"):
        memory.check_integrity()
