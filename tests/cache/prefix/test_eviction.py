"""What saves least is given up first; what is in use is not; pages go from the ends of texts inward."""

from __future__ import annotations

import pytest

from kvbuffer.cache.snapshot import Snapshot
from tests.support.prefixes import Bench, other


def test_pages_go_from_the_end_inward_and_snapshots_with_them(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:32])
    bench.writer.publish(text[:60])
    assert bench.cache.num_evictable("attention_pages") == 4
    assert bench.cache.evict("attention_pages", 1) == 1
    assert bench.hit(text) == (32, 48)
    assert [len(tokens) for tokens, *_ in bench.evicted] == [60]
    assert bench.cache.evict("attention_pages", 2) == 2
    assert bench.hit(text) == (0, 16)
    assert bench.cache.evict("attention_pages", 5) == 1
    assert bench.writer.in_use() == [0, 0, 0, 0]
    assert bench.cache.counters.evicted == {"slots": 2, "record_pages": 2, "rings": 2, "attention_pages": 4}


def test_what_is_evicted_is_offered_first(bench: Bench, text: list[int]) -> None:
    blocks = bench.writer.publish(text[:40], window=3, salt="one")
    bench.cache.evict("slots", 1)
    ((tokens, salt, pages, snapshot),) = bench.evicted
    assert (tokens, salt, pages) == (text[:40], "one", blocks.attention_pages)
    assert (snapshot.start, snapshot.end, (snapshot.slot,)) == (37, 40, blocks.slots)


def test_evicting_slots_leaves_the_pages(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:40])
    assert bench.cache.evict("slots", 1) == 1
    assert bench.hit(text) == (0, 40)


def test_snapshots_without_what_is_short_are_left(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:20], with_slot=False)
    bench.writer.publish(text[:180])
    assert bench.cache.num_evictable("slots") == 1
    assert bench.cache.evict("slots", 2) == 1
    assert bench.hit(text) == (20, 180)


def test_pins_give_way_when_nothing_else_is_left(bench: Bench, text: list[int]) -> None:
    texts = [[token + 1000 * i for token in text[:64]] for i in range(3)]
    for one in texts:
        bench.writer.publish(one)
    for one in texts[:2]:
        assert bench.cache.pin(one, None, until=10.0)
    assert bench.cache.num_evictable("slots") == 1
    assert bench.cache.evict("slots", 2) == 2
    assert [tokens for tokens, *_ in bench.evicted] == [texts[2], texts[0]]


@pytest.mark.parametrize("kind", ["slots", "record_pages", "rings"])
def test_blocks_that_snapshots_share_are_free_when_all_of_them_are_gone(
    bench: Bench, text: list[int], kind: str
) -> None:
    blocks = bench.writer.compute(text[:44], window=4)
    pages, slot, ring = blocks.attention_pages, blocks.slots[0], blocks.rings[0]
    for end in (42, 44):
        bench.cache.insert(text[:end], None, pages, Snapshot(40, end, 40, slot, blocks.record_pages, ring))
    assert bench.cache.num_evictable(kind) == 0
    bench.pools.give_back(blocks)
    assert bench.cache.num_evictable(kind) == 1
    assert bench.cache.evict(kind, 1) == 1
    assert bench.hit(text) == (0, 44)


def test_what_was_not_used_for_longest_goes_first(bench: Bench, text: list[int]) -> None:
    texts = [[token + 1000 * i for token in text[:64]] for i in range(4)]
    for one in texts:
        bench.writer.publish(one)
        bench.cache.acquire(bench.match([-1]))  # time passes as requests start
    bench.match(texts[0])
    bench.cache.evict("slots", 3)
    assert [tokens for tokens, *_ in bench.evicted] == texts[1:]


def test_what_saves_little_per_byte_goes_first(bench: Bench, text: list[int]) -> None:
    short, long = text[:20], other(text, 0)[:150]
    bench.writer.publish(long)
    bench.writer.publish(short)
    bench.cache.evict("slots", 1)
    assert (bench.hit(short)[0], bench.hit(long)[0]) == (0, 150)


def test_a_snapshot_saves_what_the_one_before_does_not(bench: Bench, text: list[int]) -> None:
    for length in (100, 110, 190):
        bench.writer.publish(text[:length])
    bench.cache.evict("slots", 1)
    assert [bench.match(text[:length]).num_tokens for length in (100, 110, 190)] == [100, 100, 190]


def test_idle_pages_before_pages_in_use_can_be_evicted(bench: Bench, text: list[int]) -> None:
    # Two requests computed the same 32 tokens at once; the first is done, the second is not.
    bench.writer.publish(text[:32])
    running = bench.writer.compute(text[:60])
    bench.cache.insert(text[:60], None, running.attention_pages, None)
    assert bench.cache.num_evictable("attention_pages") == 2
    assert bench.cache.evict("attention_pages", 1) == 1
    assert bench.hit(text) == (0, 16)
    assert bench.cache.evict("attention_pages", 1) == 1
    bench.pools.give_back(running)
    assert bench.writer.in_use() == [0, 0, 0, 0]
