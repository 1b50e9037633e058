"""Qwen3.5 text models, dense and mixture of experts: how their checkpoints name and arrange their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbuffer.cache.shapes import LinearShape
from kvbuffer.models.weights import TensorReader, WeightReader

#: Tensors that checkpoints carry and this engine does not use: the vision tower.
IGNORED = (r"^model\.visual\.",)


def prefix(reader: WeightReader) -> str:
    """Return what precedes the decoder's tensors: the multimodal checkpoints nest the text model."""
    return "model.language_model." if "model.language_model.norm.weight" in reader else "model."


def in_proj(reader: TensorReader, name: str, shape: LinearShape, hidden: int) -> Tensor:
    """Return the fused input projection as :class:`~kvbuffer.models.layers.GatedDeltaNet` wants it."""
    rows = {
        "qkv": shape.conv_dim,
        "z": shape.value_dim,
        "b": shape.num_value_heads,
        "a": shape.num_value_heads,
    }
    return torch.cat([reader.take(f"{name}in_proj_{part}.weight", n, hidden) for part, n in rows.items()])
