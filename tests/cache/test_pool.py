"""A pool hands out numbers, each to one holder at a time."""

from __future__ import annotations

import pytest

from kvbuffer.cache.pool import BlockPool


def test_every_block_is_handed_out_once() -> None:
    pool = BlockPool(5, "pages")
    assert sorted(pool.take(2) + pool.take(0) + pool.take(3)) == [0, 1, 2, 3, 4]
    assert (pool.num_free, pool.num_used) == (0, 5)
    pool.check_integrity()


def test_blocks_given_back_are_handed_out_again() -> None:
    pool = BlockPool(2, "pages")
    blocks = pool.take(2)
    pool.give_back(blocks[:1])
    assert (pool.num_free, pool.num_used) == (1, 1)
    assert pool.take(1) == blocks[:1]
    pool.check_integrity()


def test_taking_more_than_is_free_takes_nothing() -> None:
    pool = BlockPool(3, "state slots")
    pool.take(2)
    with pytest.raises(RuntimeError, match="asked for 2 state slots, 1 of 3 are free"):
        pool.take(2)
    assert pool.num_free == 1
    pool.check_integrity()


@pytest.mark.parametrize("block", [1, 7])
def test_giving_back_what_is_not_in_use_is_an_error(block: int) -> None:
    pool = BlockPool(2, "pages")
    assert pool.take(1) == [0]
    with pytest.raises(RuntimeError, match=f"pages {block} given back but not in use"):
        pool.give_back([block])


def test_giving_back_twice_is_an_error() -> None:
    pool = BlockPool(2, "pages")
    blocks = pool.take(1)
    with pytest.raises(RuntimeError, match="not in use"):
        pool.give_back(blocks * 2)


def test_check_integrity_finds_a_lost_block() -> None:
    pool = BlockPool(2, "pages")
    pool.give_back(pool.take(1))
    pool._free.pop()
    with pytest.raises(RuntimeError, match="do not add up to 2"):
        pool.check_integrity()


def test_a_pool_may_be_empty() -> None:
    pool = BlockPool(0, "pages")
    assert pool.take(0) == []
    pool.check_integrity()


def test_a_shared_block_is_free_when_its_last_holder_gives_it_back() -> None:
    pool = BlockPool(1, "pages")
    blocks = pool.take(1)
    pool.share(blocks)
    assert pool.references(0) == 2
    pool.give_back(blocks)
    assert (pool.num_free, pool.references(0)) == (0, 1)
    pool.give_back(blocks)
    assert (pool.num_free, pool.references(0)) == (1, 0)
    pool.check_integrity()


@pytest.mark.parametrize("block", [0, 1])
def test_sharing_what_nobody_holds_is_an_error(block: int) -> None:
    pool = BlockPool(1, "pages")
    with pytest.raises(RuntimeError, match=f"pages {block} shared but not in use"):
        pool.share([block])


def test_blocks_that_only_the_cache_keeps_are_idle() -> None:
    pool = BlockPool(2, "pages")
    blocks = pool.take(2)
    pool.keep([0, 0, 1])
    assert (pool.num_idle, pool.references(0), pool.kept(0)) == (0, 3, 2)
    pool.give_back(blocks)
    assert (pool.num_idle, pool.num_free) == (2, 0)
    pool.share([0])
    assert (pool.num_idle, pool.is_idle(0), pool.is_idle(1)) == (1, False, True)
    pool.drop([0, 0, 1])
    assert (pool.num_idle, pool.num_free) == (0, 1)
    pool.give_back([0])
    assert pool.num_free == 2
    pool.check_integrity()


def test_the_caches_references_are_not_a_requests_to_give_back() -> None:
    pool = BlockPool(1, "pages")
    pool.keep(pool.take(1))
    pool.give_back([0])
    with pytest.raises(RuntimeError, match="pages 0 given back but not in use"):
        pool.give_back([0])


def test_dropping_or_keeping_what_is_not_there_is_an_error() -> None:
    pool = BlockPool(2, "pages")
    with pytest.raises(RuntimeError, match="pages 0 kept but not in use"):
        pool.keep([0])
    with pytest.raises(RuntimeError, match="pages 0 dropped but not kept"):
        pool.drop(pool.take(1))


def test_check_integrity_finds_a_wrong_count_of_idle_blocks() -> None:
    pool = BlockPool(2, "pages")
    pool._num_idle = 1
    with pytest.raises(RuntimeError, match="1 idle blocks counted, 0 found"):
        pool.check_integrity()


def test_free_blocks_with_memory_come_first_and_of_each_sort_the_lowest() -> None:
    pool = BlockPool(6, "pages")
    pool.take(4)
    pool.give_back([2, 0, 3])
    assert (pool.num_backed, pool.release(2)) == (4, [2, 3])
    assert (pool.num_backed, pool.num_free) == (2, 5)
    assert pool.take(5) == [0, 2, 3, 4, 5]
    assert (pool.num_backed, pool.num_free) == (6, 0)
    pool.check_integrity()


def test_only_free_blocks_are_released() -> None:
    pool = BlockPool(3, "pages")
    pool.take(2)
    pool.give_back([1])
    assert pool.release(3) == [1]
    assert pool.release(3) == []
    pool.check_integrity()


def test_a_large_pool_costs_what_is_used_of_it() -> None:
    pool = BlockPool(1 << 40, "pages")
    assert pool.take(2) == [0, 1]
    assert (pool.num_taken, pool.references(1 << 39)) == (2, 0)
    pool.check_integrity()
