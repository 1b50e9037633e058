"""A group of layers one after the other, as its equations stand: what the fused execution is tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.models.decoder import DecoderLayer
from kvbuffer.ops.batch import ModelInputs


def naive_group(
    layers: Sequence[DecoderLayer],
    bypass: int,
    x: Tensor | None,
    residual: Tensor,
    inputs: ModelInputs,
    caches: Sequence[LinearCache | AttentionCache],
) -> Tensor:
    """Compute a group's layers from one input, each with its own weights and memory.

    Args:
        layers: p layers.
        bypass: D, how many layers back each MLP sees.
        x: [N, hidden] float32, still to be added to ``residual``, which happens in place; None for nothing.
        residual: [N, hidden] float32.
        inputs: the batch.
        caches: memory of each layer; written.

    Returns:
        [N, hidden]: what the group adds to the residual stream.
    """
    if x is not None:
        residual += x

    def mlp(layer: DecoderLayer, seen: Tensor) -> Tensor:
        return layer.mlp.forward(seen, residual.clone())

    mixed = [
        layer.mixer.forward(None, residual, inputs, cache)  # type: ignore[arg-type]  # a layer gets its kind of cache
        for layer, cache in zip(layers, caches, strict=True)
    ]
    return combine(mixed, [partial(mlp, layer) for layer in layers], bypass)


def combine(mixed: Sequence[Tensor], mlps: Sequence[Callable[[Tensor], Tensor]], bypass: int) -> Tensor:
    """Return what a group adds to the residual stream, Σ_j (a_j + m_j) as in :mod:`kvbuffer.models.group`.

    Args:
        mixed: a_j, the mixers' outputs, of one shape.
        mlps: from the sum of the a_i that it sees, beside the stream, each makes its m_j.
        bypass: D.
    """
    parts = list(mixed)
    for j, mlp in enumerate(mlps):
        parts.append(mlp(_sum(mixed[max(0, j - bypass) : j + 1])))
    return _sum(parts)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)
