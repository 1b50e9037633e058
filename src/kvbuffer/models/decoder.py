"""The decoder: embedding, layers, logits; loaded from a checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.cache.shapes import run_order
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.models import mtp, qwen3_5, qwen3_next
from kvbuffer.models.adapter import Adapter
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.group import read_group
from kvbuffer.models.layers import GatedAttention, GatedDeltaNet, Mlp, RotaryTable, read_mlp, zero_centred
from kvbuffer.models.weights import WeightReader
from kvbuffer.ops.batch import ModelInputs
from kvbuffer.ops.blocks import Block, Blocks
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.norm import add_rms_norm

LAYOUTS = {"qwen3_next": qwen3_next, "qwen3_5": qwen3_5}


class DecoderLayer(NamedTuple):
    """One layer: a token mixer, then an MLP."""

    mixer: GatedDeltaNet | GatedAttention
    mlp: Mlp

    def forward(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache | AttentionCache
    ) -> Tensor:
        """Map [N, hidden] to [N, hidden]: add ``x`` to ``residual`` in place, return what is still to be added."""
        x = self.mixer.forward(x, residual, inputs, cache)  # type: ignore[arg-type]  # a layer gets its kind of cache
        return self.mlp.forward(x, residual)

    def blocks(self, cache: LinearCache | AttentionCache) -> tuple[Block | None, Block | None]:
        """Return the layer on its memory as blocks that run in one call; None where there are no kernels for one."""
        return self.mixer.block(cache), self.mlp.block()  # type: ignore[arg-type]  # a layer gets its kind of cache


def read_layer(reader: WeightReader, layers: str, index: int, config: ModelConfig, rotary: RotaryTable) -> DecoderLayer:
    """Return a layer with its weights.

    Args:
        reader: the checkpoint.
        layers: what precedes a layer's number in it, with the final dot.
        index: its number.
        config: the model.
        rotary: the model's.
    """
    prefix, hidden = f"{layers}{index}.", config.hidden_size
    input_norm = zero_centred(reader, f"{prefix}input_layernorm.weight", hidden)
    mixer: GatedDeltaNet | GatedAttention
    if config.layer_types[index] == "linear_attention":
        name = f"{prefix}linear_attn."
        weight = LAYOUTS[config.layout].in_proj(reader, name, config.linear, hidden)
        mixer = GatedDeltaNet(reader, name, config, input_norm, weight)
    else:
        mixer = GatedAttention(reader, f"{prefix}self_attn.", config, input_norm, rotary)
    mlp_norm = zero_centred(reader, f"{prefix}post_attention_layernorm.weight", hidden)
    return DecoderLayer(mixer, read_mlp(reader, f"{prefix}mlp.", config, index, mlp_norm))


class Unit(Protocol):
    """A layer, or a group of layers that are computed at once."""

    def forward(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache | AttentionCache
    ) -> Tensor:
        """Map [N, hidden] to [N, hidden]: add ``x`` to ``residual`` in place, return what is still to be added."""
        ...


class Decoder:
    """A hybrid decoder with its weights packed for this machine.

    Args:
        folder: checkpoint folder.
        config: its configuration.
        dtype: of the weights, float32 or bfloat16. Activations are float32 either way.
        max_model_len: positions for which rotary tables are made.
        show_progress: draw a progress bar while loading.
        groups: layers that are computed at once, of one type each; see :mod:`kvbuffer.models.group`.
        bypass: how many layers back the MLPs of a group see.
        adapter: is added to the weights.

    Attributes:
        mtp: the multi-token-prediction head; None unless the configuration asks for it.

    Raises:
        ModelError: the weights do not fit the configuration, the adapter does not fit them, or there is no such head.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        max_model_len: int,
        show_progress: bool = True,
        groups: Sequence[tuple[int, ...]] = (),
        bypass: int = 0,
        adapter: Adapter | None = None,
    ) -> None:
        self.config, self.dtype, self._adapter = config, dtype, adapter
        layout = LAYOUTS[config.layout]
        ignored = layout.IGNORED if config.with_mtp else (*layout.IGNORED, mtp.WEIGHTS)
        reader = self._open(folder, ignored, show_progress)
        try:
            prefix = layout.prefix(reader)
            rotary = RotaryTable(config, max_model_len)
            self.embedding = reader.take(f"{prefix}embed_tokens.weight", config.vocab_size, config.hidden_size)
            self.layers: list[Unit] = [
                self._unit(reader, f"{prefix}layers.", unit, rotary, bypass)
                for unit in run_order(config.num_layers, groups)
            ]
            self.norm = zero_centred(reader, f"{prefix}norm.weight", config.hidden_size)
            tied = config.tie_word_embeddings and "lm_head.weight" not in reader
            head = self.embedding if tied else reader.take("lm_head.weight", *self.embedding.shape)
            self.lm_head = self._head(head)
            self.mtp = mtp.MtpHead(reader, config, self.embedding, rotary) if config.with_mtp else None
            reader.finish()
        finally:
            reader.close()
        self._blocks: Blocks | None = None
        self._bound: Sequence[LinearCache | AttentionCache] | None = None

    def _open(self, folder: Path, ignored: Sequence[str], show_progress: bool) -> WeightReader:
        return WeightReader(folder, self.dtype, ignored, show_progress, self._adapter)

    def _head(self, weight: Tensor) -> Linear:
        return Linear(weight)

    def _unit(
        self, reader: WeightReader, layers: str, indices: tuple[int, ...], rotary: RotaryTable, bypass: int
    ) -> Unit:
        config = self.config
        if len(indices) > 1:
            in_proj = LAYOUTS[config.layout].in_proj
            return read_group(reader, layers, indices, config, in_proj, rotary, bypass)
        return read_layer(reader, layers, indices[0], config, rotary)

    @torch.inference_mode()
    def forward(self, inputs: ModelInputs, caches: Sequence[LinearCache | AttentionCache]) -> Tensor:
        """Run one ragged batch.

        Args:
            inputs: the batch, N tokens.
            caches: one per layer or group, as :func:`kvbuffer.cache.store.allocate` makes them; written. That of the
                multi-token-prediction head, which is not run here, may come last.

        Returns:
            Logits of the rows asked for, [R, vocab_size] float32.
        """
        x, residual = self._layers(inputs, caches)
        rows = inputs.logits_rows
        if len(rows) < len(x):
            x, residual = x[rows], residual[rows]
        return self.lm_head.of_add_rms_norm(x, residual, self.norm, self.config.rms_norm_eps)

    @torch.inference_mode()
    def forward_with_hidden(
        self, inputs: ModelInputs, caches: Sequence[LinearCache | AttentionCache]
    ) -> tuple[Tensor, Tensor]:
        """Run one ragged batch as :meth:`forward` does; return the hidden states after the final norm, too.

        Returns:
            Logits of the rows asked for, [R, vocab_size], and hidden states of all tokens, [N, hidden_size]; float32.
        """
        hidden = add_rms_norm(*self._layers(inputs, caches), self.norm, self.config.rms_norm_eps)
        return self.lm_head(hidden[inputs.logits_rows]), hidden

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens [N], [N, hidden] float32."""
        return F.embedding(token_ids, self.embedding).float()

    def _layers(self, inputs: ModelInputs, caches: Sequence[LinearCache | AttentionCache]) -> tuple[Tensor, Tensor]:
        """Return the last layer's output, and the residual stream that it is still to be added to."""
        blocks = self._at_once(caches) if inputs.is_short else None
        if blocks is not None:
            return blocks(inputs)
        residual = self.embed(inputs.token_ids)
        x: Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=False):
            x = layer.forward(x, residual, inputs, cache)
        assert x is not None
        return x, residual

    def _at_once(self, caches: Sequence[LinearCache | AttentionCache]) -> Blocks | None:
        """Return all layers on their memory in one call; None where some are grouped or have no kernels."""
        if self._bound is not caches:
            self._bound, self._blocks = caches, None
            blocks: list[Block | None] = []
            for layer, cache in zip(self.layers, caches, strict=False):
                blocks += layer.blocks(cache) if isinstance(layer, DecoderLayer) else [None]
            if None not in blocks:
                self._blocks = Blocks(self.embedding, [block for block in blocks if block is not None])
        return self._blocks
