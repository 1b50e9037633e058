"""The four pools that a request's memory comes from, and blocks of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from kvbuffer.cache.pool import BlockPool
from kvbuffer.cache.snapshot import Snapshot

PoolKind = Literal["slots", "record_pages", "rings", "attention_pages"]
POOL_KINDS: tuple[PoolKind, ...] = ("slots", "record_pages", "rings", "attention_pages")


class Blocks(NamedTuple):
    """Block numbers, by the pool that they are of."""

    slots: tuple[int, ...] = ()
    record_pages: tuple[int, ...] = ()
    rings: tuple[int, ...] = ()
    attention_pages: tuple[int, ...] = ()


def blocks_of(snapshot: Snapshot | None, attention_pages: tuple[int, ...] = ()) -> Blocks:
    """Return the blocks of a snapshot, if there is one, with ``attention_pages``."""
    if snapshot is None:
        return Blocks(attention_pages=attention_pages)
    slots = () if snapshot.slot is None else (snapshot.slot,)
    return Blocks(slots, snapshot.record_pages, (snapshot.ring,), attention_pages)


class Pools(NamedTuple):
    """The pools, and the bytes of a block of each."""

    slots: BlockPool
    record_pages: BlockPool
    rings: BlockPool
    attention_pages: BlockPool
    slot_bytes: int
    record_page_bytes: int
    ring_bytes: int
    attention_page_bytes: int

    def by_kind(self, kind: PoolKind) -> BlockPool:
        """Return the pool of one kind."""
        pool: BlockPool = getattr(self, kind)
        return pool

    def items(self) -> Iterator[tuple[PoolKind, BlockPool]]:
        """Go through the pools with their kinds."""
        return zip(POOL_KINDS, self[: len(POOL_KINDS)], strict=True)  # type: ignore[arg-type]

    def pairs(self, blocks: Blocks) -> Iterator[tuple[BlockPool, tuple[int, ...]]]:
        """Go through the pools with their part of ``blocks``."""
        return zip((self.slots, self.record_pages, self.rings, self.attention_pages), blocks, strict=True)

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

    def bytes_of(self, blocks: Blocks) -> int:
        """Return the bytes behind ``blocks``."""
        sizes = self.slot_bytes, self.record_page_bytes, self.ring_bytes, self.attention_page_bytes
        return sum(len(numbers) * size for numbers, size in zip(blocks, sizes, strict=True))
