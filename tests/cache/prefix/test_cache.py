"""What was computed for one text serves every text that begins the same, for as long as there is room."""

from __future__ import annotations

import pytest

from tests.support.prefixes import Bench, other

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
