"""The lowest priority comes first, whatever happened to it since it was pushed."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kvbuffer.cache.prefix.eviction_queue import EvictionQueue


@dataclass(eq=False)
class Item:
    priority: float
    queued: bool = False
    alive: bool = True


def queue_of(items: list[Item]) -> EvictionQueue[Item]:
    queue = EvictionQueue[Item](lambda item: item.priority)
    for item in items:
        queue.push(item)
    return queue


@given(st.lists(st.integers(0, 5).map(float)))
def test_the_lowest_comes_first_and_the_oldest_of_equals(priorities: list[float]) -> None:
    items = [Item(priority) for priority in priorities]
    queue = queue_of(items)
    assert [queue.pop() for _ in items] == sorted(items, key=lambda item: item.priority)
    assert queue.pop() is None


def test_what_rises_moves_back() -> None:
    first, second, third = items = [Item(1.0), Item(2.0), Item(3.0)]
    queue = queue_of(items)
    first.priority = 2.5
    assert [queue.pop(), queue.pop(), queue.pop()] == [second, first, third]


def test_what_falls_is_noticed_before_long() -> None:
    items = [Item(float(i)) for i in range(50)]
    queue = queue_of(items)
    items[-1].priority = -1.0
    for _ in range(100):
        queue.push(Item(100.0))
    assert queue.pop() is items[-1]


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
