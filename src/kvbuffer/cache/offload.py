"""Prefixes that memory has no room for go to disk, and come back when a request begins with them."""

from __future__ import annotations

from collections.abc import Sequence

from kvbuffer.cache.disk import DiskTier, Geometry
from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.pools import Counts
from kvbuffer.cache.prefix import PrefixCache
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.cache.transfer import Caches, extract, restore
from kvbuffer.cache.work import do_work
from kvbuffer.ops.chunked import CHUNK


class Offload:
    """Moves prefixes between the caches and a folder. Belongs to the thread that steps the engine.

    Args:
        memory: whose blocks the prefixes are in.
        prefixes: its prefix cache; what it evicts from now on is saved.
        caches: the tensors behind its blocks.
        tier: the folder.

    """

    def __init__(self, memory: RequestMemory, prefixes: PrefixCache, caches: Caches, tier: DiskTier) -> None:
        self.memory, self.prefixes, self.caches, self.tier = memory, prefixes, caches, tier
        self._prefill_rate = 0.0
        prefixes.on_evict = self.save
        memory.on_admit = self.fetch

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take note of the time of a step: loading a prefix is weighed against computing it."""
        if num_tokens >= CHUNK:
            self._prefill_rate = num_tokens / seconds

    def save(self, token_ids: list[int], salt: str | None, pages: Sequence[int], snapshot: Snapshot) -> None:
        """Queue a prefix to be written, unless it is on disk."""
        if self.tier.holds(token_ids, salt, snapshot.start):
            return
        self._finish_work()
        self.tier.save(token_ids, salt, Geometry.of(pages, snapshot), extract(self.caches, pages, snapshot))

    def fetch(self, token_ids: Sequence[int], salt: str | None, num_cached: int) -> bool:
        """Bring a prefix of a prompt back, if the disk has a longer one than memory and that saves time.

        Args:
            token_ids: the prompt.
            salt: what the prefix must have been kept under.
            num_cached: tokens that memory has of it.

        Returns:
            Whether memory has more of it now.
        """
        match = self.tier.match(token_ids, salt, len(token_ids) - 1)
        if match is None or match.num_tokens <= num_cached:
            return False
        if not self.tier.cheaper_to_load(match.num_bytes, match.num_tokens - num_cached, self._prefill_rate):
            return False
        geometry = match.geometry
        needed = Counts(int(geometry.has_state), geometry.record_pages, 1, geometry.attention_pages)
        taken = self.memory.take_blocks(needed)
        if taken is None:
            return False
        slot = taken.slots[0] if taken.slots else None
        snapshot = Snapshot(geometry.start, geometry.end, geometry.checkpoint, slot, taken.record_pages, taken.rings[0])
        data = self.tier.load(match)
        if data is not None:
            # A piece of work that is still to be done may write what has just been evicted.
            self._finish_work()
            restore(self.caches, taken.attention_pages, snapshot, data)
            self.prefixes.insert(match.token_ids, salt, taken.attention_pages, snapshot)
        self.memory.pools.give_back(taken)
        return data is not None

    def close(self) -> None:
        """Save every prefix that memory still has, and wait until all is written."""
        for stored in self.prefixes.snapshots():
            self.save(*stored)
            self.tier.flush()  # there is time now: what waits to be written is not to be dropped
        self.tier.close()

    def _finish_work(self) -> None:
        work, self.memory.work = self.memory.work, []
        do_work(work, self.caches)
