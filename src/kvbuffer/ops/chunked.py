"""Prefill in chunks: the recurrence over 64 tokens at once as a handful of matrix products (WY form).

Inside a chunk that starts from state ``S`` with cumulative log-decays ``G_t`` the delta rule's written values solve one
unit lower-triangular system::

    (I + tril(diag(beta) (K K^T) * D, -1)) U = diag(beta) (V - diag(e^G) K S)         D[t, j] = e^(G_t - G_j), j <= t
    O   = diag(e^G) Q S + tril((Q K^T) * D) U
    S'  = e^(G_last) S + (diag(e^(G_last - G)) K)^T U

Decay ratios are formed as ``exp(G_t - G_j) <= 1``, so nothing overflows however strong the decay. Every chunk is
computed with the same shapes wherever it stands in a call, so splitting a prompt at multiples of :data:`CHUNK` tokens
does not change a bit of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbuffer.ops.reference import log_decay, recurrence
from kvbuffer.ops.rule import Decay, UpdateRule

#: Tokens per chunk. Prompts may be split between calls at multiples of this without changing the result.
CHUNK = 64


def chunked_prefill(
    rule: UpdateRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    fresh: Tensor,
) -> Tensor:
    """Run ragged sequences through the recurrence and leave each one's final state in its slot.

    Args:
        rule: the family.
        q: [N, HK, K] float32 with the softmax scale folded in.
        k: [N, HK, K] float32.
        v: [N, HV, V] float32.
        g: log-decays, [N, HV], [N, HV, K] or None, as the rule says.
        beta: [N, HV] or None, as the rule says.
        states: [num_slots, HV, K, V] float32 or bfloat16; the rows of ``slots`` are read and written.
        slots: [B] int32, all different.
        cu_seqlens: [B + 1] int32 borders of the sequences; a sequence may be empty.
        fresh: [B] uint8, 1 where the sequence starts here (from a zero state).

    Returns:
        [N, HV, V] float32.
    """
    out = torch.empty_like(v)
    decay = log_decay(rule, g, v)
    borders = cu_seqlens.tolist()
    for b, slot in enumerate(slots.tolist()):
        begin, end = borders[b], borders[b + 1]
        if begin == end:
            continue
        state = torch.zeros_like(states[slot], dtype=v.dtype) if fresh[b] else states[slot].to(v.dtype)
        for start in range(begin, end, CHUNK):
            span = slice(start, min(start + CHUNK, end))
            strength = None if beta is None else beta[span]
            if rule.decay is Decay.VECTOR:
                chunk_g = None if g is None else g[span]
                out[span], state = recurrence(rule, q[span], k[span], v[span], chunk_g, strength, state)
            else:
                out[span], state = _chunk(rule, q[span], k[span], v[span], decay[span], strength, state)
        states[slot] = state
    return out


def _chunk(
    rule: UpdateRule, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One chunk of C tokens: q, k [C, HK, K], v [C, HV, V], decay [C, HV, 1] -> out [C, HV, V], state [HV, K, V]."""
    rep = v.shape[1] // k.shape[1]
    q, k = (x.transpose(0, 1).repeat_interleave(rep, 0) for x in (q, k))  # [HV, C, K]
    v = v.transpose(0, 1)
    # Summed in float64: the difference of two large sums is a small log-decay.
    cumulative = decay.transpose(0, 1).double().cumsum(1)  # [HV, C, 1]
    ratios = (cumulative - cumulative.transpose(1, 2)).tril().exp().tril().to(v.dtype)
    from_start = cumulative.exp().to(v.dtype)
    u = v
    if rule.delta:
        assert beta is not None
        strength = beta.T.unsqueeze(-1)
        system = strength * (k @ k.transpose(1, 2)) * ratios
        predicted = from_start * (k @ state)
        u = torch.linalg.solve_triangular(system, strength * (v - predicted), upper=False, unitriangular=True)
    out = from_start * (q @ state) + (q @ k.transpose(1, 2) * ratios) @ u
    to_end = (cumulative[:, -1:] - cumulative).exp().to(v.dtype)
    state = from_start[:, -1:] * state + (to_end * k).transpose(1, 2) @ u
    return out.transpose(0, 1), state
