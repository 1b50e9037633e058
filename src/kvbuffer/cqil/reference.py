"""A group of layers one after the other, as its equations stand: what the fused execution is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.models.decoder import DecoderLayer
from kvbuffer.models.inputs import ModelInputs


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
    mixed = [
        layer.mixer.forward(None, residual, inputs, cache)  # type: ignore[arg-type]  # a layer gets its kind of cache
        for layer, cache in zip(layers, caches, strict=True)
    ]
    total = torch.zeros_like(residual)
    for j, layer in enumerate(layers):
        seen = mixed[j].clone()
        for i in range(max(0, j - bypass), j):
            seen += mixed[i]
        total += mixed[j] + layer.mlp.forward(seen, residual.clone())
    return total
