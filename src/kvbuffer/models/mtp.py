"""The multi-token-prediction head of Qwen3-Next and Qwen3.5: one more layer, which guesses the token after the next."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.cache.store import AttentionCache
from kvbuffer.errors import ModelError
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.layers import DenseMlp, GatedAttention, Mlp, RotaryTable, SparseMoe, zero_centred
from kvbuffer.models.weights import WeightReader
from kvbuffer.ops.batch import ModelInputs
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.norm import add_rms_norm

#: Names of a checkpoint's tensors that belong to the head.
WEIGHTS = r"^mtp\."


class MtpHead:
    """Maps the hidden state after token i, and token i + 1, to an estimate of the hidden state after token i + 1.

    Both inputs are normed and projected together to the input of a full-attention layer; the embedding and the logits
    are the model's own. The head's output may be its next input, so that it guesses several tokens one by one. What it
    computes for token i has position i in attention and place i in the pages.

    Args:
        reader: the checkpoint.
        config: the model.
        embedding: [vocab_size, hidden_size], the model's.
        rotary: the model's.

    Raises:
        ModelError: the checkpoint has no head.
    """

    def __init__(self, reader: WeightReader, config: ModelConfig, embedding: Tensor, rotary: RotaryTable) -> None:
        if "mtp.fc.weight" not in reader:
            raise ModelError(
                f"the checkpoint in {reader.folder} has no multi-token-prediction head (no mtp.* weights): choose "
                "another method of speculation, such as suffix or ngram"
            )
        hidden, prefix = config.hidden_size, "mtp.layers.0."
        self.eps, self.embedding = config.rms_norm_eps, embedding
        self.embedding_norm = zero_centred(reader, "mtp.pre_fc_norm_embedding.weight", hidden)
        self.hidden_norm = zero_centred(reader, "mtp.pre_fc_norm_hidden.weight", hidden)
        self.fc = Linear(reader.take("mtp.fc.weight", hidden, 2 * hidden))
        input_norm = zero_centred(reader, f"{prefix}input_layernorm.weight", hidden)
        self.attention = GatedAttention(reader, f"{prefix}self_attn.", config, input_norm, rotary)
        mlp_norm = zero_centred(reader, f"{prefix}post_attention_layernorm.weight", hidden)
        self.mlp: Mlp
        if config.moe is not None and f"{prefix}mlp.gate.weight" in reader:
            self.mlp = SparseMoe(reader, f"{prefix}mlp.", config, mlp_norm, config.moe)
        else:
            self.mlp = DenseMlp(reader, f"{prefix}mlp.", config, mlp_norm)
        self.norm = zero_centred(reader, "mtp.norm.weight", hidden)

    @torch.inference_mode()
    def forward(self, hidden: Tensor, inputs: ModelInputs, cache: AttentionCache) -> Tensor:
        """Run one ragged batch.

        Args:
            hidden: [N, hidden_size] float32, contiguous, after the final norm: the model's, or the head's own.
            inputs: N tokens, each the one *after* the token that ``hidden`` belongs to, with that token's position.
            cache: the head's keys and values; written.

        Returns:
            [N, hidden_size] float32, after the head's norm; the model's ``lm_head`` gives logits.
        """
        embedded = F.embedding(inputs.token_ids, self.embedding).float()
        parts = (
            add_rms_norm(None, embedded, self.embedding_norm, self.eps),
            add_rms_norm(None, hidden, self.hidden_norm, self.eps),
        )
        residual = self.fc(torch.cat(parts, 1))
        x = self.mlp.forward(self.attention.forward(None, residual, inputs, cache), residual)
        return add_rms_norm(x, residual, self.norm, self.eps)
