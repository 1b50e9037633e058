"""Chunked prefill on the compiled CPU kernel (chunked.cpp)."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kvbuffer.ops.cpu.arguments import SHAPE, STATES, TOKENS, kernel, shape_of, states_of, tokens_of
from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.rule import UpdateRule


def chunked_prefill(
    rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor, cu_seqlens: Tensor, fresh: Tensor
) -> Tensor:
    """See :func:`kvbuffer.ops.chunked.chunked_prefill`."""
    out = torch.empty(tokens.v.shape)
    kernel("kvb_chunked_prefill", SHAPE, TOKENS, STATES, *[c_void_p] * 4, c_int64)(
        shape_of(rule, states, tokens.k.shape[1]), tokens_of(tokens), states_of(states),
        slots.data_ptr(), cu_seqlens.data_ptr(), fresh.data_ptr(), out.data_ptr(), len(slots),
    )  # fmt: skip
    return out
