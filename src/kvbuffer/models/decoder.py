"""The decoder: embedding, layers, logits; loaded from a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.models import qwen3_5, qwen3_next
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.inputs import ModelInputs
from kvbuffer.models.layers import (
    DenseMlp,
    GatedAttention,
    GatedDeltaNet,
    Mlp,
    RotaryTable,
    SparseMoe,
    zero_centred,
)
from kvbuffer.models.weights import WeightReader
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.norm import add_rms_norm

LAYOUTS = {"qwen3_next": qwen3_next, "qwen3_5": qwen3_5}


class DecoderLayer(NamedTuple):
    """One layer: a token mixer, then an MLP."""

    mixer: GatedDeltaNet | GatedAttention
    mlp: Mlp


class Decoder:
    """A hybrid decoder with its weights packed for this machine.

    Args:
        folder: checkpoint folder.
        config: its configuration.
        dtype: of the weights, float32 or bfloat16. Activations are float32 either way.
        max_model_len: positions for which rotary tables are made.
        show_progress: draw a progress bar while loading.

    Raises:
        ModelError: the weights do not fit the configuration.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        max_model_len: int,
        show_progress: bool = True,
    ) -> None:
        self.config, self.dtype = config, dtype
        layout = LAYOUTS[config.layout]
        reader = WeightReader(folder, dtype, layout.IGNORED, show_progress)
        try:
            prefix = layout.prefix(reader)
            rotary = RotaryTable(config, max_model_len)
            self.embedding = reader.take(f"{prefix}embed_tokens.weight", config.vocab_size, config.hidden_size)
            self.layers = [self._layer(reader, f"{prefix}layers.{i}.", i, rotary) for i in range(config.num_layers)]
            self.norm = zero_centred(reader, f"{prefix}norm.weight", config.hidden_size)
            tied = config.tie_word_embeddings and "lm_head.weight" not in reader
            head = self.embedding if tied else reader.take("lm_head.weight", *self.embedding.shape)
            self.lm_head = Linear(head)
            reader.finish()
        finally:
            reader.close()

    def _layer(self, reader: WeightReader, prefix: str, index: int, rotary: RotaryTable) -> DecoderLayer:
        config = self.config
        input_norm = zero_centred(reader, f"{prefix}input_layernorm.weight", config.hidden_size)
        mixer: GatedDeltaNet | GatedAttention
        if config.layer_types[index] == "linear_attention":
            name = f"{prefix}linear_attn."
            weight = LAYOUTS[config.layout].in_proj(reader, name, config.linear, config.hidden_size)
            mixer = GatedDeltaNet(reader, name, config, input_norm, weight)
        else:
            mixer = GatedAttention(reader, f"{prefix}self_attn.", config, input_norm, rotary)
        mlp_norm = zero_centred(reader, f"{prefix}post_attention_layernorm.weight", config.hidden_size)
        mlp: Mlp
        if config.moe is not None and config.sparse_layers[index]:
            mlp = SparseMoe(reader, f"{prefix}mlp.", config, mlp_norm, config.moe)
        else:
            mlp = DenseMlp(reader, f"{prefix}mlp.", config, mlp_norm)
        return DecoderLayer(mixer, mlp)

    @torch.inference_mode()
    def forward(self, inputs: ModelInputs, caches: list[LinearCache | AttentionCache]) -> Tensor:
        """Run one ragged batch.

        Args:
            inputs: the batch, N tokens.
            caches: one per layer, as :func:`kvbuffer.cache.store.allocate` makes them; written.

        Returns:
            Logits of the rows asked for, [R, vocab_size] float32.
        """
        x, residual = self._layers(inputs, caches)
        rows = inputs.logits_rows
        return self.lm_head.of_add_rms_norm(x[rows], residual[rows], self.norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def forward_with_hidden(
        self, inputs: ModelInputs, caches: list[LinearCache | AttentionCache]
    ) -> tuple[Tensor, Tensor]:
        """Run one ragged batch as :meth:`forward` does; return the hidden states after the final norm, too.

        Returns:
            Logits of the rows asked for, [R, vocab_size], and hidden states of all tokens, [N, hidden_size]; float32.
        """
        hidden = add_rms_norm(*self._layers(inputs, caches), self.norm, self.config.rms_norm_eps)
        return self.lm_head(hidden[inputs.logits_rows]), hidden

    def _layers(self, inputs: ModelInputs, caches: list[LinearCache | AttentionCache]) -> tuple[Tensor, Tensor]:
        """Return the last layer's output, and the residual stream that it is still to be added to."""
        residual = F.embedding(inputs.token_ids, self.embedding).float()
        x: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.mixer.forward(x, residual, inputs, cache)  # type: ignore[arg-type]  # a layer gets its kind of cache
            x = layer.mlp.forward(x, residual)
        assert x is not None
        return x, residual
