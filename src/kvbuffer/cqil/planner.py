"""Chooses groups: the least latency by measured costs of layers, within a budget of quality.

The layers of one type form a sequence, which is cut into groups of neighbours. What a group costs in quality is
measured for every candidate by itself (:func:`measure_candidates`), and taken to add up while searching: a price per
nat of divergence makes the choice a shortest path (:func:`cheapest`), the price is bisected, and each plan on the way
is measured as a whole, so that the budget holds for what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvbuffer.cqil.text import Quality, TextModel
from kvbuffer.models.config import ModelConfig

Group = tuple[int, ...]

#: Types of layers, in the order in which their sequences and costs are given.
KINDS = ("linear_attention", "full_attention")
#: Seconds per nat between which the price is sought, and how often the interval is halved (on a logarithmic scale).
_PRICES = (1e-9, 1e6)
_BISECTIONS = 24


class Choice(NamedTuple):
    """A choice of groups, and what it does.

    Attributes:
        groups: of two layers or more.
        bypass: D.
        seconds: of all layers in a decode step, by the costs.
        quality: measured over the text.
    """

    groups: tuple[Group, ...]
    bypass: int
    seconds: float
    quality: Quality


def sequences(config: ModelConfig, everywhere: bool = False) -> list[list[int]]:
    """Return the layers of each type that may be grouped.

    Args:
        config: the model.
        everywhere: the first third and the last layer, too: early layers change the stream the most, and nothing makes
            good what the last one lacks.
    """
    count = config.num_layers
    inner = range(count) if everywhere else range(math.ceil(count / 3), count - 1)
    return [[i for i in inner if config.layer_types[i] == kind] for kind in KINDS]


def candidates(layers: Sequence[int], max_group: int) -> list[Group]:
    """Return all groups of two to ``max_group`` neighbours of a sequence."""
    return [
        tuple(layers[begin : begin + size])
        for size in range(2, max_group + 1)
        for begin in range(len(layers) - size + 1)
    ]


def measure_candidates(
    text: TextModel, layers: Sequence[Sequence[int]], max_group: int, bypass: int, progress: Callable[[str], None]
) -> dict[Group, Quality]:
    """Return the quality of each candidate group by itself."""
    found: dict[Group, Quality] = {}
    groups = [group for sequence in layers for group in candidates(sequence, max_group)]
    for number, group in enumerate(groups, 1):
        progress(f"group {number} of {len(groups)}, bypass {bypass}")
        found[group] = text.quality((group,), bypass)
    return found


def cheapest(
    layers: Sequence[int], seconds: Mapping[int, float], qualities: Mapping[Group, Quality], price: float
) -> tuple[Group, ...]:
    """Return the groups of two or more that cost least, divergence at ``price`` seconds per nat.

    Args:
        layers: one type's, ascending.
        seconds: cost of a group by its size; sizes that are missing are not used.
        qualities: of the candidate groups.
        price: seconds per nat.
    """
    # The best way to cut the first n layers: its cost, and its groups.
    best: list[tuple[float, tuple[Group, ...]]] = [(0.0, ())]
    for end in range(1, len(layers) + 1):
        ways = [(best[end - 1][0] + seconds[1], best[end - 1][1])]
        for size in range(2, end + 1):
            group = tuple(layers[end - size : end])
            if size in seconds and group in qualities:
                cost, groups = best[end - size]
                ways.append((cost + seconds[size] + price * qualities[group].kl, (*groups, group)))
        best.append(min(ways))
    return best[-1][1]


def choose(
    text: TextModel,
    layers: Sequence[Sequence[int]],
    seconds: Sequence[Mapping[int, float]],
    qualities: Mapping[Group, Quality],
    bypass: int,
    within: Callable[[Quality], bool],
) -> Choice:
    """Return the fastest choice found whose measured quality is within the budget.

    Args:
        text: to measure on.
        layers: sequences of layers that may be grouped, one per type.
        seconds: for each type, the cost of a group by its size; 1 for a layer alone; nothing where the model has none.
        qualities: of the candidate groups.
        bypass: D.
        within: whether a quality is within the budget.
    """
    costs = dict(zip(KINDS, seconds, strict=True))
    types = text.model.config.layer_types
    before = sum(costs[kind][1] for kind in types)

    def choice_at(price: float) -> Choice:
        cuts = [cheapest(*of, qualities, price) for of in zip(layers, seconds, strict=True)]
        groups = tuple(sorted(group for cut in cuts for group in cut))
        of_types = [(costs[types[group[0]]], len(group)) for group in groups]
        saved = sum(size * cost[1] - cost[size] for cost, size in of_types)
        return Choice(groups, bypass, before - saved, text.quality(groups, bypass))

    fastest = choice_at(0.0)
    if within(fastest.quality):
        return fastest
    low, high = map(math.log, _PRICES)
    best = Choice((), bypass, before, text.quality(()))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        choice = choice_at(math.exp(middle))
        if within(choice.quality):
            high, best = middle, min(best, choice, key=lambda c: c.seconds)
        else:
            low = middle
    return best
