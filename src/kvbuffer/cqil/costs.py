"""What layers and groups of them cost in a decode step, measured in whole steps of whole models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import torch

from kvbuffer.cache.shapes import run_order
from kvbuffer.cache.store import allocate
from kvbuffer.cqil.text import batch_of, memory_for
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
        units: layers and groups in the order in which they run.
    """

    def __init__(self, model: Decoder, groups: Sequence[tuple[int, ...]], batch: int) -> None:
        shape = replace(model.config.cache_shape, groups=tuple(groups))
        plan = memory_for(model, batch, CONTEXT + 1)
        self.units = run_order(model.config.num_layers, groups)
        self._model, self._caches = model, allocate(shape, plan)
        tokens = torch.randint(model.config.vocab_size, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
        model.forward(batch_of(tokens, 0, plan), self._caches)
        self._inputs = batch_of(tokens[:, :1], CONTEXT, plan)

    @torch.inference_mode()
    def step(self) -> list[float]:
        """Return the seconds that each unit takes, and at last those of embedding and head."""
        model, inputs, x = self._model, self._inputs, None
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
        layers: for each type the layers that may be grouped.
        max_group: largest size.
        batch: requests that decode together.
        rounds: steps that are timed.

    Returns:
        For each type, seconds by size of a group; 1 is a layer alone.
    """
    kinds = [{model.config.layer_types[index] for index in sequence} for sequence in layers]
    costs: list[dict[int, float]] = [{} for _ in layers]
    alone = Steps(model, (), batch)
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
        for steps, seconds in zip(turns, take_turns(turns, rounds), strict=True):
            for kind, cost in zip(kinds, costs, strict=True):
                sizes: dict[int, list[float]] = {}
                for unit, value in zip(steps.units, seconds, strict=False):
                    if model.config.layer_types[unit[0]] in kind:
                        sizes.setdefault(len(unit), []).append(value)
                if steps is alone and sizes:
                    cost[1] = min(mean(sizes[1]), cost.get(1, float("inf")))
                elif size in sizes:
                    cost[size] = mean(sizes[size])
    return costs


def placed_costs(costs: Sequence[Mapping[int, float]], ranks: int, max_group: int) -> list[dict[int, float]]:
    """Return what layers cost when those of a group are shared out to ranks, communication not counted.

    Args:
        costs: of layers computed on one device.
        ranks: of which each group has a multiple of layers.
        max_group: largest size.
    """
    sizes = range(ranks, max_group + 1, ranks)
    return [{1: cost[1], **{size: size // ranks * cost[1] for size in sizes}} if cost else {} for cost in costs]
