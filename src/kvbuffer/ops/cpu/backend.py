"""The linear-attention operators on the compiled CPU kernels."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kvbuffer.ops import dispatch
from kvbuffer.ops.cpu.arguments import (
    RECORD_DTYPES,
    RECORDS,
    SHAPE,
    STATE_DTYPES,
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


def supports(call: dispatch.Call) -> tuple[bool, str]:
    """Return whether the kernels cover a call, and if not, why."""
    if call.device != "cpu":
        return False, "the tensors are not on the CPU"
    lib = dispatch.cpu_kernels()
    if lib is None:
        return False, "the kernels are not built"
    if call.value_dim % lib.kvb_vector_width():
        return False, f"value dim {call.value_dim} is no multiple of {lib.kvb_vector_width()}"
    if call.state_dtype not in STATE_DTYPES or call.record_dtype not in (*RECORD_DTYPES, None):
        return False, f"no kernel for {call.state_dtype} states with {call.record_dtype} records"
    return True, ""


def buffered_decode(
    rule: UpdateRule,
    tokens: Tokens,
    states: StatePool,
    slots: Tensor,
    records: RecordPages,
    page_table: Tensor,
    fill: Tensor,
    fold: Tensor,
) -> Tensor:
    """See :func:`kvbuffer.ops.buffered.buffered_decode`."""
    out = torch.empty_like(tokens.v, memory_format=torch.contiguous_format)
    kernel("kvb_buffered_decode", SHAPE, TOKENS, STATES, RECORDS, *[c_void_p] * 4, c_int64)(
        shape_of(rule, states, tokens.k.shape[1]), tokens_of(tokens), states_of(states),
        records_of(records, page_table), slots.data_ptr(), fill.data_ptr(), fold.data_ptr(), out.data_ptr(), len(slots),
    )  # fmt: skip
    return out


def fold_records(
    rule: UpdateRule,
    states: StatePool,
    slots: Tensor,
    records: RecordPages,
    page_table: Tensor,
    count: Tensor,
    target_slots: Tensor,
) -> None:
    """See :func:`kvbuffer.ops.buffered.fold_records`."""
    kernel("kvb_fold_records", SHAPE, STATES, RECORDS, *[c_void_p] * 3, c_int64)(
        shape_of(rule, states, records.keys.shape[1]), states_of(states), records_of(records, page_table),
        slots.data_ptr(), count.data_ptr(), target_slots.data_ptr(), len(slots),
    )  # fmt: skip


def recurrent_decode(rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor) -> Tensor:
    """See :func:`kvbuffer.ops.buffered.recurrent_decode`."""
    out = torch.empty_like(tokens.v, memory_format=torch.contiguous_format)
    kernel("kvb_recurrent_decode", SHAPE, TOKENS, STATES, *[c_void_p] * 2, c_int64)(
        shape_of(rule, states, tokens.k.shape[1]), tokens_of(tokens), states_of(states),
        slots.data_ptr(), out.data_ptr(), len(slots),
    )  # fmt: skip
    return out


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
    out = torch.empty_like(tokens.v, memory_format=torch.contiguous_format)
    kernel("kvb_buffered_verify", SHAPE, TOKENS, STATES, RECORDS, *[c_void_p] * 5, c_int64)(
        shape_of(rule, states, tokens.k.shape[1]), tokens_of(tokens), states_of(states),
        records_of(records, page_table), slots.data_ptr(), fill.data_ptr(), cu_seqlens.data_ptr(),
        None if parents is None else parents.data_ptr(), out.data_ptr(), len(slots),
    )  # fmt: skip
    return out


def chunked_prefill(
    rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor, cu_seqlens: Tensor, fresh: Tensor
) -> Tensor:
    """See :func:`kvbuffer.ops.chunked.chunked_prefill`."""
    out = torch.empty_like(tokens.v, memory_format=torch.contiguous_format)
    kernel("kvb_chunked_prefill", SHAPE, TOKENS, STATES, *[c_void_p] * 4, c_int64)(
        shape_of(rule, states, tokens.k.shape[1]), tokens_of(tokens), states_of(states),
        slots.data_ptr(), cu_seqlens.data_ptr(), fresh.data_ptr(), out.data_ptr(), len(slots),
    )  # fmt: skip
    return out
