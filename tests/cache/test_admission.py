"""What a request takes when it is let in, and that it takes nothing if it is not."""

from __future__ import annotations

import pytest

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import attention_pages, record_pages
from tests.support.memories import admit, plan


def test_a_short_prompt_takes_no_state() -> None:
    memory = RequestMemory(plan())
    row, cached = admit(memory, [1] * 40)
    assert (cached, memory.slot[row], memory.fill[row]) == (0, -1, 0)
    assert memory.pools.slots.num_used == 0
    assert memory.pools.record_pages.num_used == record_pages(40)
    assert memory.pools.attention_pages.num_used == attention_pages(40)


def test_a_longer_one_takes_a_state_and_room_for_its_last_tokens() -> None:
    memory = RequestMemory(plan())
    row, _ = admit(memory, [1] * 41)
    assert memory.slot[row] >= 0
    assert memory.pools.record_pages.num_used == 1
    assert memory.work == []


@pytest.mark.parametrize(
    ("tokens", "slots", "attention", "short"),
    [(41, 0, 8, "state slots"), (100, 4, 6, "attention pages"), (1, 4, 0, "attention pages")],
)
def test_without_memory_nothing_changes(tokens: int, slots: int, attention: int, short: str) -> None:
    memory = RequestMemory(plan(slots=4, pages=8))
    memory.pools.slots.take(4 - slots)
    memory.pools.attention_pages.take(8 - attention)
    before = [pool.num_free for pool in memory.pools[:4]]
    assert memory.admit([1] * tokens) == short
    assert [pool.num_free for pool in memory.pools[:4]] == before
    assert memory.rows.num_used == 0
