"""Prefix caches without a model: what each would have found, under a budget of bytes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from kvbuffer.cache.plan import PROMPT_TAIL, RING_SLACK, attention_pages, block_bytes
from kvbuffer.cache.pools import Blocks, Counts, Pools
from kvbuffer.cache.prefix import Origin, PrefixCache, checkpoint_positions
from kvbuffer.cache.shapes import CacheShape, LinearShape
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.ops.attention import PAGE_SIZE
from prefix_traces import Request

#: Qwen3-Next-80B-A3B.
SHAPE = CacheShape(
    layer_types=("linear_attention", "linear_attention", "linear_attention", "full_attention") * 12,
    linear=LinearShape(num_key_heads=16, num_value_heads=32, key_head_dim=128, value_head_dim=128, conv_kernel=4),
    num_kv_heads=2,
    head_dim=256,
    max_position_embeddings=262144,
)
PREFILL_CHUNK = 2048


class Bytes(NamedTuple):
    """Bytes of each kind of block."""

    state: int
    record_page: int
    ring_input: int
    attention_page: int

    @property
    def plain_snapshot(self) -> int:
        """A state with the convolutions' last inputs: what other caches keep."""
        return self.state + (SHAPE.linear.conv_kernel - 1) * self.ring_input

    @property
    def ring(self) -> int:
        """Convolution inputs of a snapshot that can be taken back."""
        return (SHAPE.linear.conv_kernel - 1 + RING_SLACK) * self.ring_input

    @property
    def snapshot(self) -> int:
        """A snapshot of ours: the state before its last tokens, their records, and the convolutions' inputs."""
        return self.state + self.record_page + self.ring


def true_bytes() -> Bytes:
    """Return the sizes as the memory plan has them, all in bfloat16."""
    dtype = torch.bfloat16
    each = block_bytes(SHAPE, dtype, dtype, dtype, ring_len=1)
    return Bytes(each.slot, each.record_page, each.ring, each.attention_page)


class System(Protocol):
    """A prefix cache that sees one request after the other."""

    def serve(self, request: Request) -> int:
        """Return the prompt's tokens that need not be computed, and cache what the request leaves."""


class NoCache:
    """Computes everything."""

    def serve(self, request: Request) -> int:
        return 0


class Oracle:
    """Finds every prefix that was ever computed, in memory without bounds.

    Attributes:
        unbounded_bytes: what a cache is left with that gives nothing up: the pages of all texts, and the final state of
            each request.
        least_bytes: what its hits take at least: the pages, and a plain snapshot at each position that was a hit.
    """

    def __init__(self, sizes: Bytes, num_tokens: int) -> None:
        self._sizes = sizes
        pages, each = num_tokens // PAGE_SIZE + 1, (0, 0, 0, sizes.attention_page)
        pools = Pools.make(Counts(attention_pages=pages), each, pages * sizes.attention_page)
        self._pages, self._cache = pools.attention_pages, PrefixCache(pools)
        self._hits: set[Hashable] = set()
        self._requests = 0

    def serve(self, request: Request) -> int:
        found = self._cache.match(request.prompt, None, len(request.prompt) - 1).branch
        if found:
            self._hits.add(hash(tuple(request.prompt[:found])))
        self._requests += 1
        text = request.prompt + request.output
        pages = self._pages.take(attention_pages(len(text)))
        self._cache.insert(text, None, pages, None)
        self._pages.give_back(pages)
        return found

    @property
    def unbounded_bytes(self) -> int:
        return self._pages.num_used * self._sizes.attention_page + self._requests * self._sizes.plain_snapshot

    @property
    def least_bytes(self) -> int:
        return self._pages.num_used * self._sizes.attention_page + len(self._hits) * self._sizes.plain_snapshot


class LruCache:
    """Blocks of tokens and states in one pool, the longest unused given up first.

    Args:
        budget: bytes in all.
        sizes: bytes of blocks.
        block: tokens of a block of keys and values.
        at_blocks: keep a state after each full block, as vLLM does for hybrid models; otherwise at the very end of
            each request, only.
    """

    def __init__(self, budget: int, sizes: Bytes, block: int, at_blocks: bool) -> None:
        self._budget, self._block, self._at_blocks = budget, block, at_blocks
        self._state_bytes, self._block_bytes = sizes.plain_snapshot, sizes.attention_page * block // PAGE_SIZE
        self._items: OrderedDict[Hashable, int] = OrderedDict()  # bytes, the longest unused first
        self._ends: dict[int, set[tuple[int, ...]]] = {}  # what follows full blocks before a state
        self._used = 0

    def serve(self, request: Request) -> int:
        found = self._match(request.prompt, len(request.prompt) - 1)
        self._store(request.prompt + request.output)
        return found

    def _match(self, prompt: Sequence[int], most: int) -> int:
        chain = self._chain(prompt)
        for index in range(len(chain) - 1, -1, -1):
            start = index * self._block
            ends = self._ends.get(chain[index], ())
            for rest in sorted(ends, key=len, reverse=True):
                position = start + len(rest)
                if position > most or tuple(prompt[start:position]) != rest:
                    continue
                needed = self._needed(chain[: index + 1], rest)
                if all(key in self._items for key in needed):
                    for key in reversed(needed):
                        self._items.move_to_end(key)
                    return position
        return 0

    def _store(self, text: Sequence[int]) -> None:
        chain = self._chain(text)
        if self._at_blocks:
            wanted = [("kv", key) for key in chain[1:]] + [("state", key, ()) for key in chain[1:]]
        else:
            wanted = self._needed(chain, tuple(text[(len(chain) - 1) * self._block :]))
        for key in reversed(wanted):  # the end of a text goes before its beginning
            if key in self._items:
                if key[0] == "kv":  # of the states, only the one a request starts from is used
                    self._items.move_to_end(key)
                continue
            size = self._state_bytes if key[0] == "state" else self._block_bytes
            self._items[key] = size
            self._used += size
            if key[0] == "state":
                self._ends.setdefault(key[1], set()).add(key[2])
        while self._used > self._budget:
            key, size = self._items.popitem(last=False)
            self._used -= size
            if key[0] == "state":
                self._ends[key[1]].discard(key[2])

    def _needed(self, chain: list[int], rest: tuple[int, ...]) -> list[tuple]:
        """What a hit takes: the blocks, a partial one too, and the state."""
        partial = [("kv", chain[-1], rest)] if rest else []
        return [("kv", key) for key in chain[1:]] + partial + [("state", chain[-1], rest)]

    def _chain(self, text: Sequence[int]) -> list[int]:
        """Names of the text up to each full block; the first is of nothing."""
        chain = [0]
        for start in range(0, len(text) - self._block + 1, self._block):
            chain.append(hash((chain[-1], tuple(text[start : start + self._block]))))
        return chain


class Ours:
    """The engine's prefix cache and policy, with one running request's own memory, under one budget of bytes."""

    def __init__(self, budget: int, sizes: Bytes) -> None:
        each = (sizes.state, sizes.record_page, sizes.ring, sizes.attention_page)
        self._pools = Pools.make(Counts(*(budget // size for size in each)), each, budget)
        self._now = 0.0
        self._cache = PrefixCache(self._pools, clock=lambda: self._now)

    def serve(self, request: Request) -> int:
        self._now = request.time
        prompt, text = request.prompt, request.prompt + request.output
        match = self._cache.match(prompt, None, len(prompt) - 1)
        self._cache.acquire(match)
        shared = match.attention_pages
        wanted = checkpoint_positions(match, len(prompt), self._pools.room("slots"), chunk=PREFILL_CHUNK)
        pages = [*shared, *self._take_pages(attention_pages(len(text)) - len(shared))]
        for position in wanted:
            self._publish(text, pages, position, {position: "branch" if position == match.branch else "chunk"})
        before_tail = max(0, len(prompt) - PROMPT_TAIL)
        ends: dict[int, Origin] = {before_tail: "tail"} if before_tail else {}
        self._publish(text, pages, before_tail, {**ends, len(prompt): "prompt"})
        self._publish(text, pages, len(text) - 1, {len(text): "output"})
        self._pools.give_back(match.blocks)
        self._pools.attention_pages.give_back(pages[len(shared) :])
        if request.ttl:
            self._cache.pin(text, None, request.time + request.ttl)
        return match.num_tokens

    def _publish(self, text: list[int], pages: list[int], checkpoint: int, ends: Mapping[int, Origin]) -> None:
        """Publish the state of ``checkpoint`` tokens for some beginnings of a text, with records of what follows."""
        each = Counts(1, int(max(ends) > checkpoint), len(ends))
        if self._pools.shortage(each) is not None:
            return
        self._make_room(each)
        (slot,), records, rings = (pool.take(count) for pool, count in zip(self._pools[:3], each[:3], strict=True))
        for (end, origin), ring in zip(ends.items(), rings, strict=True):
            held = tuple(records) if end > checkpoint else ()
            snapshot = Snapshot(max(checkpoint, end - RING_SLACK), end, checkpoint, slot, held, ring)
            self._cache.insert(text[:end], None, pages[: attention_pages(end)], snapshot, origin)
        self._pools.give_back(Blocks((slot,), tuple(records), tuple(rings)))

    def _take_pages(self, count: int) -> list[int]:
        self._make_room(Counts(attention_pages=count))
        return self._pools.attention_pages.take(count)

    def _make_room(self, wanted: Counts) -> None:
        missing = self._pools.bytes_of(wanted) - self._pools.free_bytes
        if missing > 0:
            self._cache.evict_bytes(missing)


def hit_tokens(system: System, requests: Iterable[Request]) -> int:
    """Return the prompt tokens of all requests that need not be computed."""
    return sum(system.serve(request) for request in requests)


def systems(budget: int, sizes: Bytes) -> dict[str, System]:
    """Return the caches that are compared, each within ``budget`` bytes."""
    return {
        "kvbuffer": Ours(budget, sizes),
        "blocks of 528, LRU": LruCache(budget, sizes, 528, at_blocks=True),
        "final states, LRU": LruCache(budget, sizes, PAGE_SIZE, at_blocks=False),
        "none": NoCache(),
    }


def longest_text(requests: Iterable[Request]) -> int:
    """Return the most tokens of a request, prompt and output."""
    return max(len(request.prompt) + len(request.output) for request in requests)


def num_tokens(requests: Iterable[Request]) -> int:
    """Return the tokens of all requests, each rounded up to pages."""
    return sum(math.ceil((len(request.prompt) + len(request.output)) / PAGE_SIZE) * PAGE_SIZE for request in requests)
