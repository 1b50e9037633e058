"""The four pools that a request's memory comes from, and the bytes that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from kvbuffer.cache.pool import BlockPool
from kvbuffer.cache.snapshot import Snapshot

PoolKind = Literal["slots", "record_pages", "rings", "attention_pages"]
POOL_KINDS: tuple[PoolKind, ...] = ("slots", "record_pages", "rings", "attention_pages")
POOL_NAMES = ("state slots", "record pages", "rings", "attention pages")
#: The limit that binds when the pools together have no bytes left.
MEMORY = "memory"


class Blocks(NamedTuple):
    """Block numbers, by the pool that they are of."""

    slots: tuple[int, ...] = ()
    record_pages: tuple[int, ...] = ()
    rings: tuple[int, ...] = ()
    attention_pages: tuple[int, ...] = ()


class Counts(NamedTuple):
    """Numbers of blocks, by the pool that they are of."""

    slots: int = 0
    record_pages: int = 0
    rings: int = 0
    attention_pages: int = 0


def blocks_of(snapshot: Snapshot | None, attention_pages: tuple[int, ...] = ()) -> Blocks:
    """Return the blocks of a snapshot, if there is one, with ``attention_pages``."""
    if snapshot is None:
        return Blocks(attention_pages=attention_pages)
    slots = () if snapshot.slot is None else (snapshot.slot,)
    return Blocks(slots, snapshot.record_pages, (snapshot.ring,), attention_pages)


class Pools(NamedTuple):
    """The pools, and the bytes that blocks of all of them may take together.

    A pool's own size matters only where memory cannot move from one pool to another; elsewhere each is as large as the
    whole budget could make it.
    """

    slots: BlockPool
    record_pages: BlockPool
    rings: BlockPool
    attention_pages: BlockPool
    budget: int

    @classmethod
    def make(cls, sizes: Counts, block_bytes: Sequence[int], budget: int) -> Pools:
        """Return pools of so many blocks, of so many bytes each, that together may take ``budget`` bytes."""
        slots, records, rings, attention = map(BlockPool, sizes, POOL_NAMES, block_bytes)
        return cls(slots, records, rings, attention, budget)

    @property
    def all(self) -> tuple[BlockPool, BlockPool, BlockPool, BlockPool]:
        """The pools, in the order of POOL_KINDS."""
        return self.slots, self.record_pages, self.rings, self.attention_pages

    @property
    def free_bytes(self) -> int:
        """Bytes that no block takes which someone holds."""
        return self.budget - sum(pool.num_used * pool.block_bytes for pool in self.all)

    @property
    def idle_bytes(self) -> int:
        """Bytes of blocks that only the prefix cache holds."""
        return sum(pool.num_idle * pool.block_bytes for pool in self.all)

    def by_kind(self, kind: PoolKind) -> BlockPool:
        """Return the pool of one kind."""
        pool: BlockPool = getattr(self, kind)
        return pool

    def items(self) -> Iterator[tuple[PoolKind, BlockPool]]:
        """Go through the pools with their kinds."""
        return zip(POOL_KINDS, self.all, strict=True)

    def room(self, kind: PoolKind) -> int:
        """Return how many blocks of one kind can be taken while nothing is evicted."""
        pool = self.by_kind(kind)
        return min(pool.num_free, self.free_bytes // pool.block_bytes) if pool.block_bytes else pool.num_free

    def shortage(self, wanted: Counts, reserved: int = 0) -> str | None:
        """Return the name of what there is too little of for so many blocks more; None if there is enough.

        Idle blocks count as there, for they can be evicted. Negative counts are blocks that are given back.

        Args:
            wanted: how many of each kind.
            reserved: bytes that have to be there besides.
        """
        for pool, count in zip(self.all, wanted, strict=True):
            if count > pool.num_free + pool.num_idle:
                return pool.name
        return MEMORY if self.bytes_of(wanted) + reserved > self.free_bytes + self.idle_bytes else None

    def pairs(self, blocks: Blocks) -> Iterator[tuple[BlockPool, tuple[int, ...]]]:
        """Go through the pools with their part of ``blocks``."""
        return zip(self.all, blocks, strict=True)

    def share(self, blocks: Blocks) -> None:
        """Add a holder to each block."""
        for pool, numbers in self.pairs(blocks):
            pool.share(numbers)

    def give_back(self, blocks: Blocks) -> None:
        """Drop a holder of each block."""
        for pool, numbers in self.pairs(blocks):
            pool.give_back(numbers)

    def keep(self, blocks: Blocks) -> None:
        """Add the prefix cache as a holder of each block."""
        for pool, numbers in self.pairs(blocks):
            pool.keep(numbers)

    def drop(self, blocks: Blocks) -> None:
        """Drop one of the prefix cache's references to each block."""
        for pool, numbers in self.pairs(blocks):
            pool.drop(numbers)

    def bytes_of(self, counts: Counts) -> int:
        """Return the bytes behind so many blocks."""
        return sum(count * pool.block_bytes for pool, count in zip(self.all, counts, strict=True))


def counts_of(blocks: Blocks) -> Counts:
    """Return how many blocks there are of each kind."""
    return Counts(*map(len, blocks))
