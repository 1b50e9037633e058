"""The recurrence in registers: one token per request, or whole sequences; the state is read once and written once.

tensors (r read, w written)
  tokens       N rows                                         r
  states       data [slots, HV, K, V], scales [slots, HV, K]  r, w
  slots        [B] int32                                      r
  cu_seqlens   [B + 1] int32, or none: one token per request  r
  fresh        [B] uint8, or none: all start from their slot  r
  out          [N, HV, V] float32                             w
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.rule import UpdateRule
from kvbuffer.ops.triton.tiles import (
    launch_shape,
    load_decay,
    load_key,
    load_state,
    load_value,
    row_strides,
    store_state,
)

_BLOCK_V = 32


def recurrent_decode(rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor) -> Tensor:
    """See :func:`kvbuffer.ops.buffered.recurrent_decode`."""
    return run(rule, tokens, states, slots, None, None, _BLOCK_V)


def run(
    rule: UpdateRule,
    tokens: Tokens,
    states: StatePool,
    slots: Tensor,
    cu_seqlens: Tensor | None,
    fresh: Tensor | None,
    block_v: int,
) -> Tensor:
    """Launch the kernel below; ``block_v`` is how much of the value dim one program owns."""
    out = torch.empty(tokens.v.shape, device=tokens.v.device)
    dims, blocks, warps = launch_shape(rule, states, tokens.k.shape[1], None, block_v)
    recurrent_kernel[(blocks, tokens.v.shape[1], len(slots))](
        tokens, row_strides(tokens), states, slots, cu_seqlens, fresh, out, dims, num_warps=warps
    )
    return out


@triton.jit
def recurrent_kernel(tokens, strides, states, slots, cu_seqlens, fresh, out, dims):
    """Program (value block, value head, request)."""
    cols = tl.program_id(0) * dims.block_v + tl.arange(0, dims.block_v)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin, end = b, b + 1
    if cu_seqlens is not None:
        begin, end = tl.load(cu_seqlens + b).to(tl.int64), tl.load(cu_seqlens + b + 1).to(tl.int64)
    if begin == end:
        return
    slot = tl.load(slots + b).to(tl.int64)
    source = slot
    if fresh is not None:
        source = tl.where(tl.load(fresh + b) != 0, -1, slot)
    state, scale = load_state(states, source, head, cols, dims)
    state *= scale[:, None]
    for t in range(begin, end):
        q = load_key(tokens.q, t, True, strides.q, head, dims)
        key = load_key(tokens.k, t, True, strides.k, head, dims)
        value = load_value(tokens, strides, t, True, head, cols, dims)
        decay = tl.exp(load_decay(tokens, strides, t, True, head, dims))
        # Both products on one pass over the state, as it was before the token.
        from_q = tl.sum(state * (q * decay)[:, None], 0)
        if dims.removal:
            read = load_key(tokens.removal_read, t, True, dims.key_heads * dims.k, head, dims)
            write = load_key(tokens.removal_write, t, True, dims.key_heads * dims.k, head, dims)
            removed = -tl.sum(state * read[:, None], 0)
            state = state * decay[:, None] + write[:, None] * removed[None, :]
            from_q += tl.sum(q * write) * removed
        else:
            if dims.delta:
                beta = tl.load(tokens.beta + t * dims.value_heads + head)
                value = beta * (value - tl.sum(state * (key * decay)[:, None], 0))
            state *= decay[:, None]
        state += key[:, None] * value[None, :]
        from_q += tl.sum(q * key) * value
        tl.store(out + (t * dims.value_heads + head) * dims.v + cols, from_q, mask=cols < dims.v)
    store_state(states, slot, head, cols, state, dims)
