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

from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.portable.buffered import load_state, store_state
from kvbuffer.ops.reference import log_decay, recurrence
from kvbuffer.ops.rule import Correction, Decay, UpdateRule

CHUNK = 64


def chunked_prefill(
    rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor, cu_seqlens: Tensor, fresh: Tensor
) -> Tensor:
    """See :func:`kvbuffer.ops.chunked.chunked_prefill`."""
    out = torch.empty_like(tokens.v)
    borders = cu_seqlens.tolist()
    for b, slot in enumerate(slots.tolist()):
        begin, end = borders[b], borders[b + 1]
        if begin == end:
            continue
        state = load_state(states, -1 if fresh[b] else slot)
        for start in range(begin, end, CHUNK):
            span = slice(start, min(start + CHUNK, end))
            if rule.decay is Decay.VECTOR:
                out[span], state = recurrence(rule, tokens.rows(span), state)
            else:
                out[span], state = _chunk(rule, tokens.rows(span), state)
        store_state(states, slot, state)
    return out


def _chunk(rule: UpdateRule, tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of C tokens from state [HV, K, V]: outputs [C, HV, V] and the state after it."""
    rep = tokens.v.shape[1] // tokens.k.shape[1]
    q, k = (x.transpose(0, 1).repeat_interleave(rep, 0) for x in (tokens.q, tokens.k))  # [HV, C, K]
    v = tokens.v.transpose(0, 1)
    # Summed in float64: the difference of two large sums is a small log-decay.
    cumulative = log_decay(rule, tokens).transpose(0, 1).double().cumsum(1)  # [HV, C, 1]
    ratios = (cumulative - cumulative.transpose(1, 2)).tril().exp().tril().to(v.dtype)
    from_start = cumulative.exp().to(v.dtype)
    u = v
    if rule.correction is Correction.DELTA:
        assert tokens.beta is not None
        strength = tokens.beta.T.unsqueeze(-1)
        system = strength * (k @ k.transpose(1, 2)) * ratios
        predicted = from_start * (k @ state)
        u = torch.linalg.solve_triangular(system, strength * (v - predicted), upper=False, unitriangular=True)
    out = from_start * (q @ state) + (q @ k.transpose(1, 2) * ratios) @ u
    to_end = (cumulative[:, -1:] - cumulative).exp().to(v.dtype)
    state = from_start[:, -1:] * state + (to_end * k).transpose(1, 2) @ u
    return out.transpose(0, 1), state
