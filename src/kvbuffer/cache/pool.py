"""A pool of equal blocks, handed out by number and shared by counting references."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class BlockPool:
    """Numbers 0 .. size - 1, each free or held by one or more holders. The memory behind them belongs to someone else.

    A block that is shared is only read; whoever wants to write takes a block of their own first. The prefix cache's
    references are told apart from those of requests, so that the blocks it could give up are known without a search.

    A pool may be far larger than what is ever used of it: blocks have memory from the first time they are taken until
    they are released. Free blocks that have memory are taken first, and of each sort the lowest number, so that what is
    in use stays dense.

    Args:
        size: number of blocks.
        name: what the blocks are, for error messages.
        block_bytes: bytes behind a block.
    """

    def __init__(self, size: int, name: str, block_bytes: int = 0) -> None:
        self.size, self.name, self.block_bytes = size, name, block_bytes
        # Heaps. Blocks from len(_references) on were never taken, and are in neither.
        self._free: list[int] = []
        self._released: list[int] = []
        self._references: list[int] = []
        self._kept: list[int] = []
        self._num_idle = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return self.size - self.num_used

    @property
    def num_used(self) -> int:
        """Blocks that someone holds."""
        return self.num_backed - len(self._free)

    @property
    def num_idle(self) -> int:
        """Blocks that only the prefix cache holds."""
        return self._num_idle

    @property
    def num_taken(self) -> int:
        """Blocks that were ever taken: those from this number on never were."""
        return len(self._references)

    @property
    def num_backed(self) -> int:
        """Blocks that have memory, held or free."""
        return len(self._references) - len(self._released)

    @property
    def num_backed_free(self) -> int:
        """Blocks that have memory and that no one holds."""
        return len(self._free)

    def references(self, block: int) -> int:
        """Return how many hold ``block``, the prefix cache's references included."""
        return self._references[block] if block < len(self._references) else 0

    def kept(self, block: int) -> int:
        """Return how many references to ``block`` are the prefix cache's."""
        return self._kept[block] if block < len(self._kept) else 0

    def is_idle(self, block: int) -> bool:
        """Return whether only the prefix cache holds ``block``."""
        return 0 < self._kept[block] == self._references[block]

    def take(self, count: int) -> list[int]:
        """Take ``count`` free blocks; the caller has checked :attr:`num_free`.

        Raises:
            RuntimeError: fewer are free, a bug in the caller.
        """
        if count > self.num_free:
            raise RuntimeError(f"asked for {count} {self.name}, {self.num_free} of {self.size} are free")
        taken = [self._lowest() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def _lowest(self) -> int:
        for heap in (self._free, self._released):
            if heap:
                return heapq.heappop(heap)
        self._references.append(0)
        self._kept.append(0)
        return len(self._references) - 1

    def release(self, count: int) -> list[int]:
        """Let the memory of up to ``count`` free blocks go, those of the highest numbers.

        Returns:
            The blocks, in order; they can be taken again.
        """
        free = sorted(self._free)
        keep = len(free) - min(count, len(free))
        self._free, released = free[:keep], free[keep:]
        self._released = sorted(self._released + released)
        return released

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks that someone holds.

        Raises:
            RuntimeError: one is free, a bug in the caller.
        """
        for block in blocks:
            if not self._held(block):
                raise RuntimeError(f"{self.name} {block} shared but not in use")
            self._num_idle -= self.is_idle(block)
            self._references[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """Drop one holder of each block; a block without holders is free.

        Raises:
            RuntimeError: one is not in use, a bug in the caller.
        """
        for block in blocks:
            if not self._held(block) or self.is_idle(block):
                raise RuntimeError(f"{self.name} {block} given back but not in use")
            self._references[block] -= 1
            self._num_idle += self.is_idle(block)
            if not self._references[block]:
                heapq.heappush(self._free, block)

    def keep(self, blocks: Iterable[int]) -> None:
        """Add the prefix cache as a holder of blocks that someone holds.

        Raises:
            RuntimeError: one is free, a bug in the caller.
        """
        for block in blocks:
            if not self._held(block):
                raise RuntimeError(f"{self.name} {block} kept but not in use")
            self._references[block] += 1
            self._kept[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Drop one of the prefix cache's references to each block; a block without holders is free.

        Raises:
            RuntimeError: one is not kept, a bug in the caller.
        """
        for block in blocks:
            if not self._held(block) or not self._kept[block]:
                raise RuntimeError(f"{self.name} {block} dropped but not kept")
            self._references[block] -= 1
            self._kept[block] -= 1
            if not self._references[block]:
                self._num_idle -= 1
                heapq.heappush(self._free, block)

    def _held(self, block: int) -> bool:
        return 0 <= block < len(self._references) and self._references[block] > 0

    def check_integrity(self) -> None:
        """Check that every block is either free or held.

        Raises:
            RuntimeError: one is lost or counted twice.
        """
        free = [block for block, references in enumerate(self._references) if not references]
        if sorted(self._free + self._released) != free or min(self._references, default=0) < 0:
            raise RuntimeError(f"{self.name}: free and used blocks do not add up to {self.size}")
        idle = sum(map(self.is_idle, range(self.num_taken)))
        if idle != self._num_idle or any(kept > held for kept, held in zip(self._kept, self._references, strict=True)):
            raise RuntimeError(f"{self.name}: {self._num_idle} idle blocks counted, {idle} found")
