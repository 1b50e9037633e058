"""Buffered decode: one token per request, state and records read once, the state written only where it is folded.

tensors (r read, w written)
  tokens       one row per request                                    r
  states       data [slots, HV, K, V], scales [slots, HV, K]          r, w where fold
  records      keys, values, decays in pages                          r, w one record per request
  page_table   [B, P] int32                                           r
  fill         [B] int32                                              r
  fold         [B] uint8                                              r
  out          [B, HV, V] float32                                     w
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import UpdateRule
from kvbuffer.ops.triton.step import step
from kvbuffer.ops.triton.tiles import (
    Buffers,
    fold_into,
    launch_shape,
    load_state,
    row_strides,
    store_decay,
    store_keys,
    store_state,
    store_written,
)

# Value dims per program: each reads all keys of the buffer again, so it should be a fair part of the state.
_BLOCK_V = 64


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
    requests, key_heads, _ = tokens.k.shape
    out = torch.empty(tokens.v.shape, device=tokens.v.device)
    dims, blocks, warps = launch_shape(rule, states, key_heads, records, _BLOCK_V)
    buffers = Buffers(*records, page_table, page_table.stride(0))
    strides = row_strides(tokens)
    decode_kernel[(blocks, tokens.v.shape[1], requests)](
        tokens, strides, states, slots, buffers, fill, fold, out, dims, num_warps=warps
    )
    append_kernel[(key_heads, requests)](tokens, strides, buffers, fill, fold, dims, num_warps=1)
    return out


@triton.jit
def decode_kernel(tokens, strides, states, slots, buffers, fill, fold, out, dims):
    """Program (value block, value head, request): its outputs, its part of the new values, its state if folded."""
    cols = tl.program_id(0) * dims.block_v + tl.arange(0, dims.block_v)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + b).to(tl.int64)
    state, scale = load_state(states, slot, head, cols, dims)
    filled = tl.load(fill + b)
    folding = tl.load(fold + b) != 0
    if folding:
        state = fold_into(state * scale[:, None], buffers, b, filled, head, cols, dims)
        state, scale = store_state(states, slot, head, cols, state, dims)
    count = tl.where(folding, 0, filled)
    result, removed, value = step(state, scale, tokens, strides, b, buffers, b, count, None, None, head, cols, dims)
    tl.store(out + (b * dims.value_heads + head) * dims.v + cols, result, mask=cols < dims.v)
    # After a fold the new record takes the place of one that other threads may still be reading.
    tl.debug_barrier()
    store_written(buffers, b, count, removed, value, head, cols, dims)


@triton.jit
def append_kernel(tokens, strides, buffers, fill, fold, dims):
    """Program (key head, request): the new record's keys and decays.

    A launch of its own, since every program of a key head reads the record that this one may replace.
    """
    b = tl.program_id(1).to(tl.int64)
    place = tl.where(tl.load(fold + b) != 0, 0, tl.load(fill + b))
    group: tl.constexpr = dims.value_heads // dims.key_heads
    first = tl.program_id(0) * group
    store_keys(tokens, strides, buffers, b, b, place, True, first, dims)
    for head in range(first, first + group):
        store_decay(tokens, strides, buffers, b, b, place, True, head, dims)
