"""Prefill in chunks: the recurrence over 64 tokens at once as a handful of matrix products (WY form).

In a chunk that starts from state ``S`` and has cumulative log-decays ``G_t``, the score of reader x at token t against
key y at token j is their product under the decay between the two; what x reads of ``S`` has decayed since the start::

    score(x, y)[t, j] = sum_k x_t[k] y_j[k] e^(G_t[k] - G_j[k])           read(x)[t] = (e^(G_t) * x_t)^T S

The delta rule's written values U solve one unit lower-triangular system, and so do a removal rule's values W, whose
readers r and keys p are its own and whose reads precede the token's decay (``G_(t-1)`` for ``G_t``)::

    (I + tril(diag(beta) score(k, k), -1)) U = diag(beta) (V - read(k))
    (I + tril(score(r, p), -1)) W = -(read(r) + tril(score(r, k), -1) V)

Outputs and the next state then sum over the token's pairs, (k, U), or (p, W) and (k, V)::

    O  = read(q) + sum_pairs tril(score(q, y)) Y
    S' = e^(G_last) S + sum_pairs (e^(G_last - G) * y)^T Y

Every exponential is of the decay from an earlier to a later token, so it is at most 1 and nothing overflows however
strong the decay. Every chunk is computed with the same shapes wherever it stands in a call, so splitting a prompt at
multiples of :data:`CHUNK` tokens does not change a bit of the result.

Source: Yang et al., "Gated Delta Networks", arXiv 2412.06464, §3.3; for vector decays "Gated Linear Attention
Transformers", arXiv 2312.06635, §4.3 (its secondary chunks are the sub-chunks here).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.portable.buffered import decay_factor, load_state, store_state
from kvbuffer.ops.reference import log_decay
from kvbuffer.ops.rule import Correction, Decay, UpdateRule

CHUNK = 64

# With vector decays, the ratios of all pairs of tokens are formed only among this many.
_SUBCHUNK = 8

# Takes readers and keys [HV, C, K], gives their products under the decay between them [HV, C, C]; not meaningful above
# the diagonal.
_Score = Callable[[Tensor, Tensor], Tensor]


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
            out[span], state = _chunk(rule, tokens.rows(span), state)
        store_state(states, slot, state)
    return out


def _chunk(rule: UpdateRule, tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk of C tokens from state [HV, K, V]: outputs [C, HV, V] and the state after it."""
    rep = tokens.v.shape[1] // tokens.k.shape[1]

    def per_value_head(x: Tensor | None) -> Tensor:
        assert x is not None
        return x.transpose(0, 1).repeat_interleave(rep, 0)  # [HV, C, K]

    q, k, v = per_value_head(tokens.q), per_value_head(tokens.k), tokens.v.transpose(0, 1)
    # Log-decays [HV, C, 1 or K] from the chunk's start through each token. Summed in float64: the difference of two
    # large sums is a small log-decay.
    g = log_decay(rule, tokens).transpose(0, 1).double()
    through = g.cumsum(1)
    score = _vector_scores(through) if rule.decay is Decay.VECTOR else _scalar_scores(through)
    pairs = [(k, v)]
    if rule.correction is Correction.DELTA:
        assert tokens.beta is not None
        strength = tokens.beta.T.unsqueeze(-1)
        predicted = (k * decay_factor(through)) @ state
        pairs = [(k, _solve(strength * score(k, k), strength * (v - predicted)))]
    elif rule.correction is Correction.REMOVAL:
        read, write = per_value_head(tokens.removal_read), per_value_head(tokens.removal_write)
        # A token reads what its predecessor left: scored in the predecessor's row, then moved to its own.
        reader = read.roll(-1, 1)
        found = (read * decay_factor(through - g)) @ state + score(reader, k).roll(1, 1).tril(-1) @ v
        pairs = [(write, _solve(score(reader, write).roll(1, 1), -found)), (k, v)]
    out = (q * decay_factor(through)) @ state
    state = state * decay_factor(through[:, -1]).unsqueeze(-1)
    to_end = decay_factor(through[:, -1:] - through)
    for key, value in pairs:
        out = out + score(q, key).tril() @ value
        state = state + (key * to_end).mT @ value
    return out.transpose(0, 1), state


def _solve(system: Tensor, right: Tensor) -> Tensor:
    """Solve ``(I + tril(system, -1)) X = right``."""
    solution: Tensor = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return solution


def _scalar_scores(through: Tensor) -> _Score:
    ratios = decay_factor(through - through.mT)
    return lambda x, key: (x @ key.mT) * ratios


def _vector_scores(through: Tensor) -> _Score:
    """Inside a sub-chunk of c tokens each pair has its own decay ratios, [HV, c, c, K] of them.

    Against earlier tokens the ratio factors at the sub-chunk's first token into the decay since that token and the
    decay up to it, neither above 1, and a matrix product does the rest.
    """
    blocks = []
    for start in range(0, through.shape[1], _SUBCHUNK):
        rows, first = slice(start, start + _SUBCHUNK), through[:, start : start + 1]
        inside = decay_factor(through[:, rows, None] - through[:, None, rows])
        blocks.append((rows, inside, decay_factor(through[:, rows] - first), decay_factor(first - through[:, :start])))

    def score(x: Tensor, key: Tensor) -> Tensor:
        scores = x.new_zeros(*x.shape[:2], x.shape[1])
        for rows, inside, since, until in blocks:
            earlier = slice(rows.start)
            scores[:, rows, rows] = ((inside * key[:, None, rows]) @ x[:, rows, :, None]).squeeze(-1)
            scores[:, rows, earlier] = (x[:, rows] * since) @ (key[:, earlier] * until).mT
        return scores

    return score
