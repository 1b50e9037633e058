"""Requests get what is free, and what cached prefixes can give up; what others hold they do not get."""

from __future__ import annotations

import pytest

from kvbuffer.cache.allocator import BlockAllocator
from kvbuffer.cache.pools import MEMORY, Counts
from tests.support.prefixes import Bench, make_pools


def cached() -> tuple[Bench, BlockAllocator]:
    """Pools of 4 pages and 2 slots, of which cached prefixes hold 3 pages and a slot."""
    bench = Bench(slots=2, pages=4)
    bench.writer.publish(list(range(40)))
    return bench, BlockAllocator(bench.pools, bench.cache)


def test_cached_prefixes_give_up_what_is_wanted() -> None:
    bench, allocator = cached()
    assert allocator.can_take(attention_pages=4)
    assert sorted(allocator.take("attention_pages", 4)) == [0, 1, 2, 3]
    assert bench.pools.attention_pages.num_idle == 0


def test_prefixes_make_room_for_other_kinds_in_the_common_budget() -> None:
    pools = make_pools(budget=2000)  # a slot is 1000, a page 200
    bench = Bench(pools=pools)
    bench.writer.publish(list(range(40)))
    allocator = BlockAllocator(pools, bench.cache)
    assert allocator.shortage(Counts(slots=3)) == MEMORY
    allocator.take("slots", 2)
    assert pools.free_bytes == 0


@pytest.mark.parametrize(("kind", "count"), [("attention_pages", 5), ("slots", 3)])
def test_of_all_kinds_or_none(kind: str, count: int) -> None:
    bench, allocator = cached()
    before = bench.writer.in_use()
    assert allocator.take_all(Counts(rings=1)._replace(**{kind: count})) is None
    assert bench.writer.in_use() == before
    taken = allocator.take_all(Counts(1, 1, 1, 1))
    assert taken is not None
    assert [len(blocks) for blocks in taken] == [1, 1, 1, 1]


def test_what_is_pinned_and_held_by_no_request_is_not_in_use() -> None:
    bench, text = Bench(), list(range(40))
    bench.writer.publish(text)
    allocator = BlockAllocator(bench.pools, bench.cache)
    assert bench.cache.pin(text, None, until=10.0)
    assert allocator.num_in_use("attention_pages") == 0
    match = bench.match(text)
    bench.cache.acquire(match)
    assert allocator.num_in_use("attention_pages") == 3
    assert allocator.num_holders("slots", match.blocks.slots[0]) == 2
