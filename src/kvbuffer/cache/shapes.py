"""The shapes of what a model's layers remember."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """Shape of the Gated DeltaNet layers.

    Attributes:
        num_key_heads: HK.
        num_value_heads: HV, a multiple of HK.
        key_head_dim: K.
        value_head_dim: V.
        conv_kernel: taps W of the causal convolution.
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int

    @property
    def key_dim(self) -> int:
        """Columns of all query (or key) heads."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Columns of all value heads."""
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    @property
    def conv_parts(self) -> tuple[int, int, int]:
        """Channels of queries, of keys and of values."""
        return self.key_dim, self.key_dim, self.value_dim

    def repeated(self, count: int) -> LinearShape:
        """Return the shape of ``count`` layers side by side: as many times the heads."""
        heads = (count * self.num_key_heads, count * self.num_value_heads)
        return LinearShape(*heads, self.key_head_dim, self.value_head_dim, self.conv_kernel)


def run_order(num_layers: int, groups: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Return all layers in the order in which they run: alone, or as a group in the place of its first layer."""
    grouped = {index for group in groups for index in group}
    alone = {(index,) for index in range(num_layers) if index not in grouped}
    return tuple(sorted(alone.union(groups)))


@dataclass(frozen=True)
class CacheShape:
    """What a model's layers keep per request and per token.

    Attributes:
        layer_types: per layer ``"linear_attention"`` (a state and a buffer) or ``"full_attention"`` (keys and values).
        linear: shape of the linear-attention layers.
        num_kv_heads: key and value heads of the full-attention layers.
        head_dim: their dim.
        max_position_embeddings: longest context the model was made for.
        groups: layers whose memory lies side by side, as that of one layer with all their heads; of one type each.
    """

    layer_types: tuple[str, ...]
    linear: LinearShape
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def units(self) -> tuple[tuple[int, ...], ...]:
        """The layers and groups in the order in which they run."""
        return run_order(len(self.layer_types), self.groups)

    @property
    def num_linear_layers(self) -> int:
        """Layers that keep a state and a buffer."""
        return self.layer_types.count("linear_attention")

    @property
    def num_attention_layers(self) -> int:
        """Layers that keep keys and values of every token."""
        return self.layer_types.count("full_attention")
