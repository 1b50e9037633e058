"""What to give up first: GreedyDual by compute saved per byte, in a lazy heap."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from kvbuffer.cache.pools import Pools, blocks_of
from kvbuffer.cache.prefix_tree import Node, StoredSnapshot, previous_end
from kvbuffer.ops.attention import PAGE_SIZE


class Evictable(Protocol):
    """Something an eviction queue can hold; see :class:`EvictionQueue`."""

    recency: float
    queued: bool
    alive: bool


T = TypeVar("T", bound=Evictable)


class EvictionQueue(Generic[T]):
    """Items in the order of ``recency + value``, lowest first.

    The clock is the priority of what was given up last, and an item's recency is the clock at its last use: what was
    used a while ago must be worth more per byte than what was used just now, the more so the more has been given up
    since (GreedyDual-Size; Marconi, arXiv 2411.19379, weighs recency against compute saved per byte likewise).

    Items change in the heap unseen. A priority is worked out again when its item comes up, so an item that was used
    or has gained in value goes back; nothing is searched or moved before that.

    Args:
        value: compute saved per byte of an item, as things stand.
    """

    def __init__(self, value: Callable[[T], float]) -> None:
        self._value = value
        self._heap: list[tuple[float, int, T]] = []
        self._clock = 0.0
        self._serial = 0  # breaks ties: first in, first out
        self._pushed = 0  # since the heap was last cleaned

    def touch(self, item: T) -> None:
        """Note that ``item`` has been used."""
        item.recency = self._clock

    def push(self, item: T) -> None:
        """Add ``item``, unless it is there."""
        if not item.queued:
            item.queued = True
            self._push(item)
            self._pushed += 1
            if 2 * self._pushed > len(self._heap) + 64:
                self._forget_the_dead()

    def pop(self) -> T | None:
        """Take out the item to give up first; None when there is none."""
        while self._heap:
            priority, _, item = heapq.heappop(self._heap)
            if item.alive and item.recency + self._value(item) > priority:
                self._push(item)
                continue
            item.queued = False
            if item.alive:
                self._clock = max(self._clock, priority)
                return item
        return None

    def _push(self, item: T) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (item.recency + self._value(item), self._serial, item))

    def _forget_the_dead(self) -> None:
        """Keep the heap from growing when items leave the tree by other ways than this queue."""
        self._heap = [entry for entry in self._heap if entry[2].alive]
        heapq.heapify(self._heap)
        self._pushed = 0


def snapshot_value(pools: Pools, stored: StoredSnapshot) -> float:
    """Return the tokens per byte that would have to be computed again without a snapshot."""
    size = pools.bytes_of(blocks_of(stored.snapshot))
    return (stored.snapshot.end - previous_end(stored)) / max(size, 1)


def leaf_value(pools: Pools, leaf: Node) -> float:
    """Return the same for a last page, its snapshot, and the pages before that are of use only with these."""
    if not leaf.snapshots:
        return 0.0
    last = max(leaf.snapshots, key=lambda stored: stored.snapshot.end)
    saved = last.snapshot.end - previous_end(last)
    pages = math.ceil(saved / PAGE_SIZE) * pools.attention_page_bytes
    return saved / max(pools.bytes_of(blocks_of(last.snapshot)) + pages, 1)
