"""The prefix cache as requests see it: looked up, published to, and evicted from when they need memory.

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
from typing import NamedTuple

from kvbuffer.cache.pools import POOL_KINDS, Blocks, Counts, PoolKind, Pools, blocks_of
from kvbuffer.cache.prefix.eviction import Eviction
from kvbuffer.cache.prefix.pins import Pin, Pins
from kvbuffer.cache.prefix.store import PrefixStore
from kvbuffer.cache.prefix.tree import Node, Origin, StoredSnapshot, last_resumable, walk
from kvbuffer.cache.prefix.usefulness import Usefulness
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
        self.pools, self.counters, self.on_evict = pools, PrefixCounters(), on_evict
        self._store, self._pins = PrefixStore(pools), Pins(pools, pin_share, clock)
        self._start()

    def _start(self) -> None:
        self._usefulness = Usefulness(self.pools)
        self._eviction = Eviction(self._store, self._usefulness, self._pins, self._lose, self.counters.evicted)

    def match(self, token_ids: Sequence[int], salt: str | None, max_tokens: int) -> PrefixMatch:
        """Return the longest usable prefix of a text, of at most ``max_tokens`` tokens.

        Changes nothing but what counts as recently used.
        """
        text = token_ids[:max_tokens]
        path, branch = walk(self._store.root(salt), text)
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
        last = self._store.add_pages(token_ids, salt, attention_pages)
        for page in last.path():
            page.recency = self._usefulness.now
        if not last.children:
            self._eviction.add_leaf(last)
        if snapshot is not None:
            self._insert_snapshot(last, snapshot, origin)

    def _insert_snapshot(self, page: Node, snapshot: Snapshot, origin: Origin) -> None:
        usable = page.parent.resumable.get(page.tokens[: snapshot.end - page.depth], [])
        for old in [old for old in usable if old.snapshot.end == snapshot.end]:
            if old.snapshot.start <= snapshot.start:
                old.recency = self._usefulness.now
                return
            self._store.remove_snapshot(old)
        stored = StoredSnapshot(snapshot, page, origin, self._usefulness.now)
        self._store.add_snapshot(stored)
        self._eviction.add_snapshot(stored)
        self._usefulness.note_stored(origin)
        self.counters.inserted_snapshots += 1

    def evict(self, kind: PoolKind, count: int) -> int:
        """Free at least ``count`` blocks of one pool, or as many as can be; return how many that were.

        Pages go from the ends of paths inward, each with the snapshots that end in it. Pins are for the sake of later
        requests: when nothing else is left, the oldest give way to the one that needs the memory now.
        """
        return self._eviction.free(kind, count)

    def evict_bytes(self, num_bytes: int) -> int:
        """Free at least ``num_bytes`` bytes of whatever saves the least, or as many as can be; return how many."""
        return self._eviction.free_bytes(num_bytes)

    def disown(self, slot: int) -> None:
        """Give up the snapshots with this state, so that a request which holds it can have it alone."""
        for stored in self._store.with_slot(slot):
            self._store.remove_snapshot(stored)

    def num_evictable(self, kind: PoolKind) -> int:
        """Return how many blocks of one pool :meth:`evict` can free without touching what is pinned."""
        self._pins.release_expired()
        return self.pools.by_kind(kind).num_idle

    def shortage(self, wanted: Counts, reserved: int = 0) -> str | None:
        """Return what :meth:`Pools.shortage` does, without what is pinned."""
        self._pins.release_expired()
        return self.pools.shortage(wanted, reserved)

    def pin(self, token_ids: Sequence[int], salt: str | None, until: float) -> bool:
        """Keep what a continuation of this text would start from, until a time of the cache's clock.

        Replaces pins of earlier parts of the same text. Pins together hold no more than their share of each pool; the
        oldest are dropped first.

        Returns:
            Whether there was something to pin, small enough.
        """
        self._pins.release_expired()
        path, _ = walk(self._store.root(salt), token_ids)
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
        for page in self._store.pages():
            yield from map(_prefix_of, page.snapshots)

    def clear(self) -> None:
        """Give up everything, pins included."""
        self._pins.clear()
        self._store.clear()
        self._start()

    def _lose(self, stored: StoredSnapshot) -> None:
        """Give up a snapshot, after offering it to ``on_evict``."""
        if self.on_evict is not None:
            self.on_evict(*_prefix_of(stored))
        self._store.remove_snapshot(stored)

    def check_integrity(self) -> None:
        """Check the structure, that it names the blocks that are held, and that all of it can be evicted.

        Raises:
            RuntimeError: a bug.
        """
        self._store.check_integrity()
        self._eviction.check_integrity()


def _prefix_of(stored: StoredSnapshot) -> tuple[list[int], str | None, tuple[int, ...], Snapshot]:
    path = stored.node.path()
    tokens = [token for node in path for token in node.tokens][: stored.snapshot.end]
    return tokens, stored.node.salt, tuple(node.block for node in path), stored.snapshot
