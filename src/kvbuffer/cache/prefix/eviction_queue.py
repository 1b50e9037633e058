"""Items in the order of their priority, which may change at any time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Evictable(Protocol):
    """Something an eviction queue can hold; see :class:`EvictionQueue`."""

    queued: bool
    alive: bool


T = TypeVar("T", bound=Evictable)


class EvictionQueue(Generic[T]):
    """Items in the order of their priority, lowest first.

    Priorities change while items are in the heap, and nothing is moved or searched when they do. A priority is worked
    out again when its item comes up, and an item that has risen goes back; from time to time, all are.

    Args:
        priority: of an item, as things stand.
    """

    def __init__(self, priority: Callable[[T], float]) -> None:
        self._priority = priority
        self._heap: list[tuple[float, int, T]] = []
        self._serial = 0  # breaks ties: first in, first out
        self._pushed = 0  # since the heap was last put in order

    def push(self, item: T) -> None:
        """Add ``item``, unless it is there."""
        if not item.queued:
            item.queued = True
            self._push(item)
            self._pushed += 1
            if self._pushed > len(self._heap) // 2 + 32:
                self._reorder()

    def pop(self) -> T | None:
        """Take out the item to give up first; None when there is none."""
        if self.lowest() == math.inf:
            return None
        _, _, item = heapq.heappop(self._heap)
        item.queued = False
        return item

    def lowest(self) -> float:
        """Return the priority of the item to give up first; infinity when there is none."""
        while self._heap:
            priority, _, item = self._heap[0]
            if item.alive and self._priority(item) <= priority:
                return priority
            heapq.heappop(self._heap)
            if item.alive:
                self._push(item)
            else:
                item.queued = False
        return math.inf

    def _push(self, item: T) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (self._priority(item), self._serial, item))

    def _reorder(self) -> None:
        self._heap = [(self._priority(item), serial, item) for _, serial, item in self._heap if item.alive]
        heapq.heapify(self._heap)
        self._pushed = 0
