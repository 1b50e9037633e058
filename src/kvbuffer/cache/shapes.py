"""The shapes of what a model's layers remember."""

from __future__ import annotations

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


@dataclass(frozen=True)
class CacheShape:
    """What a model's layers keep per request and per token.

    Attributes:
        layer_types: per layer ``"linear_attention"`` (a state and a buffer) or ``"full_attention"`` (keys and values).
        linear: shape of the linear-attention layers.
        num_kv_heads: key and value heads of the full-attention layers.
        head_dim: their dim.
        max_position_embeddings: longest context the model was made for.
    """

    layer_types: tuple[str, ...]
    linear: LinearShape
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int

    @property
    def num_linear_layers(self) -> int:
        """Layers that keep a state and a buffer."""
        return self.layer_types.count("linear_attention")

    @property
    def num_attention_layers(self) -> int:
        """Layers that keep keys and values of every token."""
        return self.layer_types.count("full_attention")
