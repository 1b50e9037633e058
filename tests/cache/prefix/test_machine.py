"""Whatever is published, evicted and pinned, a match is the longest prefix by definition, and references balance."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbuffer.cache.pools import POOL_KINDS, Blocks, PoolKind, blocks_of
from kvbuffer.cache.prefix import PrefixCache
from kvbuffer.cache.snapshot import Snapshot
from tests.support.prefixes import Writer, make_pools

SALTS = st.sampled_from([None, "one", "other"])
# Texts that share beginnings of any length: stretches of one of two tokens.
TEXTS = st.lists(st.tuples(st.booleans(), st.sampled_from([1, 2, 7, 15, 16, 17, 40])), min_size=1, max_size=4).map(
    lambda runs: [int(token) for token, length in runs for _ in range(length)]
)


class Published(NamedTuple):
    """A snapshot that the cache should have."""

    salt: str | None
    text: list[int]
    snapshot: Snapshot


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class PrefixCacheMachine(RuleBasedStateMachine):
    """Stands for an engine and its requests; the model is the list of snapshots published and not given up."""

    def __init__(self) -> None:
        super().__init__()
        self.pools, self.now = make_pools(slots=6, record_pages=7, rings=8, pages=24), 0.0
        self.cache = PrefixCache(self.pools, on_evict=self.forget, clock=lambda: self.now, pin_share=0.6)
        self.writer = Writer(self.pools, self.cache)
        self.published: list[Published] = []
        self.texts: list[tuple[str | None, list[int]]] = []  # every text whose pages were ever published
        self.pages_evicted = False
        self.requests: list[Blocks] = []

    def forget(self, tokens: list[int], salt: str | None, pages: tuple[int, ...], snapshot: Snapshot) -> None:
        assert self.writer.page_texts[pages[-1]][: len(tokens)] == tokens
        self.published.remove(Published(salt, tokens, snapshot))

    @rule(salt=SALTS, text=TEXTS, window=st.none() | st.integers(0, 40), with_slot=st.booleans(), ends=st.booleans())
    def publish(self, salt: str | None, text: list[int], window: int | None, with_slot: bool, ends: bool) -> None:
        if not self.writer.has_room(len(text)):
            return
        blocks = self.writer.compute(text, None)
        snapshot = None if window is None else self.writer.snapshot(text, window, with_slot)
        self.cache.insert(text, salt, blocks.attention_pages, snapshot)
        self.texts.append((salt, text))
        if snapshot is not None:
            same = [old for old in self.published if old[:2] == (salt, text)]
            if not any(old.snapshot.start <= snapshot.start for old in same):
                self.published = [old for old in self.published if old not in same]
                self.published.append(Published(salt, text, snapshot))
        self.requests.append(blocks_of(snapshot, blocks.attention_pages))
        if ends:
            self.pools.give_back(self.requests.pop())

    @rule(salt=SALTS, text=TEXTS, most=st.integers(0, 100), start=st.booleans())
    def look_up(self, salt: str | None, text: list[int], most: int, start: bool) -> None:
        match = self.cache.match(text, salt, most)
        self.writer.check(match, text)
        best = 0
        for entry in self.published:
            agreed = min(common(entry.text, text), most) if entry.salt == salt else 0
            if agreed >= entry.snapshot.start:
                best = max(best, agreed)
        assert match.num_tokens == best
        known = max((common(known, text) for other, known in self.texts if other == salt), default=0)
        assert best <= match.branch <= min(known, most)
        assert self.pages_evicted or match.branch == min(known, most)
        if start:
            self.cache.acquire(match)
            self.requests.append(match.blocks)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pools.give_back(self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1))))

    @rule(kind=st.sampled_from(POOL_KINDS), count=st.integers(1, 9))
    def evict(self, kind: PoolKind, count: int) -> None:
        promised, free = self.cache.num_evictable(kind), self.pools.by_kind(kind).num_free
        freed = self.cache.evict(kind, count)
        assert freed == self.pools.by_kind(kind).num_free - free >= min(promised, count)
        self.pages_evicted |= kind == "attention_pages"

    @rule(size=st.integers(1, 3000))
    def evict_whatever_saves_least(self, size: int) -> None:
        self.cache.num_evictable("slots")  # lets go of pins whose time is over
        promised, free = self.pools.idle_bytes, self.pools.free_bytes
        freed = self.cache.evict_bytes(size)
        assert freed == self.pools.free_bytes - free >= min(promised, size)
        self.pages_evicted = True

    @rule(salt=SALTS, text=TEXTS, seconds=st.integers(1, 3))
    def pin(self, salt: str | None, text: list[int], seconds: int) -> None:
        resumable = self.cache.match(text, salt, len(text)).num_tokens
        if self.cache.pin(text, salt, self.now + seconds):
            for kind in POOL_KINDS:
                self.cache.evict(kind, self.cache.num_evictable(kind))
            self.pages_evicted = True
            assert self.cache.match(text, salt, len(text)).num_tokens == resumable > 0

    @rule()
    def wait(self) -> None:
        self.now += 1

    @invariant()
    def references_balance(self) -> None:
        self.cache.check_integrity()

    def teardown(self) -> None:
        self.cache.clear()
        for blocks in self.requests:
            self.pools.give_back(blocks)
        assert self.writer.in_use() == [0, 0, 0, 0]


TestPrefixCache = PrefixCacheMachine.TestCase
TestPrefixCache.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
