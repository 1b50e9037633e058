"""The layers that the served architectures share, built from a checkpoint's weights.

N tokens in the ragged batch, C convolution channels; see :mod:`kvbuffer.ops.batch` for the batch.

Every block (a token mixer or an MLP) begins with the norm of the residual stream. Its ``forward`` takes what the block
before it returned, which it adds to the residual in place, so that add, norm and first product are one call.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvbuffer.cache.shapes import LinearShape
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.models.config import ModelConfig, MoeConfig
from kvbuffer.models.weights import TensorReader, WeightReader
from kvbuffer.ops.attention import attention_inputs, paged_attention
from kvbuffer.ops.attention import has_kernels as has_attention_kernels
from kvbuffer.ops.batch import LinearForm, ModelInputs
from kvbuffer.ops.blocks import Block, attention_block, gated_delta_block, sparse_moe_block, swiglu_block
from kvbuffer.ops.buffered import buffered_decode, buffered_verify, recurrent_decode
from kvbuffer.ops.chunked import chunked_prefill
from kvbuffer.ops.conv import causal_conv
from kvbuffer.ops.gated_delta import GatedDeltaHeads
from kvbuffer.ops.layout import Tokens
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.mlp import SwigluMlp
from kvbuffer.ops.moe import PackedExperts
from kvbuffer.ops.norm import gated_delta_inputs
from kvbuffer.ops.rule import GATED_DELTANET
from kvbuffer.ops.sparse_moe import SparseMoeMlp


class RotaryTable:
    """Cosines and sines of the rotary embedding.

    Attributes:
        cos: [max_model_len, rotary_dim / 2] float32.
        sin: as ``cos``.
    """

    def __init__(self, config: ModelConfig, max_model_len: int) -> None:
        exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
        angles = torch.arange(max_model_len, dtype=torch.float32).unsqueeze(1) / config.rope_theta**exponents
        self.cos, self.sin = angles.cos(), angles.sin()


class DeltaHeads:
    """What the heads of a Gated DeltaNet layer compute: projections, short convolution, the delta rule on a KV buffer.

    Args:
        reader: the checkpoint.
        prefix: its layer's name, with the final dot.
        shape: the heads.
        input_norm: [hidden] float32, the norm in front.
        eps: of the norms.
        in_proj: [C + HV * V + 2 * HV, hidden]: queries, keys and values, gate z, b and a, each head after head.
    """

    def __init__(
        self, reader: TensorReader, prefix: str, shape: LinearShape, input_norm: Tensor, eps: float, in_proj: Tensor
    ) -> None:
        self.shape, self.input_norm, self.eps = shape, input_norm, eps
        self.in_proj = Linear(in_proj)
        conv = reader.take_float(f"{prefix}conv1d.weight", shape.conv_dim, 1, shape.conv_kernel)
        self.conv_weight = conv.squeeze(1).T.contiguous()
        self.a_log = reader.take_float(f"{prefix}A_log", shape.num_value_heads)
        self.dt_bias = reader.take_float(f"{prefix}dt_bias", shape.num_value_heads)
        self._at_once: GatedDeltaHeads | None = None
        self._bound: LinearCache | None = None

    def forward(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache
    ) -> tuple[Tensor, Tensor]:
        """Return the heads' outputs [N, HV, V] and their gates [N, HV * V]; states, buffers and rings move on."""
        shape = self.shape
        at_once = self.at_once(cache) if inputs.is_short else None
        if at_once is not None:
            heads, projected = at_once(x, residual, inputs)
            return heads, projected[:, shape.conv_dim : shape.conv_dim + shape.value_dim]
        projected = self.in_proj.of_add_rms_norm(x, residual, self.input_norm, self.eps)
        where = (cache.rings, inputs.rings, inputs.cu_seqlens, inputs.context_lens)
        qkv = causal_conv(projected, self.conv_weight, *where, parents=inputs.parents, kept=inputs.kept_rings)
        # split() is written in Python and takes three times as long.
        _, z, b, a = projected.split_with_sizes(
            (shape.conv_dim, shape.value_dim, shape.num_value_heads, shape.num_value_heads), 1
        )
        qk, v = qkv.split_with_sizes((2 * shape.key_dim, shape.value_dim), 1)
        qk = qk.view(-1, 2 * shape.num_key_heads, shape.key_head_dim)
        v = v.view(-1, shape.num_value_heads, shape.value_head_dim)
        g, beta = gated_delta_inputs(qk, b, a, self.a_log, self.dt_bias)
        q, k = qk.split_with_sizes((shape.num_key_heads, shape.num_key_heads), 1)
        return self._mix(Tokens(q, k, v, g, beta), inputs, cache), z

    def at_once(self, cache: LinearCache) -> GatedDeltaHeads | None:
        """Return what runs on a layer's memory in one call; None where there are no kernels for it."""
        if self._bound is not cache:
            self._bound, self._at_once = cache, None
            if GatedDeltaHeads.covers(self.in_proj, cache.states, cache.records):
                norm, weights = (self.input_norm, self.eps), (self.conv_weight, self.a_log, self.dt_bias)
                self._at_once = GatedDeltaHeads(self.in_proj, *norm, *weights, cache.states, cache.rings, cache.records)
        return self._at_once

    @staticmethod
    def _mix(tokens: Tokens, inputs: ModelInputs, cache: LinearCache) -> Tensor:
        parts = []
        for part in inputs.sections:
            own = tokens if len(inputs.sections) == 1 else tokens.rows(part.tokens)
            buffer = (cache.states, part.slots, cache.records, part.page_table, part.fill)
            if part.form is LinearForm.RECURRENT:
                out = recurrent_decode(GATED_DELTANET, own, cache.states, part.slots)
            elif part.form is LinearForm.BUFFERED:
                out = buffered_decode(GATED_DELTANET, own, *buffer, part.fold)
            elif part.form is LinearForm.CHUNKED:
                out = chunked_prefill(GATED_DELTANET, own, cache.states, part.slots, part.cu_seqlens, part.fresh)
            else:
                out = buffered_verify(GATED_DELTANET, own, *buffer, part.cu_seqlens, part.parents)
            parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class GatedDeltaNet:
    """A Gated DeltaNet layer: its heads, then a gated norm of each and the output projection.

    Args:
        reader: the checkpoint.
        prefix: its layer's name, with the final dot.
        config: the model.
        input_norm: [hidden] float32, the norm in front.
        in_proj: as for :class:`DeltaHeads`.
    """

    def __init__(
        self, reader: WeightReader, prefix: str, config: ModelConfig, input_norm: Tensor, in_proj: Tensor
    ) -> None:
        self.heads = DeltaHeads(reader, prefix, config.linear, input_norm, config.rms_norm_eps, in_proj)
        self.out = DeltaOutput(reader, prefix, config)

    def forward(self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache) -> Tensor:
        """Map [N, hidden] to [N, hidden]; the requests' states, buffers and rolling inputs move on."""
        return self.out.forward(*self.heads.forward(x, residual, inputs, cache))

    def block(self, cache: LinearCache) -> Block | None:
        """Return the layer on its memory as one of the blocks that run in one call; None without kernels for it."""
        heads, out = self.heads.at_once(cache), self.out
        return None if heads is None else gated_delta_block(heads, out.norm_weight, out.eps, out.out_proj)


class DeltaOutput:
    """The end of a Gated DeltaNet layer: gated norm of each head, output projection."""

    def __init__(self, reader: TensorReader, prefix: str, config: ModelConfig) -> None:
        shape, self.eps = config.linear, config.rms_norm_eps
        self.norm_weight = reader.take_float(f"{prefix}norm.weight", shape.value_head_dim)
        self.out_proj = Linear(reader.take(f"{prefix}out_proj.weight", config.hidden_size, shape.value_dim))

    def forward(self, heads: Tensor, gate: Tensor) -> Tensor:
        """Map heads [N, HV, V], contiguous, and gates [N, HV * V], rows perhaps strided, to [N, hidden]."""
        return self.out_proj.of_gated_rms_norm(heads, gate, self.norm_weight, self.eps)


class AttentionHeads:
    """What the heads of a full-attention layer compute, with query and key norms and partial rotary embedding."""

    def __init__(
        self, reader: TensorReader, prefix: str, config: ModelConfig, input_norm: Tensor, rotary: RotaryTable
    ) -> None:
        self.config, self.input_norm, self.rotary = config, input_norm, rotary
        heads, dim, hidden = config.num_heads, config.head_dim, config.hidden_size
        kv = config.num_kv_heads * dim

        def fused(name: str, *tail: int) -> Tensor:
            # The checkpoint interleaves query and gate per head; the kernels read all queries, then all gates.
            q = reader.take(f"{prefix}q_proj.{name}", 2 * heads * dim, *tail).view(heads, 2, dim, *tail)
            others = (reader.take(f"{prefix}{p}_proj.{name}", kv, *tail) for p in ("k", "v"))
            return torch.cat([q.transpose(0, 1).reshape(2 * heads * dim, *tail), *others])

        self.qkv_proj = Linear(fused("weight", hidden), fused("bias") if config.attention_bias else None)
        self.q_norm = reader.take_float(f"{prefix}q_norm.weight", dim)
        self.k_norm = reader.take_float(f"{prefix}k_norm.weight", dim)

    def forward(self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: AttentionCache) -> Tensor:
        """Return the heads' gated outputs [N, H * D]; the new tokens' keys and values are written to their pages."""
        config = self.config
        projected = self.qkv_proj.of_add_rms_norm(x, residual, self.input_norm, config.rms_norm_eps)
        where = (inputs.attention_page_table, inputs.cu_seqlens, inputs.context_lens)
        q = attention_inputs(
            projected, self.q_norm, self.k_norm, self.rotary.cos, self.rotary.sin, inputs.positions, cache.pages,
            *where, config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps,
        )  # fmt: skip
        width = config.num_heads * config.head_dim
        gate = projected[:, width : 2 * width]
        return paged_attention(q, cache.pages, *where, gate=gate, parents=inputs.parents)


class GatedAttention:
    """Full attention with query and key norms, partial rotary embedding and an output gate."""

    def __init__(
        self, reader: WeightReader, prefix: str, config: ModelConfig, input_norm: Tensor, rotary: RotaryTable
    ) -> None:
        self.heads = AttentionHeads(reader, prefix, config, input_norm, rotary)
        self.o_proj = attention_output(reader, prefix, config)

    def forward(self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: AttentionCache) -> Tensor:
        """Map [N, hidden] to [N, hidden]; the new tokens' keys and values are written to their pages."""
        return self.o_proj(self.heads.forward(x, residual, inputs, cache))

    def block(self, cache: AttentionCache) -> Block | None:
        """As :meth:`GatedDeltaNet.block`."""
        heads, config = self.heads, self.heads.config
        if heads.qkv_proj.layer_ptr is None or not has_attention_kernels(cache.pages.dtype, config.head_dim):
            return None
        norms, rotary = (heads.input_norm, heads.q_norm, heads.k_norm), (heads.rotary.cos, heads.rotary.sin)
        return attention_block(
            heads.qkv_proj, *norms, *rotary, cache.pages, config.num_heads, config.rms_norm_eps, self.o_proj
        )


def attention_output(reader: TensorReader, prefix: str, config: ModelConfig) -> Linear:
    """Return the output projection of a full-attention layer."""
    return Linear(
        reader.take(f"{prefix}o_proj.weight", config.hidden_size, config.num_heads * config.head_dim),
        reader.take(f"{prefix}o_proj.bias", config.hidden_size) if config.attention_bias else None,
    )


class Mlp(Protocol):
    """What follows the token mixer in a layer."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map [N, hidden] to [N, hidden]."""
        ...

    def block(self) -> Block | None:
        """As :meth:`GatedDeltaNet.block`."""
        ...


class DenseMlp:
    """SwiGLU.

    Args:
        reader: the checkpoint.
        prefix: its layer's name, with the final dot.
        config: the model.
        input_norm: [hidden] float32, the norm in front.
    """

    def __init__(self, reader: WeightReader, prefix: str, config: ModelConfig, input_norm: Tensor) -> None:
        self.input_norm, self.eps = input_norm, config.rms_norm_eps
        self.mlp = SwigluMlp(*swiglu_weights(reader, prefix, config.hidden_size, config.intermediate_size))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map [N, hidden] to [N, hidden]."""
        return self.mlp.of_add_rms_norm(x, residual, self.input_norm, self.eps)

    def block(self) -> Block | None:
        """As :meth:`GatedDeltaNet.block`."""
        return None if self.mlp.weights.lib is None else swiglu_block(self.mlp, self.input_norm, self.eps)


class SparseMoe:
    """A mixture of SwiGLU experts, of which each token takes the top k, plus one gated expert that all tokens share."""

    def __init__(
        self, reader: WeightReader, prefix: str, config: ModelConfig, input_norm: Tensor, moe: MoeConfig
    ) -> None:
        hidden = config.hidden_size
        router = Linear(reader.take(f"{prefix}gate.weight", moe.num_experts, hidden))
        experts = PackedExperts(*expert_weights(reader, f"{prefix}experts.", hidden, moe))
        shared = SwigluMlp(*swiglu_weights(reader, f"{prefix}shared_expert.", hidden, moe.shared_intermediate_size))
        shared_gate = Linear(reader.take(f"{prefix}shared_expert_gate.weight", 1, hidden))
        routing = (router, experts, moe.top_k, moe.normalize)
        self.moe = SparseMoeMlp(input_norm, config.rms_norm_eps, *routing, shared, shared_gate)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Map [N, hidden] to [N, hidden]."""
        return self.moe(x, residual)

    def block(self) -> Block | None:
        """As :meth:`GatedDeltaNet.block`."""
        return None if self.moe.struct is None else sparse_moe_block(self.moe)


def read_mlp(reader: WeightReader, prefix: str, config: ModelConfig, index: int, input_norm: Tensor) -> Mlp:
    """Return the MLP of layer ``index``, of the kind that it has."""
    if config.moe is not None and config.sparse_layers[index]:
        return SparseMoe(reader, prefix, config, input_norm, config.moe)
    return DenseMlp(reader, prefix, config, input_norm)


def swiglu_weights(reader: WeightReader, prefix: str, hidden: int, intermediate: int) -> tuple[Tensor, Tensor]:
    """Return gate_up [2I, hidden] and down [hidden, I] of a SwiGLU layer."""
    gate_up = [reader.take(f"{prefix}{name}_proj.weight", intermediate, hidden) for name in ("gate", "up")]
    return torch.cat(gate_up), reader.take(f"{prefix}down_proj.weight", hidden, intermediate)


def expert_weights(reader: WeightReader, prefix: str, hidden: int, moe: MoeConfig) -> tuple[Tensor, Tensor]:
    """Return gate_up [E, 2I, hidden] and down [E, hidden, I] from fused tensors or from one tensor per expert."""
    count, width = moe.num_experts, moe.intermediate_size
    if f"{prefix}gate_up_proj" in reader:
        return (
            reader.take(f"{prefix}gate_up_proj", count, 2 * width, hidden),
            reader.take(f"{prefix}down_proj", count, hidden, width),
        )

    def stacked(name: str, *shape: int) -> Tensor:
        return torch.stack([reader.take(f"{prefix}{e}.{name}_proj.weight", *shape) for e in range(count)])

    return torch.cat([stacked(n, width, hidden) for n in ("gate", "up")], 1), stacked("down", hidden, width)


def zero_centred(reader: WeightReader, name: str, dim: int) -> Tensor:
    """Return the factor 1 + w of a zero-centred RMSNorm, [dim] float32."""
    return 1.0 + reader.take_float(name, dim)
