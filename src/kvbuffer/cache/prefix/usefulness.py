"""What cached prefixes are worth: what was not used for longest is worth least, unless it would save much per byte."""

from __future__ import annotations

import math
from itertools import chain

from kvbuffer.cache.pools import Counts, Pools, blocks_of, counts_of
from kvbuffer.cache.prefix.tree import Node, Origin, StoredSnapshot, previous_end
from kvbuffer.ops.attention import PAGE_SIZE

#: Of each kind of snapshot, how many the odds are learned from, about.
_REMEMBERED = 1000
#: Mean times to reuse in which expectations fade by e. The mean is of what was reused while it was there, so short of
#: the truth; benchmarks/prefix_simulation.py does best with about 2.
_PATIENCE = 2.0
#: Tokens per byte of what nothing is expected from.
_WORTHLESS = 1e-30


class Usefulness:
    """Priorities of snapshots and last pages: what they will save, as far as what happened before tells.

    A snapshot saves computing the tokens since the one before it on its path. Per byte (Marconi, arXiv 2411.19379) this
    counts as likely as it is to happen, which is learned for each origin and number of uses so far: a chat goes on from
    the ends of outputs and not twice from one, thoughts left out of later prompts make it the ends of prompts, samples
    of one prompt all start from its end.

    Expectations fade exponentially while nothing happens, at a pace set by the mean time to reuse. So the order by what
    is left of them, v exp(-idle / pace), is the order by last use + pace log(v), which stands still until something is
    used. A pace of 0 is least recently used first.

    Args:
        pools: for the sizes of blocks.

    Attributes:
        now: the time, in requests started.
    """

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.now = 0
        self._mean_idle, self._num_uses = 0.0, 0
        self._stored: dict[tuple[Origin, int], float] = {}
        self._used: dict[tuple[Origin, int], float] = {}

    def note_stored(self, origin: Origin) -> None:
        """Note that a snapshot was stored."""
        self._enter((origin, 0))

    def note_used(self, stored: StoredSnapshot) -> None:
        """Note that a request started from a snapshot."""
        kind = _kind(stored)
        self._used[kind] = self._used.get(kind, 0.0) + 1
        self._num_uses = min(self._num_uses + 1, _REMEMBERED)
        self._mean_idle += (self.now - stored.last_used - self._mean_idle) / self._num_uses
        stored.uses, stored.last_used = stored.uses + 1, self.now
        self._enter(_kind(stored))

    def of_snapshot(self, stored: StoredSnapshot) -> float:
        """Return the priority of a snapshot: its tokens would have to be computed again from the one before it."""
        size = self._pools.bytes_of(counts_of(blocks_of(stored.snapshot)))
        return self._priority(stored.recency, self._odds(stored) * _saved(stored) / max(size, 1))

    def of_leaf(self, leaf: Node) -> float:
        """Return the priority of a last page, with its snapshots and the pages before that only serve these."""
        if not leaf.snapshots:
            return self._priority(leaf.recency, 0.0)
        saved = [_saved(stored) for stored in leaf.snapshots]
        held = zip(*(blocks_of(stored.snapshot) for stored in leaf.snapshots), strict=True)
        counts = Counts(*(len(set(chain.from_iterable(numbers))) for numbers in held))
        counts = counts._replace(attention_pages=math.ceil(sum(saved) / PAGE_SIZE))
        value = sum(self._odds(stored) * tokens for stored, tokens in zip(leaf.snapshots, saved, strict=True))
        return self._priority(leaf.recency, value / max(self._pools.bytes_of(counts), 1))

    def _priority(self, recency: float, value: float) -> float:
        return recency + _PATIENCE * max(self._mean_idle, 1.0) * math.log(max(value, _WORTHLESS))

    def _odds(self, stored: StoredSnapshot) -> float:
        """How likely a snapshot is to be used; 1/2 for kinds unseen."""
        kind = _kind(stored)
        return (self._used.get(kind, 0.0) + 1) / (self._stored.get(kind, 0.0) + 2)

    def _enter(self, kind: tuple[Origin, int]) -> None:
        self._stored[kind] = self._stored.get(kind, 0.0) + 1
        if self._stored[kind] > _REMEMBERED:
            self._stored[kind] /= 2
            self._used[kind] = self._used.get(kind, 0.0) / 2


def _kind(stored: StoredSnapshot) -> tuple[Origin, int]:
    return stored.origin, min(stored.uses, 2)


def _saved(stored: StoredSnapshot) -> int:
    return stored.snapshot.end - previous_end(stored)
