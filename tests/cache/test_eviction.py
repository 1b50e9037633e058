"""The eviction queue gives up what saves least for its age, whatever happened to its items since they went in."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kvbuffer.cache.eviction import EvictionQueue


@dataclass(eq=False)
class Item:
    value: float
    recency: float = 0.0
    queued: bool = False
    alive: bool = True


def queue_of(items: list[Item]) -> EvictionQueue[Item]:
    queue = EvictionQueue[Item](lambda item: item.value)
    for item in items:
        queue.push(item)
    return queue


@given(st.lists(st.integers(0, 5).map(float)))
def test_the_least_valuable_comes_first_and_the_oldest_of_equals(values: list[float]) -> None:
    items = [Item(value) for value in values]
    queue = queue_of(items)
    assert [queue.pop() for _ in items] == sorted(items, key=lambda item: item.value)
    assert queue.pop() is None


def test_what_is_used_or_gains_in_value_moves_back() -> None:
    first, second, third, fourth = items = [Item(1.0), Item(2.0), Item(3.0), Item(4.5)]
    queue = queue_of(items)
    assert queue.pop() is first
    second.value = 3.5
    queue.touch(third)  # the clock stands at 1: 1 + 3
    assert [queue.pop(), queue.pop(), queue.pop()] == [second, third, fourth]


def test_the_valuable_age_too() -> None:
    valuable = Item(5.0)
    queue = queue_of([valuable])
    for _ in range(10):
        cheap = Item(1.0)
        queue.touch(cheap)
        queue.push(cheap)
        if queue.pop() is valuable:
            return
    raise AssertionError("never given up")


def test_an_item_is_in_the_queue_once() -> None:
    item = Item(1.0)
    queue = queue_of([item, item])
    queue.push(item)
    assert (queue.pop(), item.queued, queue.pop()) == (item, False, None)


def test_the_dead_are_passed_over_and_forgotten() -> None:
    queue = queue_of([])
    for _ in range(1000):
        item = Item(1.0)
        queue.push(item)
        item.alive = False
    assert len(queue._heap) < 200
    assert queue.pop() is None
