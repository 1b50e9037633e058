"""Fold the first records of each request into a state.

tensors (r read, w written)
  states         data [slots, HV, K, V], scales [slots, HV, K]   r, w
  records        keys, values, decays in pages                   r
  page_table     [B, P] int32                                    r
  slots, count   [B] int32                                       r
  target_slots   [B] int32                                       r
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvbuffer.ops.layout import RecordPages, StatePool
from kvbuffer.ops.rule import UpdateRule
from kvbuffer.ops.triton.tiles import Buffers, fold_into, launch_shape, load_state, store_state

_BLOCK_V = 64


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
    dims, blocks, warps = launch_shape(rule, states, records.keys.shape[1], records, _BLOCK_V)
    fold_kernel[(blocks, states.data.shape[1], len(slots))](
        states, slots, Buffers(*records, page_table, page_table.stride(0)), count, target_slots, dims, num_warps=warps
    )


@triton.jit
def fold_kernel(states, slots, buffers, count, target_slots, dims):
    """Program (value block, value head, request): its tile of the state."""
    cols = tl.program_id(0) * dims.block_v + tl.arange(0, dims.block_v)
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot, target = tl.load(slots + b).to(tl.int64), tl.load(target_slots + b).to(tl.int64)
    n = tl.load(count + b)
    if (n > 0) | (slot != target):
        state, scale = load_state(states, slot, head, cols, dims)
        state = fold_into(state * scale[:, None], buffers, b, n, head, cols, dims)
        store_state(states, target, head, cols, state, dims)
