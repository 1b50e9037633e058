"""Prefill: whole prompts through the recurrence, a chunk of tokens at a time in matrix form."""

from __future__ import annotations

from torch import Tensor

from kvbuffer.ops.dispatch import backend_for
from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.library import custom_operator
from kvbuffer.ops.rule import UpdateRule
from kvbuffer.ops.validation import check_length, check_operands, check_vectors

#: Prompts may be split between calls at multiples of this many tokens without changing a bit of the result.
CHUNK = 64


@custom_operator(writes=("states",))
def chunked_prefill(
    rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor, cu_seqlens: Tensor, fresh: Tensor
) -> Tensor:
    """Run ragged sequences through the recurrence and leave each one's final state in its slot.

    For records instead of a state, see :func:`kvbuffer.ops.buffered.buffered_verify` with slot -1.

    Args:
        rule: the family.
        tokens: inputs of N tokens, sequence after sequence.
        states: the layer's states; the rows of ``slots`` are read and written.
        slots: [B] int32, all different.
        cu_seqlens: [B + 1] int32 borders of the sequences; a sequence may be empty.
        fresh: [B] uint8, 1 where the sequence starts here (from a zero state).

    Returns:
        [N, HV, V] float32.
    """
    check_operands(rule, states, tokens)
    requests, device = check_length("slots", slots), states.data.device
    check_vectors(requests, device, slots=slots, fresh=fresh)
    check_vectors(requests + 1, device, cu_seqlens=cu_seqlens)
    return backend_for(rule, tokens, states).chunked_prefill(rule, tokens, states, slots, cu_seqlens, fresh)
