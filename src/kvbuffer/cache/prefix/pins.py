"""Blocks kept from eviction until some time, within bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from kvbuffer.cache.pools import POOL_KINDS, Blocks, Counts, PoolKind, Pools
from kvbuffer.cache.prefix.tree import Node


class Pin(NamedTuple):
    """What is kept, until when, and the last page of the conversation it is kept for."""

    last: Node
    until: float
    blocks: Blocks


class Pins:
    """Holds references like a request would, so what is pinned is in use as far as eviction is concerned.

    Args:
        pools: where the blocks are of.
        share: the part of each pool, and of all their bytes, that may be pinned.
        clock: the time.
    """

    def __init__(self, pools: Pools, share: float, clock: Callable[[], float]) -> None:
        self._pools, self._clock = pools, clock
        self._limits = Counts(*(int(pool.size * share) for pool in pools.all))
        self._most_bytes = int(pools.budget * share)
        self._pins: list[Pin] = []
        self._pinned: list[Counter[int]] = [Counter() for _ in self._limits]

    def add(self, pin: Pin) -> bool:
        """Pin blocks, in place of pins of earlier parts of the same conversation; the oldest make room.

        Returns:
            Whether it was pinned; False when it is too large by itself.
        """
        if self._too_many(Counts(*(len(set(numbers)) for numbers in pin.blocks))):
            return False
        path = set(map(id, pin.last.path()))
        self._pools.share(pin.blocks)
        for old in [old for old in self._pins if id(old.last) in path]:
            self._release(old)
        self._pins.append(pin)
        for count, numbers in zip(self._pinned, pin.blocks, strict=True):
            count.update(numbers)
        while self._too_many(Counts(*map(len, self._pinned))):
            self._release(self._pins[0])
        return True

    def _too_many(self, counts: Counts) -> bool:
        too_many = any(count > limit for count, limit in zip(counts, self._limits, strict=True))
        return too_many or self._pools.bytes_of(counts) > self._most_bytes

    def counts(self, kind: PoolKind) -> Counter[int]:
        """Return how many pins hold each block of a kind."""
        return self._pinned[POOL_KINDS.index(kind)]

    def release_expired(self) -> None:
        """Let go of what was pinned until now or earlier."""
        now = self._clock()
        for pin in [pin for pin in self._pins if pin.until <= now]:
            self._release(pin)

    def release_oldest(self) -> bool:
        """Let go of the oldest pin; return whether there was one."""
        if self._pins:
            self._release(self._pins[0])
            return True
        return False

    def clear(self) -> None:
        """Let go of everything."""
        while self.release_oldest():
            pass

    def _release(self, pin: Pin) -> None:
        self._pins.remove(pin)
        self._pools.give_back(pin.blocks)
        for count, numbers in zip(self._pinned, pin.blocks, strict=True):
            count.subtract(numbers)
            for number in numbers:
                if not count[number]:
                    del count[number]
