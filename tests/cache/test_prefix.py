"""What was computed for one text serves every text that begins the same, for as long as there is room."""

from __future__ import annotations

import pytest
import torch

from kvbuffer.cache.prefix import PrefixCache, PrefixMatch
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.ops.attention import PAGE_SIZE
from tests.support.prefixes import Writer, make_pools

Evicted = tuple[list[int], str | None, tuple[int, ...], Snapshot]


class Bench:
    """A cache, its writer, its clock, and what eviction reported."""

    def __init__(self, **sizes: int) -> None:
        self.pools, self.now, self.evicted = make_pools(**sizes), 0.0, list[Evicted]()
        self.cache = PrefixCache(self.pools, on_evict=self.note, clock=lambda: self.now, pin_share=0.5)
        self.writer = Writer(self.pools, self.cache)

    def note(self, *lost: object) -> None:
        tokens, _, pages, _ = lost
        assert self.writer.page_texts[pages[-1]][: len(tokens)] == tokens
        assert all(self.pools.attention_pages.references(page) for page in pages)
        self.evicted.append(lost)

    def match(self, text: list[int], salt: str | None = None) -> PrefixMatch:
        match = self.cache.match(text, salt, len(text))
        self.writer.check(match, text)
        self.cache.check_integrity()
        return match

    def hit(self, text: list[int], salt: str | None = None) -> tuple[int, int]:
        match = self.match(text, salt)
        return match.num_tokens, match.branch


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def text(rng: torch.Generator) -> list[int]:
    return torch.randint(0, 1000, (200,), generator=rng).tolist()


def other(text: list[int], position: int) -> list[int]:
    """The same text with another token at ``position``, and others after it."""
    return [*text[:position], *(token + 1000 for token in text[position:])]


# Lookup


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 50])
def test_a_text_is_found_where_its_snapshot_ends_inside_a_page_or_not(
    bench: Bench, text: list[int], length: int
) -> None:
    bench.writer.publish(text[:length])
    assert bench.hit(text) == (length, length)


def test_nothing_is_found_in_an_empty_cache_or_for_another_text(bench: Bench, text: list[int]) -> None:
    assert bench.hit(text) == (0, 0)
    bench.writer.publish(text[:50])
    assert bench.hit(other(text, 0)) == (0, 0)


def test_pages_without_a_snapshot_tell_only_where_texts_branch(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:50], window=None)
    assert bench.hit(other(text, 40)) == (0, 40)


def test_no_more_than_asked_for_is_returned(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:20])
    bench.writer.publish(text[:40], window=5)
    for most, expected in ((200, 40), (39, 39), (35, 35), (34, 20), (20, 20), (19, 0), (0, 0)):
        match = bench.cache.match(text, None, most)
        bench.writer.check(match, text)
        assert (match.num_tokens, match.branch) == (expected, min(most, 40))


@pytest.mark.parametrize("branch", range(28, 36))
def test_a_snapshot_beyond_the_branch_serves_when_it_can_be_taken_back_that_far(
    bench: Bench, text: list[int], branch: int
) -> None:
    bench.writer.publish(text[:35], window=5)
    assert bench.hit(other(text, branch)) == (branch if branch >= 30 else 0, branch)


def test_a_window_may_reach_over_many_pages(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:100], window=100, with_slot=False)
    for branch in (1, 15, 16, 17, 64, 99):
        assert bench.hit(other(text, branch)) == (branch, branch)


def test_the_best_snapshot_may_be_in_another_branch_than_the_best_pages(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(other(text, 40)[:46], window=8)  # can be taken back to 38
    bench.writer.publish(text[:48], window=None)
    assert bench.hit(text[:47]) == (40, 47)


def test_the_longest_of_several_snapshots_is_used(bench: Bench, text: list[int]) -> None:
    for length in (10, 20, 90, 33):
        bench.writer.publish(text[:length])
    assert [bench.hit(text[:length])[0] for length in (9, 10, 32, 33, 89, 200)] == [0, 10, 20, 33, 33, 90]


def test_salts_share_nothing(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:50], salt="one")
    bench.writer.publish(text[:20], salt="other")
    assert [bench.hit(text, salt) for salt in ("one", "other", None)] == [(50, 50), (20, 20), (0, 0)]


# Insertion


def test_pages_that_are_cached_are_not_stored_again(bench: Bench, text: list[int]) -> None:
    first = bench.writer.publish(text[:40])
    second = bench.writer.publish(text[:70])
    # The first two pages are the first writer's; its partial page gave way to the second writer's full one.
    assert bench.match(text).attention_pages == first.attention_pages[:2] + second.attention_pages[2:4]
    assert bench.pools.attention_pages.num_used == 5
    assert bench.hit(other(text, 41)) == (40, 41)


def test_a_partial_page_stays_when_a_shorter_one_comes(bench: Bench, text: list[int]) -> None:
    first = bench.writer.publish(text[:30])
    bench.writer.publish(text[:20])
    assert bench.match(text[:20]).partial_page == first.attention_pages[1]
    assert bench.pools.attention_pages.num_used == 2


def test_a_writer_goes_on_in_the_partial_page_it_published(bench: Bench, text: list[int]) -> None:
    blocks = bench.writer.compute(text[:30], window=None)
    bench.cache.insert(text[:20], None, blocks.attention_pages, None)
    bench.cache.insert(text[:30], None, blocks.attention_pages, None)
    assert bench.hit(text) == (0, 30)
    bench.pools.give_back(blocks)
    bench.cache.check_integrity()
    assert bench.pools.attention_pages.num_used == 2


def test_of_snapshots_with_one_end_the_one_that_can_be_taken_back_further_is_kept(
    bench: Bench, text: list[int]
) -> None:
    bench.writer.publish(text[:40], window=3)
    bench.writer.publish(text[:40], window=2)
    assert bench.match(text[:38]).num_tokens == 38
    assert bench.pools.slots.num_used == 1
    bench.writer.publish(text[:40], window=9)
    assert bench.match(text[:31]).num_tokens == 31
    assert bench.pools.slots.num_used == 1
    assert bench.cache.counters.inserted_snapshots == 2


@pytest.mark.parametrize("pages", [1, 3])
def test_pages_must_be_those_of_the_tokens(bench: Bench, text: list[int], pages: int) -> None:
    with pytest.raises(RuntimeError, match="attention pages are not those of 20 tokens"):
        bench.cache.insert(text[:20], None, bench.pools.attention_pages.take(pages), None)


def test_a_snapshot_must_be_of_the_tokens(bench: Bench, text: list[int]) -> None:
    snapshot = bench.writer.snapshot(text[:19])
    with pytest.raises(RuntimeError, match="the memory of 20 tokens"):
        bench.cache.insert(text[:20], None, bench.pools.attention_pages.take(2), snapshot)


# References


def test_what_is_acquired_outlives_its_eviction(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:40])
    match = bench.match(text)
    bench.cache.acquire(match)
    assert [bench.cache.num_evictable(kind) for kind in ("slots", "attention_pages")] == [0, 0]
    assert bench.cache.evict("attention_pages", 3) == bench.cache.evict("slots", 1) == 0
    bench.cache.clear()
    assert bench.writer.in_use() == [1, 1, 1, 3]
    bench.pools.give_back(match.blocks)
    assert bench.writer.in_use() == [0, 0, 0, 0]


def test_clearing_gives_everything_back(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:40], salt="one")
    bench.writer.publish(other(text, 20)[:90], salt="one")
    bench.writer.publish(text[:16])
    bench.cache.pin(text[:40], "one", until=1e9)
    bench.cache.clear()
    assert bench.writer.in_use() == [0, 0, 0, 0]
    assert bench.hit(text, "one") == (0, 0)


def test_counters_count_requests_that_start(bench: Bench, text: list[int]) -> None:
    bench.writer.publish(text[:40])
    for query in (text[:50], text[:41], other(text, 0)):
        match = bench.cache.match(query, None, len(query) - 1)
        bench.cache.match(query, None, len(query) - 1)  # waiting requests may be looked up more than once
        bench.cache.acquire(match)
    counters = bench.cache.counters
    assert (counters.queries, counters.query_tokens, counters.hits, counters.hit_tokens) == (3, 291, 2, 80)


# Eviction


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


# Pins


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
