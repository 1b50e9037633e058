"""Verification on the compiled CPU kernel (verify.cpp)."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kvbuffer.ops.cpu.arguments import (
    RECORDS,
    SHAPE,
    STATES,
    TOKENS,
    kernel,
    records_of,
    shape_of,
    states_of,
    tokens_of,
)
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import UpdateRule


def buffered_verify(
    rule: UpdateRule,
    tokens: Tokens,
    states: StatePool,
    slots: Tensor,
    records: RecordPages,
    page_table: Tensor,
    fill: Tensor,
    cu_seqlens: Tensor,
    parents: Tensor | None,
) -> Tensor:
    """See :func:`kvbuffer.ops.buffered.buffered_verify`."""
    out = torch.empty(tokens.v.shape)
    kernel("kvb_buffered_verify", SHAPE, TOKENS, STATES, RECORDS, *[c_void_p] * 5, c_int64)(
        shape_of(rule, states, tokens.k.shape[1]), tokens_of(tokens), states_of(states),
        records_of(records, page_table), slots.data_ptr(), fill.data_ptr(), cu_seqlens.data_ptr(),
        None if parents is None else parents.data_ptr(), out.data_ptr(), len(slots),
    )  # fmt: skip
    return out
