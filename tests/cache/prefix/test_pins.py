"""What is pinned stays until its time, within bounds."""

from __future__ import annotations

from kvbuffer.ops.attention import PAGE_SIZE
from tests.support.prefixes import Bench, other


def test_a_pinned_text_stays_until_its_time(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:40], window=5)
    bench.writer.publish(other(text, 0)[:40])
    assert bench.cache.pin(text[:38], None, until=10.0)
    assert bench.cache.num_evictable("attention_pages") == 3
    assert bench.cache.evict("attention_pages", 3) == 3
    assert bench.cache.num_evictable("slots") == 0
    assert bench.hit(text) == (40, 40)
    bench.now = 10.0
    assert bench.cache.num_evictable("attention_pages") == 3
    assert bench.cache.evict("slots", 8) == 1


def test_only_what_is_cached_can_be_pinned(bench: Bench, text: list[int]) -> None:
    assert not bench.cache.pin(text[:40], None, until=10.0)
    bench.writer.publish(text[:40], window=None)
    assert not bench.cache.pin(text[:40], None, until=10.0)


def test_the_oldest_pins_make_room(text: list[int]) -> None:
    bench = Bench(slots=8)
    texts = [other(text, i)[:20] for i in range(6)]
    for one in texts[:5]:
        bench.writer.publish(one)
        assert bench.cache.pin(one, None, until=10.0)
    assert bench.cache.num_evictable("slots") == 1  # half of eight are pinned
    assert bench.cache.evict("slots", 1) == 1
    assert [bench.match(one).num_tokens == 20 for one in texts[:5]] == [False, True, True, True, True]


def test_what_is_larger_than_the_share_is_not_pinned(text: list[int]) -> None:
    bench = Bench(pages=16)
    bench.writer.publish(text[: 9 * PAGE_SIZE])
    assert not bench.cache.pin(text[: 9 * PAGE_SIZE], None, until=10.0)
    assert bench.cache.num_evictable("slots") == 1


def test_a_later_part_of_a_conversation_takes_over_the_pin(bench: Bench, text: list[int]) -> None:
    for length in (20, 40, 60):
        bench.writer.publish(text[:length])
        bench.cache.pin(text[:length], None, until=10.0)
    assert bench.cache.num_evictable("slots") == bench.cache.evict("slots", 2) == 2
    assert bench.hit(text) == (60, 60)


def test_pinned_texts_that_share_a_beginning_count_it_once(text: list[int]) -> None:
    bench = Bench(pages=32)
    texts = [other(text, 14 * PAGE_SIZE - 100 + i)[: 14 * PAGE_SIZE - 90] for i in range(3)]
    for one in texts:
        bench.writer.publish(one)
        assert bench.cache.pin(one, None, until=10.0)
    assert bench.cache.num_evictable("slots") == 0
