"""A model's embedding and blocks, each a token mixer or an MLP, in one call of the compiled kernels.

A block is a struct that points to weights and memory. Called one by one from Python, blocks take longer: after each of
them the interpreter starts with cold caches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from kvbuffer.ops import dispatch
from kvbuffer.ops.batch import ModelInputs
from kvbuffer.ops.cpu.arguments import kernel
from kvbuffer.ops.gated_delta import GatedDeltaHeads
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.mlp import SwigluMlp
from kvbuffer.ops.moe import SwigluStruct
from kvbuffer.ops.sparse_moe import SparseMoeMlp, SparseMoeStruct


def _pointers(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, c_void_p) for name in names)


def _integers(*names: str) -> tuple[tuple[str, type], ...]:
    return tuple((name, c_int64) for name in names)


class GatedDeltaStruct(ctypes.Structure):
    """A Gated DeltaNet layer; see blocks.cpp for this and the other structs."""

    _fields_ = (
        *_pointers("heads"),
        *_integers("value_heads", "value_dim", "channels"),
        *_pointers("norm"),
        ("eps", c_double),
        *_pointers("out_proj"),
    )


class AttentionStruct(ctypes.Structure):
    """A full-attention layer."""

    _fields_ = (
        *_pointers("qkv_proj", "input_norm", "q_norm", "k_norm", "cos", "sin"),
        *_integers("half"),
        *_pointers("pages"),
        *_integers("heads", "kv_heads", "dim", "page_dtype", "hidden"),
        ("eps", c_double),
        *_pointers("out_proj"),
        ("seconds", c_double * 3),
    )


class SwigluMlpStruct(ctypes.Structure):
    """A dense SwiGLU layer."""

    _fields_ = (*_pointers("norm"), ("eps", c_double), ("weights", SwigluStruct))


class _BlockStruct(ctypes.Structure):
    _fields_ = (("kind", c_int64), ("layer", c_void_p), ("seconds", c_double))


class _EmbeddingStruct(ctypes.Structure):
    _fields_ = (*_pointers("rows"), *_integers("dtype", "hidden"))


_KINDS = {GatedDeltaStruct: 0, AttentionStruct: 1, SwigluMlpStruct: 2, SparseMoeStruct: 3}

Struct = GatedDeltaStruct | AttentionStruct | SwigluMlpStruct | SparseMoeStruct


class Block(NamedTuple):
    """A block, with the norm of the residual stream in front of it.

    Attributes:
        struct: what the kernels are handed.
        keeps: what it points to.
    """

    struct: Struct
    keeps: tuple[object, ...]


def gated_delta_block(heads: GatedDeltaHeads, norm: Tensor, eps: float, out_proj: Linear) -> Block:
    """Return a Gated DeltaNet layer.

    Args:
        heads: bound to the layer's memory.
        norm: [V] float32, of each head's output.
        eps: of the norm.
        out_proj: [H, HV * V].
    """
    value_heads, value_dim = heads.states.data.shape[1], heads.states.data.shape[3]
    channels = heads.in_proj.out_features - value_heads * (value_dim + 2)
    struct = GatedDeltaStruct(
        heads.layer_ptr, value_heads, value_dim, channels, norm.data_ptr(), eps, out_proj.layer_ptr
    )
    return Block(struct, (heads, norm, out_proj))


def attention_block(
    qkv_proj: Linear,
    input_norm: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    pages: Tensor,
    num_heads: int,
    eps: float,
    out_proj: Linear,
) -> Block:
    """Return a full-attention layer.

    Args:
        qkv_proj: [2 (HQ + HKV) D, H]: queries, gates, keys, values.
        input_norm: [H] float32.
        q_norm: [D] float32, zero-centred.
        k_norm: as ``q_norm``.
        cos: [max_len, rotary_dim / 2] float32.
        sin: as ``cos``.
        pages: the layer's keys and values.
        num_heads: HQ.
        eps: of the norms.
        out_proj: [H, HQ * D].
    """
    kv_heads, dim = pages.shape[2], pages.shape[4]
    tensors = (input_norm, q_norm, k_norm, cos, sin)
    struct = AttentionStruct(
        qkv_proj.layer_ptr, *(tensor.data_ptr() for tensor in tensors), cos.shape[1], pages.data_ptr(), num_heads,
        kv_heads, dim, dispatch.DTYPE_CODES[pages.dtype], out_proj.out_features, eps, out_proj.layer_ptr,
    )  # fmt: skip
    return Block(struct, (qkv_proj, *tensors, pages, out_proj))


def swiglu_block(mlp: SwigluMlp, norm: Tensor, eps: float) -> Block:
    """Return a dense SwiGLU layer behind a norm [H]."""
    return Block(SwigluMlpStruct(norm.data_ptr(), eps, mlp.weights.struct()), (mlp, norm))


def sparse_moe_block(moe: SparseMoeMlp) -> Block:
    """Return a mixture-of-experts layer."""
    assert moe.struct is not None
    return Block(moe.struct, (moe,))


class Blocks:
    """Blocks that run in one call. Same bits as the layers called one by one.

    Intermediate results stay allocated for the largest batch there has been, so this is not for long prompts.

    Args:
        embedding: [vocabulary, H], float32 or bfloat16, contiguous.
        blocks: in the model's order; the first is a token mixer.

    Attributes:
        blocks: as given.
    """

    def __init__(self, embedding: Tensor, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._embedding, hidden = embedding, embedding.shape[1]
        self._table = _EmbeddingStruct(embedding.data_ptr(), dispatch.DTYPE_CODES[embedding.dtype], hidden)
        structs = [_BlockStruct(_KINDS[type(block.struct)], ctypes.addressof(block.struct)) for block in blocks]
        self._structs = (_BlockStruct * len(blocks))(*structs)
        self._model = ctypes.addressof(self._table), ctypes.addressof(self._structs), len(blocks)
        self._kernel = kernel("kvb_blocks", c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p)

    @property
    def seconds(self) -> list[float]:
        """What each block took in the last call."""
        return [struct.seconds for struct in self._structs]

    def __call__(self, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Compute a batch of N tokens; all memory moves on.

        Returns:
            The last block's output [N, H] float32, and the residual stream [N, H] that it is still to be added to.
        """
        x, residual = torch.empty(2, len(inputs.token_ids), self._embedding.shape[1]).unbind()
        self._kernel(*self._model, ctypes.addressof(inputs.struct), residual.data_ptr(), x.data_ptr())
        return x, residual
