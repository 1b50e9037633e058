"""Blocks for requests: free ones, and those that cached prefixes give up for them."""

from __future__ import annotations

from collections import Counter

from kvbuffer.cache.pools import POOL_KINDS, Blocks, Counts, PoolKind, Pools
from kvbuffer.cache.prefix import PrefixCache


class BlockAllocator:
    """Takes blocks from the pools, and evicts cached prefixes where too few are free.

    Args:
        pools: the blocks.
        prefixes: the prefix cache; None without one.
    """

    def __init__(self, pools: Pools, prefixes: PrefixCache | None) -> None:
        self._pools, self._prefixes = pools, prefixes

    def shortage(self, wanted: Counts, reserved: int = 0) -> str | None:
        """Return what there is too little of for so many blocks, and ``reserved`` bytes, more; None if enough."""
        source = self._pools if self._prefixes is None else self._prefixes
        return source.shortage(wanted, reserved)

    def can_take(self, **counts: int) -> bool:
        """Return whether so many blocks of each kind can be taken; negative counts are given back before."""
        return self.shortage(Counts(**counts)) is None

    def take(self, kind: PoolKind, count: int) -> list[int]:
        """Take blocks of one kind; the caller has checked that they can be."""
        pool = self._pools.by_kind(kind)
        if self._prefixes is not None and count > pool.num_free:
            self._prefixes.evict(kind, count - pool.num_free)
        missing = count * pool.block_bytes - self._pools.free_bytes
        if self._prefixes is not None and missing > 0:
            self._prefixes.evict_bytes(missing)
        return pool.take(count)

    def take_all(self, counts: Counts) -> Blocks | None:
        """Take blocks of all kinds; None, and nothing changed, if there are too few."""
        if self.shortage(counts) is not None:
            return None
        return Blocks(*(tuple(self.take(kind, count)) for kind, count in zip(POOL_KINDS, counts, strict=True)))

    def num_holders(self, kind: PoolKind, block: int) -> int:
        """Return how many requests and pins hold a block."""
        pool = self._pools.by_kind(kind)
        return pool.references(block) - pool.kept(block)

    def pinned(self, kind: PoolKind) -> Counter[int]:
        """Return how many pins hold each block of a kind."""
        return Counter() if self._prefixes is None else self._prefixes.pinned(kind)

    def num_in_use(self, kind: PoolKind) -> int:
        """Return how many blocks of a kind requests hold; a block that prefixes or pins hold alone is not in use."""
        pool = self._pools.by_kind(kind)
        pins = self.pinned(kind).copy()
        only_pinned = sum(self.num_holders(kind, block) == count for block, count in pins.items())
        return pool.num_used - pool.num_idle - only_pinned
