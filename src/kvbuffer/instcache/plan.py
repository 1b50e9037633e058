"""What a cache will hold and hit, before anything is built.

The hit rate H(sigma) is the share of held-out instructions that cost at most sigma. The number of entries N(sigma) is
estimated by walks down the predictor's tree (Knuth 1975): a walk goes to a child with the probability that the model
gives it among those within sigma, and every instruction that it passes counts for one over the probability of having
come there. The mean over walks is unbiased; so is the same for the nodes that a search would compute.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvbuffer.instcache.predictor import Predictor
from kvbuffer.instcache.search import Float64
from kvbuffer.instcache.tree import MAX_BATCH, Float32, Int32

_Z = 1.96  # 95 %
_RESAMPLES = 400


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Passed(NamedTuple):
    """What walks have passed: in which walk, at which cost, and what each counts for."""

    walks: npt.NDArray[np.int64]
    costs: Float64
    weights: Float64


class Row(NamedTuple):
    """The plan for one sigma.

    Attributes:
        sigma: the bound, in nats.
        hit_rate: share of instructions that will be answered.
        entries: instructions to be found.
        num_bytes: size of the store; as uncertain as ``entries``.
        seconds: time to find them.
    """

    sigma: float
    hit_rate: Interval
    entries: Interval
    num_bytes: float
    seconds: float


class Walks:
    """Walks down a predictor's tree.

    Args:
        predictor: the model.
        sigma: the largest bound of interest; estimates are for any up to it.
        num_walks: more of them make the interval narrower, by the square root.
        seed: makes them reproducible.

    Attributes:
        seconds_per_node: what computing a node took.
    """

    def __init__(self, predictor: Predictor, sigma: float, num_walks: int = 2048, seed: int = 0) -> None:
        self._predictor, self._sigma, self._num_walks = predictor, sigma, num_walks
        self._rng = np.random.default_rng(seed)
        self._forbidden = np.flatnonzero(~np.array(predictor.allowed, bool))
        self._entries: list[Passed] = []
        self._nodes: list[Passed] = []
        before, began = predictor.tree.num_evaluated, time.perf_counter()
        at_once = min(MAX_BATCH, predictor.tree.num_free // (predictor.tree.max_tokens + 1))
        for first in range(0, num_walks, at_once):
            self._walk(np.arange(first, min(num_walks, first + at_once)))
        computed = predictor.tree.num_evaluated - before
        self.seconds_per_node = (time.perf_counter() - began) / max(1, computed)

    def _walk(self, walks: npt.NDArray[np.int64]) -> None:
        tree, turn = self._predictor.tree, self._predictor.turn
        count = len(walks)
        nodes: Int32 = np.full(count, tree.root, np.int32)
        following: Float32 = np.repeat(tree.root_costs[None], count, 0)
        costs, weights = np.zeros(count), np.ones(count)
        tree.hold(np.array([tree.root], np.int32), count)
        while count:
            ends = costs + following[:, turn.end]
            ending = np.flatnonzero(ends <= self._sigma)
            texts = tree.texts(nodes[ending])
            ending = ending[[turn.text(text) is not None for text in texts]] if texts else ending
            self._entries.append(Passed(walks[ending], ends[ending], weights[ending]))
            chosen, tokens, choice = self._choose(following, costs, tree.depth(nodes))
            stopped = np.setdiff1d(np.arange(count), chosen)
            tree.drop(nodes[stopped])
            walks, parents = walks[chosen], nodes[chosen]
            costs = costs[chosen] + following[chosen, tokens]
            weights = weights[chosen] / choice
            count = len(chosen)
            if count:
                self._nodes.append(Passed(walks, costs, weights))
                nodes, following = tree.append(parents, tokens)
                tree.hold(nodes, 1)

    def _choose(
        self, following: Float32, costs: Float64, depths: Int32
    ) -> tuple[npt.NDArray[np.int64], Int32, Float64]:
        """Return the walks that go on, the token that each takes, and the probability with which it does."""
        shares = np.exp(-following.astype(np.float64))
        shares[following + costs[:, None] > self._sigma] = 0.0
        shares[:, self._predictor.turn.end] = 0.0
        shares[:, self._forbidden] = 0.0
        shares[depths >= self._predictor.tree.max_tokens] = 0.0
        sums = np.cumsum(shares, axis=1)
        going = np.flatnonzero(sums[:, -1] > 0)
        sums, shares = sums[going], shares[going]
        drawn = self._rng.random(len(going)) * sums[:, -1]
        # The first token whose cumulative share exceeds what was drawn has a share of its own.
        tokens = (sums <= drawn[:, None]).sum(1).astype(np.int32)
        return going, tokens, shares[np.arange(len(going)), tokens] / sums[:, -1]

    def entries(self, sigma: float) -> Interval:
        """Return the number of instructions that cost at most ``sigma``."""
        return self._estimate(self._entries, sigma)

    def nodes(self, sigma: float) -> Interval:
        """Return the number of nodes that a search with ``sigma`` computes."""
        return self._estimate(self._nodes, sigma)

    def _estimate(self, passed: Sequence[Passed], sigma: float) -> Interval:
        totals = np.zeros(self._num_walks)
        for walks, costs, weights in passed:
            within = costs <= sigma
            np.add.at(totals, walks[within], weights[within])
        rng = np.random.default_rng(1)
        means = [rng.choice(totals, len(totals)).mean() for _ in range(_RESAMPLES)]
        low, high = np.percentile(means, [2.5, 97.5])
        return Interval(float(totals.mean()), float(low), float(high))


def hit_rate(costs: Float64, sigma: float) -> Interval:
    """Return the share of instructions that cost at most ``sigma``, with Wilson's interval."""
    n = len(costs)
    p = float(np.count_nonzero(costs <= sigma)) / n
    centre, spread = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    scale = 1 + _Z**2 / n
    return Interval(p, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def plan(
    walks: Walks, costs: Float64, sigmas: Sequence[float], bytes_per_entry: float, seconds_per_entry: float = 0.0
) -> list[Row]:
    """Return a row for each of ``sigmas``.

    Args:
        walks: made for the largest of them.
        costs: of held-out instructions, as often as they were asked.
        sigmas: the bounds.
        bytes_per_entry: of a store.
        seconds_per_entry: what answering an instruction takes, beside finding it.
    """
    rows = []
    for sigma in sigmas:
        entries = walks.entries(sigma)
        seconds = walks.nodes(sigma).value * walks.seconds_per_node + entries.value * seconds_per_entry
        rows.append(Row(sigma, hit_rate(costs, sigma), entries, entries.value * bytes_per_entry, seconds))
    return rows


def choose(rows: Sequence[Row], max_bytes: float = math.inf, max_seconds: float = math.inf) -> Row | None:
    """Return the row with the largest sigma that surely fits: by the upper end of the interval. None if none does."""
    fitting = []
    for row in rows:
        excess = row.entries.high / row.entries.value if row.entries.value else 1.0
        if row.num_bytes * excess <= max_bytes and row.seconds * excess <= max_seconds:
            fitting.append(row)
    return max(fitting, key=lambda row: row.sigma, default=None)
