"""What a request takes when it is let in, and that it takes nothing if it is not."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import attention_pages, record_pages
from kvbuffer.cache.pools import MEMORY, Counts
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


@pytest.mark.parametrize(("other", "fits"), [(48, True), (49, False)])
def test_records_make_room_for_the_state_that_they_will_be_folded_into(other: int, fits: bool) -> None:
    # The first request lives on 32 records, 2 pages, until it needs a state: one of them will be free for that.
    sizes = plan(record_dtype=torch.bfloat16)
    each = sizes.block_bytes
    assert 0 < each.record_page < each.slot
    first = each.of(Counts(0, 2, 1, 2)) + each.slot - each.record_page
    second = each.of(Counts(1, 1, 1, 3))
    memory = RequestMemory(dataclasses.replace(sizes, budget=first + second))
    admit(memory, [1] * 32, max_len=100)
    assert (memory.admit([2] * other) == MEMORY) is not fits
