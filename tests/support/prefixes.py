"""A prefix cache with a writer, which takes blocks as a request does and knows what each block holds."""

from __future__ import annotations

from collections.abc import Sequence

from kvbuffer.cache.plan import attention_pages
from kvbuffer.cache.pools import POOL_KINDS, Blocks, Counts, Pools, blocks_of
from kvbuffer.cache.prefix import PrefixCache, PrefixMatch
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.ops.attention import PAGE_SIZE


def make_pools(slots: int = 8, record_pages: int = 8, rings: int = 8, pages: int = 64, budget: int = 1 << 20) -> Pools:
    """Pools whose blocks have unlike sizes."""
    sizes = slots, record_pages, rings, pages
    return Pools.make(Counts(*sizes), (1000, 100, 10, 200), budget)


class Writer:
    """Stands for the engine: computes texts, publishes them, and writes down what is in each block."""

    def __init__(self, pools: Pools, cache: PrefixCache) -> None:
        self.pools, self.cache = pools, cache
        self.page_texts: dict[int, list[int]] = {}  # the whole text up to the last token of the page
        self.slot_texts: dict[int, list[int]] = {}

    def has_room(self, num_tokens: int) -> bool:
        """Whether a text of this length can be computed, with a snapshot."""
        pools = self.pools
        enough = attention_pages(num_tokens) <= pools.attention_pages.num_free
        return enough and all(pool.num_free for pool in (pools.slots, pools.record_pages, pools.rings))

    def snapshot(self, text: Sequence[int], window: int = 0, with_slot: bool = True) -> Snapshot:
        """The memory of a text; its last ``window`` tokens can be taken back."""
        slot = self.pools.slots.take(1)[0] if with_slot else None
        if slot is not None:
            self.slot_texts[slot] = list(text)
        start = max(0, len(text) - window)
        records = tuple(self.pools.record_pages.take(1))
        ring = self.pools.rings.take(1)[0]
        return Snapshot(start, len(text), start if with_slot else 0, slot, records, ring)

    def compute(self, text: Sequence[int], window: int | None = 0, with_slot: bool = True) -> Blocks:
        """Take and fill blocks for a text; ``window`` None is for no snapshot."""
        pages = tuple(self.pools.attention_pages.take(attention_pages(len(text))))
        for index, page in enumerate(pages):
            self.page_texts[page] = list(text[: (index + 1) * PAGE_SIZE])
        return blocks_of(None if window is None else self.snapshot(text, window, with_slot), pages)

    def publish(
        self, text: Sequence[int], window: int | None = 0, salt: str | None = None, with_slot: bool = True
    ) -> Blocks:
        """Compute a text, publish it, and leave its blocks to the cache; return them."""
        pages = self.compute(text, None).attention_pages
        snapshot = None if window is None else self.snapshot(text, window, with_slot)
        self.cache.insert(text, salt, pages, snapshot)
        blocks = blocks_of(snapshot, pages)
        self.pools.give_back(blocks)
        return blocks

    def check(self, match: PrefixMatch, text: Sequence[int]) -> None:
        """Check that the blocks of a match hold the text that they were found for."""
        t = match.num_tokens
        assert len(match.attention_pages) == t // PAGE_SIZE
        assert (match.partial_page is not None) == (t % PAGE_SIZE > 0)
        for index, page in enumerate(match.attention_pages):
            assert self.page_texts[page] == list(text[: (index + 1) * PAGE_SIZE])
        if match.partial_page is not None:
            assert self.page_texts[match.partial_page][:t] == list(text[:t])
        assert (match.snapshot is not None) == (t > 0)
        if match.snapshot is not None:
            assert match.snapshot.start <= t <= match.snapshot.end
            if match.snapshot.slot is not None:
                assert self.slot_texts[match.snapshot.slot][:t] == list(text[:t])

    def in_use(self) -> list[int]:
        """Blocks in use, by pool."""
        return [self.pools.by_kind(kind).num_used for kind in POOL_KINDS]


Evicted = tuple[list[int], str | None, tuple[int, ...], Snapshot]


class Bench:
    """A cache, its writer, its clock, and what eviction reported."""

    def __init__(self, pools: Pools | None = None, **sizes: int) -> None:
        self.pools, self.now, self.evicted = pools or make_pools(**sizes), 0.0, list[Evicted]()
        self.cache = PrefixCache(self.pools, on_evict=self.note, clock=lambda: self.now, pin_share=0.5)
        self.writer = Writer(self.pools, self.cache)

    def note(self, *lost: object) -> None:
        tokens, _, pages, _ = lost
        assert self.writer.page_texts[pages[-1]][: len(tokens)] == tokens
        assert all(self.pools.attention_pages.references(page) for page in pages)
        self.evicted.append(lost)

    def match(self, text: list[int], salt: str | None = None) -> PrefixMatch:
        match = self.cache.match(text, salt, len(text))
        self.writer.check(match, text)
        self.cache.check_integrity()
        return match

    def hit(self, text: list[int], salt: str | None = None) -> tuple[int, int]:
        match = self.match(text, salt)
        return match.num_tokens, match.branch


def other(text: list[int], position: int) -> list[int]:
    """The same text with another token at ``position``, and others after it."""
    return [*text[:position], *(token + 1000 for token in text[position:])]
