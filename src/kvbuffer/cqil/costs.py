"""What layers and groups of them cost in a decode step, measured in whole steps of whole models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from kvbuffer.cache.shapes import run_order
from kvbuffer.cache.store import allocate
from kvbuffer.cqil.planner import KINDS
from kvbuffer.cqil.text import batch_of, memory_for
from kvbuffer.engine.ranks import ProcessRanks, start_ranks
from kvbuffer.models.decoder import Decoder

#: Tokens before the one that is decoded.
CONTEXT = 128


class Steps:
    """A model that decodes a token of each of ``batch`` requests at a time, with a clock at every layer.

    Args:
        model: with groups or without.
        groups: the groups it has.
        batch: requests.

    Attributes:
        model: the model.
        units: layers and groups in the order in which they run.
    """

    def __init__(self, model: Decoder, groups: Sequence[tuple[int, ...]], batch: int) -> None:
        shape = replace(model.config.cache_shape, groups=tuple(groups))
        plan = memory_for(model, batch, CONTEXT + 1)
        self.units = run_order(model.config.num_layers, groups)
        self.model, self._caches = model, allocate(shape, plan)
        tokens = torch.randint(model.config.vocab_size, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
        model.forward(batch_of(tokens, 0, plan), self._caches)
        self._inputs = batch_of(tokens[:, :1], CONTEXT, plan)

    @torch.inference_mode()
    def step(self) -> list[float]:
        """Return the seconds that each unit takes, and at last those of embedding and head."""
        model, inputs, x = self.model, self._inputs, None
        clock = [time.perf_counter()]
        residual = model.embed(inputs.token_ids)
        clock.append(time.perf_counter())
        for layer, cache in zip(model.layers, self._caches, strict=True):
            x = layer.forward(x, residual, inputs, cache)
            clock.append(time.perf_counter())
        model.lm_head.of_add_rms_norm(x, residual, model.norm, model.config.rms_norm_eps)
        clock.append(time.perf_counter())
        embedding, *units, head = (end - begin for begin, end in pairwise(clock))
        return [*units, embedding + head]


def take_turns(models: Sequence[Steps], rounds: int) -> list[list[float]]:
    """Return the median seconds of each model's units; the models take turns, so that all see the same machine."""
    times: list[list[list[float]]] = [[] for _ in models]
    for _ in range(rounds):
        for model, steps in zip(models, times, strict=True):
            model.step()  # the one before found other weights in the caches
            steps.append(model.step())
    return [[median(unit) for unit in zip(*steps, strict=True)] for steps in times]


def group_costs(
    folder: Path, model: Decoder, layers: Sequence[Sequence[int]], max_group: int, batch: int, rounds: int
) -> list[dict[int, float]]:
    """Return what layers cost in a decode step, fused on this device.

    For each size of a group the model is loaded once more, cut into as many such groups as it has room for.

    Args:
        folder: the checkpoint.
        model: without groups.
        layers: for each of :data:`~kvbuffer.cqil.planner.KINDS` the layers that may be grouped.
        max_group: largest size.
        batch: requests that decode together.
        rounds: steps that are timed.

    Returns:
        For each of them, seconds by size of a group; 1 is a layer alone. Nothing where the model has no such layers.
    """
    alone = Steps(model, (), batch)
    costs = _means(alone, *take_turns([alone], rounds))
    for size in range(2, max_group + 1):
        groups = [
            tuple(sequence[begin : begin + size])
            for sequence in layers
            for begin in range(0, len(sequence) - size + 1, size)
        ]
        if not groups:
            break
        grouped = Decoder(
            folder, model.config, model.dtype, CONTEXT + 1, show_progress=False, groups=groups, bypass=size
        )
        turns = (alone, Steps(grouped, groups, batch))
        by_themselves, together = (_means(*of) for of in zip(turns, take_turns(turns, rounds), strict=True))
        for cost, single, several in zip(costs, by_themselves, together, strict=True):
            if size in several:
                # The machine may be faster or slower than when layers alone were timed first.
                cost[size] = several[size] / single[1] * cost[1]
    return costs


def _means(steps: Steps, seconds: Sequence[float]) -> list[dict[int, float]]:
    """Return for each type of layers the mean seconds of units by their size."""
    costs = []
    for kind in KINDS:
        sizes: dict[int, list[float]] = {}
        for unit, value in zip(steps.units, seconds, strict=False):
            if steps.model.config.layer_types[unit[0]] == kind:
                sizes.setdefault(len(unit), []).append(value)
        costs.append({size: mean(values) for size, values in sizes.items()})
    return costs


def costs_on_ranks(
    costs: Sequence[Mapping[int, float]], ranks: int, exchange: float, bypass: int
) -> list[dict[int, float]]:
    """Return what layers cost on several ranks, see :mod:`kvbuffer.models.parallel`.

    Args:
        costs: in one process, seconds by size of a group, for each type.
        ranks: processes.
        exchange: seconds of a sum over them.
        bypass: D.
    """

    def cost(alone: float, size: int, fused: float) -> float:
        if size == 1 or size % ranks:
            return fused / ranks + 2 * exchange
        return size / ranks * alone + (2 if bypass else 1) * exchange

    return [{size: cost(of[1], size, fused) for size, fused in of.items()} for of in costs]


def exchange_seconds(ranks: int, numel: int, rounds: int) -> float:
    """Return the median seconds in which ``ranks`` processes of this machine sum ``numel`` float32 each."""
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    start_ranks(ranks, _time_exchange, numel, rounds, answers)
    seconds: float = answers.get()
    return seconds


def _time_exchange(ranks: ProcessRanks, numel: int, rounds: int, answers: Any) -> None:
    clock, x = [], torch.zeros(numel)
    for _ in range(rounds + 1):
        clock.append(time.perf_counter())
        ranks.all_reduce(x)
    if ranks.rank == 0:
        answers.put(median(end - begin for begin, end in pairwise(clock)))
