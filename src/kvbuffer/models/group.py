"""A group of layers that are computed at once, from the input of the first (CQIL).

Quasi-independent layers (Zou et al., ACL 2024): layers j = 1 … p of a group all read the residual stream x in front of
the group,

    a_j = Mixer_j(norm_j(x))
    m_j = MLP_j(norm'_j(x + a_j + Σ_{i = 1 … min(D, j − 1)} a_{j−i}))
    x'  = x + Σ_j (a_j + m_j)

The bypass, of distance D, lets an MLP see the mixers of the D layers before its own; it enters nowhere else. On one
device the mixers are one mixer with p times the heads: x and its RMS are common, so the weights of the input norms are
multiplied into the projections behind them and one product serves all. The MLPs read different rows, and run as the
experts of one mixture, to each of which its own rows are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvbuffer.cache.shapes import LinearShape
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.layers import (
    AttentionHeads,
    DeltaHeads,
    DeltaOutput,
    Mlp,
    RotaryTable,
    attention_output,
    expert_weights,
    read_mlp,
    swiglu_weights,
    zero_centred,
)
from kvbuffer.models.weights import TensorReader, WeightReader
from kvbuffer.ops.batch import ModelInputs
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.moe import PackedExperts, moe_mlp, route
from kvbuffer.ops.norm import add_rms_norm


class GroupReader:
    """Reads tensors of p layers as those of one layer with p times the heads.

    Rows of the layers follow each other; where a tensor holds rows of several kinds, those of each kind do. The input
    norms are multiplied into the projections' weights.

    Args:
        reader: the checkpoint.
        prefixes: the layers' names, with the final dot.
        linear: heads of one linear-attention layer.
        input_norms: [hidden] float32 each.
    """

    def __init__(
        self, reader: TensorReader, prefixes: Sequence[str], linear: LinearShape, input_norms: Sequence[Tensor]
    ) -> None:
        self._reader, self._prefixes, self._linear, self._norms = reader, prefixes, linear, input_norms

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the layers' tensors ``name`` as one, in the model dtype."""
        tensors = self._each(self._reader.take, name, shape)
        if len(shape) == 2:
            tensors = [(w.float() * norm).to(w.dtype) for w, norm in zip(tensors, self._norms, strict=True)]
        return self._join(name, tensors)

    def take_float(self, name: str, *shape: int) -> Tensor:
        """Return the layers' tensors ``name`` as one, in float32; norms of heads one below the other."""
        if name.endswith("_norm.weight"):
            return torch.stack([self._reader.take_float(prefix + name, *shape) for prefix in self._prefixes])
        return self._join(name, self._each(self._reader.take_float, name, shape))

    def _each(self, take: _Take, name: str, shape: tuple[int, ...]) -> list[Tensor]:
        return [take(prefix + name, shape[0] // len(self._prefixes), *shape[1:]) for prefix in self._prefixes]

    def _join(self, name: str, tensors: list[Tensor]) -> Tensor:
        if not name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
            return torch.cat(tensors)
        kinds = zip(*(tensor.split(self._linear.conv_parts) for tensor in tensors), strict=True)
        return torch.cat([rows for kind in kinds for rows in kind])


class _Take(Protocol):
    def __call__(self, name: str, /, *shape: int) -> Tensor: ...


class DeltaGroup:
    """The mixers of a group of Gated DeltaNet layers."""

    def __init__(self, heads: DeltaHeads, outputs: Sequence[DeltaOutput]) -> None:
        self.heads, self.outputs = heads, outputs

    def forward(self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache) -> list[Tensor]:
        """Return each mixer's output, [N, hidden]; memory moves on."""
        heads, gates = self.heads.forward(x, residual, inputs, cache)
        count = len(self.outputs)
        pairs = zip(heads.chunk(count, 1), gates.chunk(count, 1), strict=True)
        return [out.forward(own.contiguous(), gate) for out, (own, gate) in zip(self.outputs, pairs, strict=True)]


class AttentionGroup:
    """The mixers of a group of full-attention layers."""

    def __init__(self, heads: AttentionHeads, outputs: Sequence[Linear]) -> None:
        self.heads, self.outputs = heads, outputs

    def forward(self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: AttentionCache) -> list[Tensor]:
        """Return each mixer's output, [N, hidden]; memory moves on."""
        heads = self.heads.forward(x, residual, inputs, cache)
        return [out(own) for out, own in zip(self.outputs, heads.chunk(len(self.outputs), 1), strict=True)]


class DenseMlpGroup:
    """The SwiGLU layers of a group as the experts of one mixture.

    Args:
        reader: the checkpoint.
        prefixes: their names, with the final dot.
        config: the model.
        input_norms: [p, hidden] float32, the norms in front.
    """

    def __init__(self, reader: WeightReader, prefixes: Sequence[str], config: ModelConfig, input_norms: Tensor) -> None:
        self.norms = _GroupNorm(input_norms, config.rms_norm_eps)
        shape = (config.hidden_size, config.intermediate_size)
        self.mlps = _stacked([swiglu_weights(reader, prefix, *shape) for prefix in prefixes])

    def forward(self, x: Tensor) -> Tensor:
        """Map the layers' inputs [p, N, hidden] to the sum of their outputs, [N, hidden]."""
        return _one_each(self.norms(x), self.mlps).sum(0)


class SparseMoeGroup:
    """The mixtures of experts of a group as one with all their experts; arguments as for :class:`DenseMlpGroup`."""

    def __init__(self, reader: WeightReader, prefixes: Sequence[str], config: ModelConfig, input_norms: Tensor) -> None:
        assert config.moe is not None
        self.moe, hidden = config.moe, config.hidden_size
        self.norms = _GroupNorm(input_norms, config.rms_norm_eps)
        routers = [reader.take(f"{prefix}gate.weight", self.moe.num_experts, hidden) for prefix in prefixes]
        gates = [reader.take(f"{prefix}shared_expert_gate.weight", 1, hidden) for prefix in prefixes]
        self.routers = [Linear(torch.cat(rows)) for rows in zip(routers, gates, strict=True)]
        experts = [expert_weights(reader, f"{prefix}experts.", hidden, self.moe) for prefix in prefixes]
        self.experts = PackedExperts(*(torch.cat(part) for part in zip(*experts, strict=True)))
        shared = (hidden, self.moe.shared_intermediate_size)
        self.shared = _stacked([swiglu_weights(reader, f"{prefix}shared_expert.", *shared) for prefix in prefixes])

    def forward(self, x: Tensor) -> Tensor:
        """Map the layers' inputs [p, N, hidden] to the sum of their outputs, [N, hidden]."""
        normed, moe = self.norms(x), self.moe
        logits = torch.stack([router(rows) for router, rows in zip(self.routers, normed, strict=True)])
        chances = logits[..., : moe.num_experts].contiguous().view(-1, moe.num_experts)
        expert_ids, weights = route(chances, moe.top_k, moe.normalize)
        first = torch.arange(len(x), dtype=torch.int32) * moe.num_experts
        expert_ids = expert_ids.view(len(x), -1, moe.top_k) + first.view(-1, 1, 1)
        routed = moe_mlp(normed.flatten(0, 1), expert_ids.flatten(0, 1), weights, self.experts)
        shared = sigmoid_of_rows(logits[..., moe.num_experts :]) * _one_each(normed, self.shared)
        return routed.view_as(x).sum(0).add_(shared.sum(0))


class SeparateMlps:
    """The MLPs of a group one after the other, where they are of different kinds."""

    def __init__(self, mlps: Sequence[Mlp]) -> None:
        self.mlps = mlps

    def forward(self, x: Tensor) -> Tensor:
        """Map the layers' inputs [p, N, hidden] to the sum of their outputs, [N, hidden]; the inputs are lost."""
        nothing = torch.zeros_like(x[0])
        return torch.stack([mlp.forward(nothing, rows) for mlp, rows in zip(self.mlps, x, strict=True)]).sum(0)


class LayerGroup:
    """A group of layers.

    Args:
        mixers: of the layers.
        mlps: of the layers.
        bypass: D, 0 to p - 1.

    Attributes:
        sees: [p, p] float32, which mixers' outputs enter each MLP's input.
    """

    def __init__(
        self,
        mixers: DeltaGroup | AttentionGroup,
        mlps: DenseMlpGroup | SparseMoeGroup | SeparateMlps,
        bypass: int,
    ) -> None:
        self.mixers, self.mlps = mixers, mlps
        self.sees = banded(len(mixers.outputs), bypass)

    def forward(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache | AttentionCache
    ) -> Tensor:
        """Map [N, hidden] to [N, hidden]: add ``x`` to ``residual`` in place, return what the group adds to it."""
        mixed = self.mix(x, residual, inputs, cache)
        return self.after(residual, self.sees, mixed).add_(mixed.sum(0))

    def mix(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache | AttentionCache
    ) -> Tensor:
        """Add ``x`` to ``residual`` in place; return the mixers' outputs [p, N, hidden]."""
        return torch.stack(self.mixers.forward(x, residual, inputs, cache))  # type: ignore[arg-type]  # their kind of cache

    def after(self, residual: Tensor, sees: Tensor, mixed: Tensor) -> Tensor:
        """Return the sum of the MLPs' outputs [N, hidden] where ``sees`` says which mixers' outputs they see."""
        seen = torch.addmm(residual.view(1, -1), sees, mixed.flatten(1))
        return self.mlps.forward(seen.view(-1, *residual.shape))


class _GroupNorm:
    """RMSNorm of [p, N, hidden] with weights [p, hidden]."""

    def __init__(self, weights: Tensor, eps: float) -> None:
        self.weights, self.ones, self.eps = weights.unsqueeze(1), torch.ones(weights.shape[1]), eps

    def __call__(self, x: Tensor) -> Tensor:
        return add_rms_norm(None, x.view(-1, x.shape[-1]), self.ones, self.eps).view_as(x).mul_(self.weights)


def _stacked(mlps: Sequence[tuple[Tensor, Tensor]]) -> PackedExperts:
    return PackedExperts(*(torch.stack(part) for part in zip(*mlps, strict=True)))


def _one_each(x: Tensor, experts: PackedExperts) -> Tensor:
    """Send rows [p, N, hidden] to an expert each; return as many."""
    ids = torch.arange(len(x), dtype=torch.int32).repeat_interleave(x.shape[1]).unsqueeze(1)
    return moe_mlp(x.flatten(0, 1), ids, torch.ones(len(ids), 1), experts).view_as(x)


def sigmoid_of_rows(x: Tensor) -> Tensor:
    """Return the sigmoid of [..., 1], the bits of an element being its own affair.

    PyTorch computes the elements behind a tensor's last whole pair of vectors by other code, with other bits. So each
    one is computed as a row of vectors.
    """
    return torch.sigmoid(x.repeat_interleave(32, -1))[..., :1]


def banded(count: int, bypass: int) -> Tensor:
    """Return [count, count] float32, one where row j sees column i: j - bypass <= i <= j."""
    return torch.ones(count, count).tril().triu(-bypass)


def read_group(
    reader: WeightReader,
    layers: str,
    indices: Sequence[int],
    config: ModelConfig,
    in_proj: Callable[[TensorReader, str, LinearShape, int], Tensor],
    rotary: RotaryTable,
    bypass: int,
) -> LayerGroup:
    """Return a group of layers with its weights.

    Args:
        reader: the checkpoint.
        layers: what precedes a layer's number in it, with the final dot.
        indices: layers of one type.
        config: the model.
        in_proj: reads a linear-attention layer's input projection, as the architecture's layout has it.
        rotary: the model's.
        bypass: D.
    """
    hidden, eps = config.hidden_size, config.rms_norm_eps
    wide, nothing = config.repeated(len(indices)), torch.ones(hidden)

    def names(part: str) -> list[str]:
        return [f"{layers}{index}.{part}" for index in indices]

    input_norms = [zero_centred(reader, name, hidden) for name in names("input_layernorm.weight")]
    mixers: DeltaGroup | AttentionGroup
    if config.layer_types[indices[0]] == "linear_attention":
        prefixes = names("linear_attn.")
        joint = GroupReader(reader, prefixes, config.linear, input_norms)
        heads = DeltaHeads(joint, "", wide.linear, nothing, eps, in_proj(joint, "", wide.linear, hidden))
        mixers = DeltaGroup(heads, [DeltaOutput(reader, prefix, config) for prefix in prefixes])
    else:
        prefixes = names("self_attn.")
        joint = GroupReader(reader, prefixes, config.linear, input_norms)
        attention = AttentionHeads(joint, "", wide, nothing, rotary)
        mixers = AttentionGroup(attention, [attention_output(reader, prefix, config) for prefix in prefixes])
    norms = [zero_centred(reader, name, hidden) for name in names("post_attention_layernorm.weight")]
    kinds = {config.moe is not None and config.sparse_layers[index] for index in indices}
    mlps: DenseMlpGroup | SparseMoeGroup | SeparateMlps
    if len(kinds) == 1:
        mlps = (SparseMoeGroup if kinds.pop() else DenseMlpGroup)(reader, names("mlp."), config, torch.stack(norms))
    else:
        each = zip(names("mlp."), indices, norms, strict=True)
        mlps = SeparateMlps([read_mlp(reader, prefix, config, index, norm) for prefix, index, norm in each])
    return LayerGroup(mixers, mlps, bypass)
