"""A pool of equal blocks, handed out by number."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Numbers 0 .. size - 1, each either free or in use. The tensors behind the numbers belong to someone else.

    Args:
        size: number of blocks.
        name: what the blocks are, for error messages.
    """

    def __init__(self, size: int, name: str) -> None:
        self.size, self.name = size, name
        self._free = list(range(size - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks in use."""
        return len(self._used)

    def take(self, count: int) -> list[int]:
        """Take ``count`` blocks; the caller has checked :attr:`num_free`.

        Raises:
            RuntimeError: fewer are free, a bug in the caller.
        """
        if count > len(self._free):
            raise RuntimeError(f"asked for {count} {self.name}, {len(self._free)} of {self.size} are free")
        taken = [self._free.pop() for _ in range(count)]
        self._used.update(taken)
        return taken

    def give_back(self, blocks: Iterable[int]) -> None:
        """Free blocks.

        Raises:
            RuntimeError: one is not in use, a bug in the caller.
        """
        for block in blocks:
            if block not in self._used:
                raise RuntimeError(f"{self.name} {block} given back but not in use")
            self._used.remove(block)
            self._free.append(block)

    def check_integrity(self) -> None:
        """Check that every block is either free or in use, once.

        Raises:
            RuntimeError: one is lost or counted twice.
        """
        if sorted([*self._free, *self._used]) != list(range(self.size)):
            raise RuntimeError(f"{self.name}: free and used blocks do not add up to {self.size}")
