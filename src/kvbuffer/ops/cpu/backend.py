"""The linear-attention operators on the compiled CPU kernels (gated_delta.cpp)."""

from __future__ import annotations

from ctypes import CDLL, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvbuffer.ops import dispatch, portable
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import GATED_DELTANET, UpdateRule

chunked_prefill = portable.chunked_prefill
buffered_verify = portable.buffered_verify


def supports(call: dispatch.Call) -> tuple[bool, str]:
    """Return whether the kernels cover a call, and if not, why."""
    if call.device != "cpu":
        return False, "the tensors are not on the CPU"
    lib = dispatch.cpu_kernels()
    if lib is None:
        return False, "the kernels are not built"
    if call.rule != GATED_DELTANET:
        return False, f"no kernel for {call.rule.name}"
    if call.value_dim % lib.kvb_vector_width():
        return False, f"value dim {call.value_dim} is no multiple of {lib.kvb_vector_width()}"
    if call.state_dtype not in dispatch.DTYPE_CODES or call.record_dtype not in (torch.float32, None):
        return False, f"no kernel for {call.state_dtype} states with {call.record_dtype} records"
    return True, ""


@cache
def _bind(lib: CDLL) -> CDLL:
    pages: list[Any] = [*[c_void_p] * 4, c_int64]
    inputs: list[Any] = [*[c_void_p, c_int64] * 3, c_void_p, c_void_p]
    lib.kvb_buffered_decode.argtypes = [*inputs, *[c_void_p] * 2, *pages, *[c_void_p] * 3, *[c_int64] * 7]
    lib.kvb_fold.argtypes = [c_void_p, c_void_p, *pages, c_void_p, *[c_int64] * 7]
    lib.kvb_recurrent_decode.argtypes = [*inputs, *[c_void_p] * 3, *[c_int64] * 6]
    return lib


def _kernels() -> CDLL:
    lib = dispatch.cpu_kernels()
    assert lib is not None
    return _bind(lib)


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
    k, v = tokens.k, tokens.v
    out = torch.empty(v.shape)
    _kernels().kvb_buffered_decode(
        *_inputs(tokens), states.data.data_ptr(), slots.data_ptr(), *_pages(records, page_table), fill.data_ptr(),
        fold.data_ptr(), out.data_ptr(), v.shape[0], k.shape[1], v.shape[1], k.shape[2], v.shape[2],
        records.page_size, dispatch.DTYPE_CODES[states.data.dtype],
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
    if target_slots is not slots:
        portable.fold_records(rule, states, slots, records, page_table, count, target_slots)
        return
    _kernels().kvb_fold(
        states.data.data_ptr(), slots.data_ptr(), *_pages(records, page_table), count.data_ptr(), slots.shape[0],
        records.keys.shape[1], *states.data.shape[1:], records.page_size, dispatch.DTYPE_CODES[states.data.dtype],
    )  # fmt: skip


def recurrent_decode(rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor) -> Tensor:
    """See :func:`kvbuffer.ops.buffered.recurrent_decode`."""
    k, v = tokens.k, tokens.v
    out = torch.empty(v.shape)
    _kernels().kvb_recurrent_decode(
        *_inputs(tokens), states.data.data_ptr(), slots.data_ptr(), out.data_ptr(),
        v.shape[0], k.shape[1], v.shape[1], k.shape[2], v.shape[2], dispatch.DTYPE_CODES[states.data.dtype],
    )  # fmt: skip
    return out


def _inputs(tokens: Tokens) -> tuple[int, ...]:
    assert tokens.g is not None
    assert tokens.beta is not None
    rows = (part for x in tokens[:3] for part in (x.data_ptr(), x.stride(0)))
    return *rows, tokens.g.data_ptr(), tokens.beta.data_ptr()


def _pages(records: RecordPages, page_table: Tensor) -> tuple[int, ...]:
    keys, values, decays = records
    return keys.data_ptr(), values.data_ptr(), decays.data_ptr(), page_table.data_ptr(), page_table.stride(0)
