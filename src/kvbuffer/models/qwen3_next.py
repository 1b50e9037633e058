"""Qwen3-Next: how its checkpoints name and arrange their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbuffer.cache.shapes import LinearShape
from kvbuffer.models.weights import TensorReader, WeightReader

#: Tensors that checkpoints carry and this engine does not use.
IGNORED = ()


def prefix(reader: WeightReader) -> str:
    """Return what precedes the decoder's tensors."""
    return "model."


def in_proj(reader: TensorReader, name: str, shape: LinearShape, hidden: int) -> Tensor:
    """Return the fused input projection as :class:`~kvbuffer.models.layers.GatedDeltaNet` wants it.

    The checkpoint groups the rows by key head: that head's query, key, its value heads and their gates; likewise b
    and a. Here every kind stands together, so that no activation needs to be moved at run time.
    """
    groups = shape.num_key_heads
    rep = shape.num_value_heads // groups
    k, v = shape.key_head_dim, rep * shape.value_head_dim
    qkvz = reader.take(f"{name}in_proj_qkvz.weight", 2 * (shape.key_dim + shape.value_dim), hidden)
    ba = reader.take(f"{name}in_proj_ba.weight", 2 * shape.num_value_heads, hidden)
    parts = [
        *qkvz.view(groups, -1, hidden).split((k, k, v, v), dim=1),
        *ba.view(groups, -1, hidden).split((rep, rep), dim=1),
    ]
    return torch.cat([part.reshape(-1, hidden) for part in parts])
