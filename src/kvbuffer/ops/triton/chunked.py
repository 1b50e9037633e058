"""Prefill: the recurrence over whole sequences in registers, one small block of the value dim per program.

A program of one warp crosses no barrier between tokens, and small blocks make many programs to overlap. Wherever a
prompt is split between calls, no bit of a float32 result changes.
"""

from __future__ import annotations

from torch import Tensor

from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.rule import UpdateRule
from kvbuffer.ops.triton import recurrent

_BLOCK_V = 16


def chunked_prefill(
    rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor, cu_seqlens: Tensor, fresh: Tensor
) -> Tensor:
    """See :func:`kvbuffer.ops.chunked.chunked_prefill`."""
    return recurrent.run(rule, tokens, states, slots, cu_seqlens, fresh, _BLOCK_V)
