"""Prefix caching for hybrid models: what was computed for one request serves the next that begins with the same text.

Resuming after t tokens takes the attention pages of those tokens and a snapshot of the linear-attention layers that is
usable at t. Both are kept in a tree whose nodes are pages of tokens; a hit may end at any token that a snapshot covers,
inside a page or not.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

from kvbuffer.cache.eviction import EvictionQueue, Usefulness
from kvbuffer.cache.pins import Pin, Pins
from kvbuffer.cache.pools import POOL_KINDS, Blocks, Counts, PoolKind, Pools, blocks_of
from kvbuffer.cache.prefix_tree import (
    Node,
    Origin,
    StoredSnapshot,
    Tokens,
    all_pages,
    attach,
    check_structure,
    detach,
    last_resumable,
    pages_of,
    walk,
)
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.ops.attention import PAGE_SIZE

#: Called with (token_ids, salt, attention_pages, snapshot) of a prefix that is about to be lost.
OnEvict = Callable[[list[int], str | None, tuple[int, ...], Snapshot], None]


class PrefixMatch(NamedTuple):
    """The longest cached prefix of a text from which a request can go on. Valid until the cache changes.

    Attributes:
        num_tokens: its length t.
        attention_pages: the pages of its full PAGE_SIZE tokens, in order.
        partial_page: the page to copy when t ends inside one: its first t % PAGE_SIZE tokens are right. None otherwise.
        stored: the snapshot to use at t, as the cache has it; None when t is 0.
        branch: tokens of the text whose attention pages are cached, at least t: where the text leaves what is known,
            so where another may leave it too.
        num_queried: length of the text that was looked up.
    """

    num_tokens: int
    attention_pages: tuple[int, ...]
    partial_page: int | None
    stored: StoredSnapshot | None
    branch: int
    num_queried: int

    @property
    def snapshot(self) -> Snapshot | None:
        """The snapshot to use at t; None when t is 0."""
        return None if self.stored is None else self.stored.snapshot

    @property
    def blocks(self) -> Blocks:
        """Everything that :meth:`PrefixCache.acquire` takes a reference to."""
        partial = () if self.partial_page is None else (self.partial_page,)
        return blocks_of(self.snapshot, self.attention_pages + partial)


@dataclass
class PrefixCounters:
    """What happened since the start; these only grow.

    Attributes:
        queries: requests that started, hit or not.
        query_tokens: tokens of their texts.
        hits: those that started from a cached prefix.
        hit_tokens: tokens of the prefixes they started from.
        inserted_snapshots: snapshots stored.
        evicted: blocks freed by eviction, by pool.
    """

    queries: int = 0
    query_tokens: int = 0
    hits: int = 0
    hit_tokens: int = 0
    inserted_snapshots: int = 0
    evicted: dict[PoolKind, int] = field(default_factory=lambda: dict.fromkeys(POOL_KINDS, 0))


class PrefixCache:
    """Attention pages and snapshots by the text they are of, in one tree per salt.

    Texts under different salts share nothing. Blocks are held by references of the cache's own, beside those of
    requests; what a request holds is not evicted.

    Args:
        pools: the pools that blocks are of.
        on_evict: called with a snapshot and its attention pages before eviction gives them up, while they can still be
            read. Must not use the cache. May be set later.
        clock: the time, for pins.
        pin_share: the part of each pool that may be pinned.
    """

    def __init__(
        self,
        pools: Pools,
        *,
        on_evict: OnEvict | None = None,
        clock: Callable[[], float] = time.monotonic,
        pin_share: float = 0.25,
    ) -> None:
        self.pools, self.counters = pools, PrefixCounters()
        self.on_evict, self._clock = on_evict, clock
        self._pins = Pins(pools, pin_share)
        self._clear()

    def _clear(self) -> None:
        self._with_slot: dict[int, list[StoredSnapshot]] = {}
        self._roots: dict[str | None, Node] = {}
        self._usefulness = Usefulness(self.pools)
        self._leaves: EvictionQueue[Node] = EvictionQueue(self._usefulness.of_leaf)
        self._snapshots: EvictionQueue[StoredSnapshot] = EvictionQueue(self._usefulness.of_snapshot)

    def match(self, token_ids: Sequence[int], salt: str | None, max_tokens: int) -> PrefixMatch:
        """Return the longest usable prefix of a text, of at most ``max_tokens`` tokens.

        Changes nothing but what counts as recently used.
        """
        text = token_ids[:max_tokens]
        path, branch = walk(self._roots.get(salt) or Node.root(salt), text)
        num_tokens, stored = last_resumable(path, text)
        pages: list[Node] = []
        if stored is not None:
            pages = stored.node.path()[: math.ceil(num_tokens / PAGE_SIZE)]
            stored.recency = self._usefulness.now
        for node in (*path, *pages):
            node.recency = self._usefulness.now
        numbers, full = tuple(node.block for node in pages), num_tokens // PAGE_SIZE
        inside = numbers[full] if num_tokens % PAGE_SIZE else None
        return PrefixMatch(num_tokens, numbers[:full], inside, stored, branch, len(token_ids))

    def acquire(self, match: PrefixMatch) -> None:
        """Take references to everything in a match, for a request that starts from it; count the request.

        The caller gives them back: ``pools.give_back(match.blocks)``, or each block when it is done with it.
        """
        self.pools.share(match.blocks)
        self.counters.queries += 1
        self.counters.query_tokens += match.num_queried
        self.counters.hits += match.num_tokens > 0
        self.counters.hit_tokens += match.num_tokens
        self._usefulness.now += 1
        if match.stored is not None:
            self._usefulness.note_used(match.stored)

    def insert(
        self,
        token_ids: Sequence[int],
        salt: str | None,
        attention_pages: Sequence[int],
        snapshot: Snapshot | None,
        origin: Origin = "output",
    ) -> None:
        """Publish a prefix; the caller's references stay the caller's.

        Pages of tokens that are cached already are not needed again. The last page may be partial, and its writer may
        go on appending to it: readers copy it. A snapshot is not stored beside one that ends where it does and starts
        no later.

        Args:
            token_ids: the prefix.
            salt: who it is shared with.
            attention_pages: its pages.
            snapshot: one that ends at its last token.
            origin: why the snapshot was made, which tells how likely it is to be used.

        Raises:
            RuntimeError: the blocks are not those of this many tokens, a bug in the caller.
        """
        if len(attention_pages) != math.ceil(len(token_ids) / PAGE_SIZE):
            raise RuntimeError(f"{len(attention_pages)} attention pages are not those of {len(token_ids)} tokens")
        if not token_ids or (snapshot is not None and snapshot.end != len(token_ids)):
            raise RuntimeError(f"cannot store {snapshot} as the memory of {len(token_ids)} tokens")
        node = self._roots.setdefault(salt, Node.root(salt))
        for tokens, block in zip(pages_of(token_ids), attention_pages, strict=True):
            node = self._insert_page(node, tokens, block)
            node.recency = self._usefulness.now
        if not node.children:
            self._leaves.push(node)
        if snapshot is not None:
            self._insert_snapshot(node, snapshot, origin)

    def evict(self, kind: PoolKind, count: int) -> int:
        """Free at least ``count`` blocks of one pool, or as many as can be; return how many that were.

        Pages go from the ends of paths inward, each with the snapshots that end in it. Pins are for the sake of later
        requests: when nothing else is left, the oldest give way to the one that needs the memory now.
        """
        pool = self.pools.by_kind(kind)
        before = pool.num_free
        pages = kind == "attention_pages"
        self._evict(
            lambda: pool.num_free >= before + count, lambda: pool.num_idle, pages, kinds=() if pages else (kind,)
        )
        return pool.num_free - before

    def evict_bytes(self, num_bytes: int) -> int:
        """Free at least ``num_bytes`` bytes of whatever saves the least, or as many as can be; return how many."""
        before = self.pools.free_bytes
        enough = before + num_bytes
        self._evict(
            lambda: self.pools.free_bytes >= enough, lambda: self.pools.idle_bytes, pages=True, kinds=POOL_KINDS
        )
        return self.pools.free_bytes - before

    def disown(self, slot: int) -> None:
        """Give up the snapshots with this state, so that a request which holds it can have it alone."""
        for stored in self._with_slot.get(slot, [])[::]:
            self._remove_snapshot(stored)

    def num_evictable(self, kind: PoolKind) -> int:
        """Return how many blocks of one pool :meth:`evict` can free without touching what is pinned."""
        self._pins.release_expired(self._clock())
        return self.pools.by_kind(kind).num_idle

    def shortage(self, wanted: Counts) -> str | None:
        """Return what :meth:`Pools.shortage` does, without what is pinned."""
        self._pins.release_expired(self._clock())
        return self.pools.shortage(wanted)

    def pin(self, token_ids: Sequence[int], salt: str | None, until: float) -> bool:
        """Keep what a continuation of this text would start from, until a time of the cache's clock.

        Replaces pins of earlier parts of the same text. Pins together hold no more than their share of each pool; the
        oldest are dropped first.

        Returns:
            Whether there was something to pin, small enough.
        """
        self._pins.release_expired(self._clock())
        path, _ = walk(self._roots.get(salt) or Node.root(salt), token_ids)
        _, stored = last_resumable(path, token_ids)
        if stored is None:
            return False
        pages = tuple(node.block for node in stored.node.path())
        return self._pins.add(Pin(stored.node, until, blocks_of(stored.snapshot, pages)))

    def unpin(self) -> None:
        """Let go of all pins, so that what they keep can be evicted."""
        self._pins.clear()

    def pinned(self, kind: PoolKind) -> Counter[int]:
        """Return how many pins hold each block of a kind, as a request would."""
        return self._pins.counts(kind)

    def snapshots(self) -> Iterator[tuple[list[int], str | None, tuple[int, ...], Snapshot]]:
        """Go through what is cached, as ``on_evict`` would be given it; the cache must not change meanwhile."""
        for root in self._roots.values():
            for node in all_pages(root):
                yield from map(_prefix_of, node.snapshots)

    def clear(self) -> None:
        """Give up everything, pins included."""
        self._pins.clear()
        for root in self._roots.values():
            for node in all_pages(root):
                self.pools.attention_pages.drop((node.block,))
                for stored in node.snapshots:
                    self.pools.drop(blocks_of(stored.snapshot))
        self._clear()

    def check_integrity(self) -> None:
        """Check the structure, and that the blocks it names are the ones it holds.

        Raises:
            RuntimeError: they are not.
        """
        held: list[dict[int, int]] = [{} for _ in POOL_KINDS]
        for root in self._roots.values():
            check_structure(root)
            for node in all_pages(root):
                if not node.children and not node.queued:
                    raise RuntimeError(f"prefix cache: page {node.block} can never be evicted")
                for blocks in [blocks_of(None, (node.block,)), *(blocks_of(s.snapshot) for s in node.snapshots)]:
                    for count, numbers in zip(held, blocks, strict=True):
                        for number in numbers:
                            count[number] = count.get(number, 0) + 1
        for pool, count in zip(self.pools.all, held, strict=True):
            pool.check_integrity()
            if any(pool.kept(block) != count.get(block, 0) for block in range(pool.num_taken)):
                raise RuntimeError(f"prefix cache: {pool.name} held are not those of the tree")

    def _insert_page(self, parent: Node, tokens: Tokens, block: int) -> Node:
        child = parent.starting_with(tokens)
        if child is not None:
            return child
        self.pools.attention_pages.keep((block,))
        shorter = parent.continued_by(tokens)
        if shorter is None:
            return parent.add(tokens, block)
        replaced = shorter.block
        parent.extend(shorter, tokens, block)
        self.pools.attention_pages.drop((replaced,))
        return shorter

    def _insert_snapshot(self, node: Node, snapshot: Snapshot, origin: Origin) -> None:
        usable = node.parent.resumable.get(node.tokens[: snapshot.end - node.depth], [])
        for old in [old for old in usable if old.snapshot.end == snapshot.end]:
            if old.snapshot.start <= snapshot.start:
                old.recency = self._usefulness.now
                return
            self._remove_snapshot(old)
        stored = StoredSnapshot(snapshot, node, origin, self._usefulness.now)
        self.pools.keep(blocks_of(snapshot))
        if snapshot.slot is not None:
            self._with_slot.setdefault(snapshot.slot, []).append(stored)
        attach(stored)
        self._snapshots.push(stored)
        self._usefulness.note_stored(origin)
        self.counters.inserted_snapshots += 1

    def _evict(
        self, enough: Callable[[], bool], idle: Callable[[], int], pages: bool, kinds: Sequence[PoolKind]
    ) -> None:
        """Evict pages, and snapshots with blocks of ``kinds``, by what they save, while any are idle, until enough."""
        self._pins.release_expired(self._clock())
        before = [pool.num_free for pool in self.pools.all]
        self._evict_unpinned(enough, idle, pages, kinds)
        while not enough() and self._pins.release_oldest():
            self._evict_unpinned(enough, idle, pages, kinds)
        for kind, pool, free in zip(POOL_KINDS, self.pools.all, before, strict=True):
            self.counters.evicted[kind] += pool.num_free - free

    def _evict_unpinned(
        self, enough: Callable[[], bool], idle: Callable[[], int], pages: bool, kinds: Sequence[PoolKind]
    ) -> None:
        in_use: list[Node] = []
        useless: list[StoredSnapshot] = []
        while not enough() and idle():
            # Pages and snapshots are measured alike; of one kind only, there is nothing to compare.
            leaves = pages and self.pools.attention_pages.num_idle > 0
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
        return any(map(self.pools.by_kind(kind).is_idle, blocks_of(stored.snapshot)[POOL_KINDS.index(kind)]))

    def _evict_leaf(self, in_use: list[Node]) -> None:
        """Evict the last page that saves the least, or find that it is in use."""
        pool = self.pools.attention_pages
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
        parent = leaf.parent
        parent.remove(leaf)
        self.pools.attention_pages.drop((leaf.block,))
        if not parent.children and parent.tokens:
            self._leaves.push(parent)
        elif not parent.children:
            del self._roots[parent.salt]

    def _lose(self, stored: StoredSnapshot) -> None:
        """Give up a snapshot, after offering it to ``on_evict``."""
        if self.on_evict is not None:
            self.on_evict(*_prefix_of(stored))
        self._remove_snapshot(stored)

    def _remove_snapshot(self, stored: StoredSnapshot) -> None:
        detach(stored)
        slot = stored.snapshot.slot
        if slot is not None:
            self._with_slot[slot].remove(stored)
            if not self._with_slot[slot]:
                del self._with_slot[slot]
        self.pools.drop(blocks_of(stored.snapshot))


def _prefix_of(stored: StoredSnapshot) -> tuple[list[int], str | None, tuple[int, ...], Snapshot]:
    path = stored.node.path()
    tokens = [token for node in path for token in node.tokens][: stored.snapshot.end]
    return tokens, stored.node.salt, tuple(node.block for node in path), stored.snapshot
