"""What one step hands to the model: a ragged batch of tokens and where each request's memory lies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BufferView:
    """Where the linear-attention layers find each request's state and buffer. B requests.

    Decoding requests (one new token, appended to the buffer) come first in the batch, then those that prefill.

    Attributes:
        num_decodes: how many of the requests decode.
        slots: [B] int32, row in the state and convolution pools.
        page_table: [B, P] int32, record pages.
        fill: [B] int32, records in the buffer before this step.
        fold: [B] uint8, fold these records into the state in this step.
        fresh: [B] uint8, nothing came before this step: state and rolling inputs start at zero.
    """

    num_decodes: int
    slots: Tensor
    page_table: Tensor
    fill: Tensor
    fold: Tensor
    fresh: Tensor


@dataclass(frozen=True)
class ModelInputs:
    """A ragged batch: N tokens of B requests, one after the other.

    Attributes:
        token_ids: [N] int64.
        positions: [N] int32, place of each token in its request.
        cu_seqlens: [B + 1] int32, borders of the requests among the tokens.
        context_lens: [B] int32, tokens of each request computed before this step.
        attention_page_table: [B, P] int32, pages of keys and values.
        logits_rows: [R] int64, tokens whose next-token logits are wanted.
        buffer: where states and records lie.
    """

    token_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    context_lens: Tensor
    attention_page_table: Tensor
    logits_rows: Tensor
    buffer: BufferView
