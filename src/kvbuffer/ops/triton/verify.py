"""Verification: any number of new tokens against state and records; the state is read once and never written.

The state's tile stays in registers while the tokens pass, one after another, each appending its record. In a chain a
token's predecessors are thereby the buffer's records; in a tree it walks up its parents first.

tensors (r read, w written)
  tokens       N rows                                          r
  states       data [slots, HV, K, V], scales [slots, HV, K]   r
  slots        [B] int32                                       r
  records      keys, values, decays in pages                   r, w one record per token
  page_table   [B, P] int32                                    r
  fill         [B] int32                                       r
  cu_seqlens   [B + 1] int32                                   r
  parents      [N] int32, or none for chains                   r
  out          [N, HV, V] float32                              w
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
    launch_shape,
    load_state,
    row_strides,
    store_decay,
    store_keys,
    store_written,
)

_BLOCK_V = 64


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
    out = torch.empty(tokens.v.shape, device=tokens.v.device)
    dims, blocks, warps = launch_shape(rule, states, tokens.k.shape[1], records, _BLOCK_V)
    buffers = Buffers(*records, page_table, page_table.stride(0))
    verify_kernel[(blocks, tokens.v.shape[1], len(slots))](
        tokens, row_strides(tokens), states, slots, buffers, fill, cu_seqlens, parents, out, dims, num_warps=warps
    )
    return out


@triton.jit
def verify_kernel(tokens, strides, states, slots, buffers, fill, cu_seqlens, parents, out, dims):
    """Program (value block, value head, request): its outputs and its part of the written values."""
    cols = tl.program_id(0) * dims.block_v + tl.arange(0, dims.block_v)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.load(cu_seqlens + b).to(tl.int64)
    tokens_here = (tl.load(cu_seqlens + b + 1) - start).to(tl.int32)
    if tokens_here == 0:
        return
    filled = tl.load(fill + b)
    state, scale = load_state(states, tl.load(slots + b).to(tl.int64), head, cols, dims)
    for t in range(0, tokens_here):
        token = start + t
        if parents is None:
            result, removed, value = step(
                state, scale, tokens, strides, token, buffers, b, filled + t, None, None, head, cols, dims
            )
        else:
            parent = tl.load(parents + token)
            result, removed, value = step(
                state, scale, tokens, strides, token, buffers, b, filled, parents + start, parent, head, cols, dims
            )
        tl.store(out + (token * dims.value_heads + head) * dims.v + cols, result, mask=cols < dims.v)
        # Keys and decays are the same in every program of a head; each writes them, to be sure of what it reads next.
        store_keys(tokens, strides, buffers, b, token, filled + t, True, head, dims)
        store_decay(tokens, strides, buffers, b, token, filled + t, True, head, dims)
        store_written(buffers, b, filled + t, removed, value, head, cols, dims)
        # The next token reads what this one's other threads wrote.
        tl.debug_barrier()
