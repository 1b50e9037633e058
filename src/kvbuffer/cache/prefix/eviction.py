"""Frees blocks that only the prefix cache holds: what is worth least first, pages from the ends of texts inward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

from kvbuffer.cache.pools import POOL_KINDS, PoolKind, blocks_of
from kvbuffer.cache.prefix.eviction_queue import EvictionQueue
from kvbuffer.cache.prefix.pins import Pins
from kvbuffer.cache.prefix.store import PrefixStore
from kvbuffer.cache.prefix.tree import Node, StoredSnapshot
from kvbuffer.cache.prefix.usefulness import Usefulness


class Eviction:
    """The last pages and the snapshots of a store, in the order in which they are given up.

    Args:
        store: what is evicted from.
        usefulness: what that is worth.
        pins: what is kept until nothing else is left: it is for the sake of later requests, and gives way to the one
            that needs the memory now.
        lose: called for each snapshot to give up, while its blocks can still be read; takes it out of the store.
        counts: the blocks freed, by pool, are added to these.
    """

    def __init__(
        self,
        store: PrefixStore,
        usefulness: Usefulness,
        pins: Pins,
        lose: Callable[[StoredSnapshot], None],
        counts: dict[PoolKind, int],
    ) -> None:
        self._store, self._pools, self._usefulness, self._pins = store, store.pools, usefulness, pins
        self._lose, self._counts = lose, counts
        self._leaves: EvictionQueue[Node] = EvictionQueue(usefulness.of_leaf)
        self._snapshots: EvictionQueue[StoredSnapshot] = EvictionQueue(usefulness.of_snapshot)

    def add_leaf(self, page: Node) -> None:
        """Let a last page be evicted."""
        self._leaves.push(page)

    def add_snapshot(self, stored: StoredSnapshot) -> None:
        """Let a snapshot be evicted."""
        self._snapshots.push(stored)

    def free(self, kind: PoolKind, count: int) -> int:
        """Free at least ``count`` blocks of one pool, or as many as can be; return how many that were."""
        pool = self._pools.by_kind(kind)
        before = pool.num_free
        pages = kind == "attention_pages"
        self._evict(
            lambda: pool.num_free >= before + count, lambda: pool.num_idle, pages, kinds=() if pages else (kind,)
        )
        return pool.num_free - before

    def free_bytes(self, num_bytes: int) -> int:
        """Free at least ``num_bytes`` bytes of whatever saves the least, or as many as can be; return how many."""
        before = self._pools.free_bytes
        enough = before + num_bytes
        self._evict(
            lambda: self._pools.free_bytes >= enough, lambda: self._pools.idle_bytes, pages=True, kinds=POOL_KINDS
        )
        return self._pools.free_bytes - before

    def _evict(
        self, enough: Callable[[], bool], idle: Callable[[], int], pages: bool, kinds: Sequence[PoolKind]
    ) -> None:
        """Evict pages, and snapshots with blocks of ``kinds``, by what they save, while any are idle, until enough."""
        self._pins.release_expired()
        before = [pool.num_free for pool in self._pools.all]
        self._evict_unpinned(enough, idle, pages, kinds)
        while not enough() and self._pins.release_oldest():
            self._evict_unpinned(enough, idle, pages, kinds)
        for kind, pool, free in zip(POOL_KINDS, self._pools.all, before, strict=True):
            self._counts[kind] += pool.num_free - free

    def _evict_unpinned(
        self, enough: Callable[[], bool], idle: Callable[[], int], pages: bool, kinds: Sequence[PoolKind]
    ) -> None:
        in_use: list[Node] = []
        useless: list[StoredSnapshot] = []
        while not enough() and idle():
            # Pages and snapshots are measured alike; of one kind only, there is nothing to compare.
            leaves = pages and self._pools.attention_pages.num_idle > 0
            if leaves and (not kinds or self._leaves.lowest() <= self._snapshots.lowest()):
                self._evict_leaf(in_use)
            elif (stored := self._snapshots.pop()) is None:
                break
            elif any(map(self._has_idle, kinds, repeat(stored))):
                self._lose(stored)
            else:
                useless.append(stored)
        for leaf in in_use:
            leaf.recency = self._usefulness.now
            self._leaves.push(leaf)
        for stored in useless:
            self._snapshots.push(stored)

    def _has_idle(self, kind: PoolKind, stored: StoredSnapshot) -> bool:
        return any(map(self._pools.by_kind(kind).is_idle, blocks_of(stored.snapshot)[POOL_KINDS.index(kind)]))

    def _evict_leaf(self, in_use: list[Node]) -> None:
        """Evict the last page that saves the least, or find that it is in use."""
        pool = self._pools.attention_pages
        leaf = self._leaves.pop()
        if leaf is None:
            # Two requests that computed the same text at once: the later one's pages follow pages of the earlier
            # one that it does not hold. It will publish them again; the idle pages before them are wanted now.
            leaf = next(leaf for leaf in in_use if any(pool.is_idle(node.block) for node in leaf.path()))
            in_use.remove(leaf)
            self._remove_leaf(leaf)
        elif leaf.children:
            return  # no last page any more; it comes back when it is one again
        elif pool.is_idle(leaf.block):
            self._remove_leaf(leaf)
        else:
            in_use.append(leaf)

    def _remove_leaf(self, leaf: Node) -> None:
        for stored in leaf.snapshots[::]:
            self._lose(stored)
        before = self._store.remove_page(leaf)
        if before is not None:
            self._leaves.push(before)

    def check_integrity(self) -> None:
        """Check that every last page can be evicted.

        Raises:
            RuntimeError: one cannot.
        """
        for page in self._store.pages():
            if not page.children and not page.queued:
                raise RuntimeError(f"prefix cache: page {page.block} can never be evicted")
