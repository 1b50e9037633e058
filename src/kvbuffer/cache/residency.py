"""Keeps the memory that blocks really take within the budget, and takes some ahead of need."""

from __future__ import annotations

from collections.abc import Iterator

from kvbuffer.cache.plan import MemoryPlan
from kvbuffer.cache.pools import POOL_KINDS, Counts, PoolKind, Pools
from kvbuffer.cache.transfer import Caches, block_tensors
from kvbuffer.ops import memory

# The requests for which memory is taken ahead while none has been seen, and how many.
_AHEAD_CONTEXT = 512
_AHEAD_REQUESTS = 64
# Parts of the budget: what is taken ahead at most, released at least at a time, lost to huge pages at most.
_MOST_AHEAD = 1 / 4
_LEAST_RELEASED = 1 / 64
_MOST_ROUNDING = 1 / 32
# Bytes taken ahead in one go: a few milliseconds, which a request that arrives has to wait for.
_PIECE = 2 << 20


class Residency:
    """The memory behind the blocks of the pools.

    A block that was given back keeps its memory, for the next of its kind, until held and free blocks together take
    more than the budget. Then free ones let it go, of the kind that has most of them. Beyond the budget a tensor may
    take up to a huge page, if all of them together are small against it.

    The first time that memory is written, the system has to find it, which is slower than most of what is done with it
    (0.5 GB/s on some virtual machines, whose hosts take back what is free). So some is taken ahead while there is
    nothing else to do, or all of it at the start.

    Args:
        pools: who holds what.
        plan: what requests take.
        caches: the tensors.
    """

    def __init__(self, pools: Pools, plan: MemoryPlan, caches: Caches) -> None:
        self._pools = pools
        self._tensors = {kind: block_tensors(caches, kind) for kind in POOL_KINDS}
        # Of each kind, blocks below this number may have memory though they were never taken.
        self._ahead = dict.fromkeys(POOL_KINDS, 0)
        self._pieces: Iterator[None] = iter(())
        request = plan.request_blocks(min(_AHEAD_CONTEXT, plan.max_model_len))
        # With a prefix that it leaves.
        self._typical = Counts(2, request.record_pages + 1, 2, request.attention_pages)
        wanted = _AHEAD_REQUESTS * plan.block_bytes.of(self._typical)
        self._most_ahead = min(wanted, int(pools.budget * _MOST_AHEAD))
        rounding = sum(map(len, self._tensors.values())) * memory.HUGE_PAGE
        if rounding > pools.budget * _MOST_ROUNDING:
            self._use_small_pages(POOL_KINDS)

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks that have memory."""
        backed = (pool.num_backed + self._num_ahead(kind) for kind, pool in self._pools.items())
        return self._pools.bytes_of(Counts(*backed))

    def settle(self) -> None:
        """Let memory of free blocks go if there is too much of it.

        To be called before the blocks that were taken are written, when no work is left to do that reads free ones.
        """
        if self.num_bytes <= self._pools.budget:
            return
        excess = self.num_bytes - self._pools.budget + int(self._pools.budget * _LEAST_RELEASED)
        ahead = {kind: self._num_ahead(kind) * pool.block_bytes for kind, pool in self._pools.items()}
        for kind in sorted(POOL_KINDS, key=ahead.__getitem__, reverse=True):
            if excess > 0 and ahead[kind]:
                excess -= self._release_ahead(kind, excess)
        free = {kind: pool.num_backed_free * pool.block_bytes for kind, pool in self._pools.items()}
        for kind in sorted(POOL_KINDS, key=free.__getitem__, reverse=True):
            if excess > 0 and free[kind]:
                pool = self._pools.by_kind(kind)
                blocks = pool.release(-(-excess // pool.block_bytes))
                # Otherwise the system fills the holes, to make huge pages again.
                self._use_small_pages((kind,))
                for first, end in _runs(blocks):
                    self._release(kind, first, end)
                excess -= len(blocks) * pool.block_bytes

    def take_all(self) -> None:
        """Take memory for the whole budget, shared out as typical requests would do."""
        self._most_ahead = self._pools.budget
        while self.take_ahead():
            pass

    def take_ahead(self) -> bool:
        """Take a little memory for blocks that will be taken next; return whether there is more to do."""
        if next(self._pieces, _END) is not _END:
            return True
        more = self._next_ahead()
        if not any(more) or self.num_bytes + self._pools.bytes_of(more) > self._pools.budget:
            return False
        for (kind, pool), count in zip(self._pools.items(), more, strict=True):
            self._ahead[kind] = max(self._ahead[kind], pool.num_taken) + count
        self._pieces = self._populate()
        return True

    def _num_ahead(self, kind: PoolKind) -> int:
        return max(0, self._ahead[kind] - self._pools.by_kind(kind).num_taken)

    def _next_ahead(self) -> Counts:
        """Return how many more blocks are to have memory ahead: none until half of it is used up.

        It is shared out as memory is at present.
        """
        in_use = Counts(*(pool.num_backed for pool in self._pools.all))
        mix = in_use if any(in_use) else self._typical
        share = self._most_ahead / max(1, self._pools.bytes_of(mix))
        wanted = [min(int(share * part), pool.num_free) for part, pool in zip(mix, self._pools.all, strict=True)]
        there = [pool.num_backed_free + self._num_ahead(kind) for kind, pool in self._pools.items()]
        if all(2 * count >= goal for count, goal in zip(there, wanted, strict=True)):
            return Counts()
        return Counts(*(max(0, goal - count) for count, goal in zip(there, wanted, strict=True)))

    def _populate(self) -> Iterator[None]:
        for kind, pool in self._pools.items():
            for tensor in self._tensors[kind]:
                rest = tensor[pool.num_taken : self._ahead[kind]].flatten()
                while rest.numel():
                    piece, rest = rest[: _PIECE // rest.itemsize], rest[_PIECE // rest.itemsize :]
                    if not memory.populate(piece):
                        return
                    yield

    def _release_ahead(self, kind: PoolKind, num_bytes: int) -> int:
        """Let about so much memory go that was taken ahead for blocks of a kind; return how much."""
        self._pieces = iter(())
        size, end = self._pools.by_kind(kind).block_bytes, self._ahead[kind]
        count = min(self._num_ahead(kind), -(-num_bytes // size))
        self._ahead[kind] = end - count
        self._release(kind, end - count, end)
        return count * size

    def _release(self, kind: PoolKind, first: int, end: int) -> None:
        for tensor in self._tensors[kind]:
            if first < end:
                memory.release(tensor[first:end])

    def _use_small_pages(self, kinds: tuple[PoolKind, ...]) -> None:
        for kind in kinds:
            for tensor in self._tensors[kind]:
                memory.use_small_pages(tensor)


_END = object()


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Go through the runs of consecutive numbers in an ascending list: first, and end (exclusive)."""
    first = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[first], numbers[i - 1] + 1
            first = i
