"""The buffered forms and the recurrence in plain PyTorch: every family, every dtype, any device; the fallback.

Verification is the general form: m new tokens against state, records and one another. Decoding is its case m = 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.reference import log_decay, recurrence
from kvbuffer.ops.rule import Correction, UpdateRule

_INT8_MAX = 127.0

# Smaller factors count as 0: exponentials and products that underflow are a hundred times slower.
_SMALLEST_LOG = -80.0
_SMALLEST = 2e-35


class _Records(NamedTuple):
    """One request's records in order: keys [n, R, HV, K], values [n, R, HV, V], log-decays [n, HV, D]."""

    keys: Tensor
    values: Tensor
    decays: Tensor


def decay_factor(log_decay: Tensor) -> Tensor:
    """Return what a sum of log-decays leaves, in float32: float64 was for the digits of the sum."""
    return torch.threshold(log_decay.float().clamp(_SMALLEST_LOG, 0).exp(), _SMALLEST, 0.0)


def load_state(states: StatePool, slot: int) -> Tensor:
    """Return one slot's state [HV, K, V] in float32; zeros for slot -1."""
    if slot < 0:
        return torch.zeros_like(states.data[0], dtype=torch.float32)
    state = states.data[slot].float()
    return state if states.scales is None else state * states.scales[slot].unsqueeze(-1)


def store_state(states: StatePool, slot: int, state: Tensor) -> None:
    """Round a state [HV, K, V] to nearest into its slot; int8 rows are scaled by their largest element."""
    if states.scales is None:
        states.data[slot] = state
        return
    scales = state.abs().amax(-1) / _INT8_MAX
    states.scales[slot] = scales
    states.data[slot] = (state / scales.clamp_min(1e-38).unsqueeze(-1)).round().to(torch.int8)


def recurrent_decode(rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor) -> Tensor:
    """See :func:`kvbuffer.ops.buffered.recurrent_decode`."""
    out = torch.empty_like(tokens.v)
    for b, slot in enumerate(slots.tolist()):
        out[b : b + 1], state = recurrence(rule, tokens.rows(slice(b, b + 1)), load_state(states, slot))
        store_state(states, slot, state)
    return out


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
    folding = fold.bool()
    fold_records(rule, states, slots[folding], records, page_table[folding], fill[folding], slots[folding])
    borders = torch.arange(len(slots) + 1, dtype=torch.int32)
    fill = torch.where(folding, 0, fill)
    return buffered_verify(rule, tokens, states, slots, records, page_table, fill, borders, None)


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
    out = torch.empty_like(tokens.v)
    borders = cu_seqlens.tolist()
    for b, slot in enumerate(slots.tolist()):
        span, n = slice(borders[b], borders[b + 1]), int(fill[b])
        if span.start == span.stop:
            continue
        own = tokens.rows(span)
        ancestors = _ancestors(own.v.shape[0], None if parents is None else parents[span].tolist())
        before = _gather(rule, records, page_table[b], n, tokens.v.shape[1])
        out[span], new = _extend(rule, own, load_state(states, slot), before, ancestors, records.values.dtype)
        _append(rule, records, page_table[b], n, own, new)
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
    heads = states.data.shape[1]
    folded = []
    for b, slot in enumerate(slots.tolist()):
        part = _gather(rule, records, page_table[b], int(count[b]), heads)
        after_each, total = _decays_to_end(part.decays)
        weights = decay_factor(after_each).unsqueeze(1)
        state = decay_factor(total).unsqueeze(-1) * load_state(states, slot)
        folded.append(state + torch.einsum("nrhk,nrhv->hkv", part.keys * weights, part.values))
    for state, slot, source, n in zip(folded, target_slots.tolist(), slots.tolist(), count.tolist(), strict=True):
        if n or slot != source:
            store_state(states, slot, state)


def _ancestors(m: int, parents: list[int] | None) -> Tensor:
    """Return [m, m] bool: whether token j is token t or lies on its path from the buffer's end."""
    if parents is None:
        return torch.ones(m, m, dtype=torch.bool).tril()
    ancestors = torch.eye(m, dtype=torch.bool)
    for t, parent in enumerate(parents):
        if parent >= 0:
            ancestors[t] |= ancestors[parent]
    return ancestors


def _extend(
    rule: UpdateRule, tokens: Tokens, state: Tensor, before: _Records, ancestors: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Run m tokens of one request; return outputs [m, HV, V] and written values [m, R, HV, V]."""
    m, heads, _ = tokens.v.shape
    rep = heads // tokens.k.shape[1]
    # Summed in float64: the difference of two large sums is a small log-decay.
    g = log_decay(rule, tokens).double()
    path = torch.einsum("tj,jhd->thd", ancestors.double(), g)  # log-decay from the buffer's end through each token
    to_buffer_end, through_buffer = _decays_to_end(before.decays)
    keys = torch.stack(_pair_keys(rule, tokens), 1).repeat_interleave(rep, 2)  # [m, R, HV, K]
    stored_keys = keys.to(dtype).float()

    def from_before(x: Tensor, decay: Tensor) -> Tensor:
        """What state and records answer to x [m, HV, K], decayed by exp(decay) [m, HV, D] since the buffer's end."""
        scaled = x * decay_factor(through_buffer + decay)
        answer = torch.einsum("hkv,mhk->mhv", state, scaled)
        ratios = decay_factor(to_buffer_end.unsqueeze(0) + decay.unsqueeze(1))  # [m, n, HV, D]
        scores = torch.einsum("mnhk,nrhk->mnrh", x.unsqueeze(1) * ratios, before.keys)
        return answer + torch.einsum("mnrh,nrhv->mhv", scores, before.values)

    def scores_among(x: Tensor, decay: Tensor) -> Tensor:
        """x . key of the tokens before each other: [t, j, R, HV], zero unless j is a true ancestor of t."""
        strict = (ancestors & ~torch.eye(m, dtype=torch.bool))[..., None, None]
        ratios = decay_factor((decay.unsqueeze(1) - path.unsqueeze(0)).masked_fill(~strict, -torch.inf))
        return torch.einsum("tjhk,jrhk->tjrh", x.unsqueeze(1) * ratios, stored_keys)

    values = torch.zeros(m, rule.num_pairs, heads, tokens.v.shape[2])
    values[:, -1] = tokens.v
    stored = values.to(dtype).float()
    if rule.correction is not Correction.NONE:
        delta = rule.correction is Correction.DELTA
        read_with = tokens.k if delta else tokens.removal_read
        assert read_with is not None
        read_with = read_with.repeat_interleave(rep, 1)
        decay = path if delta else path - g  # a removal reads the state before the token's own decay
        predicted, scores = from_before(read_with, decay), scores_among(read_with, decay)
        for t in range(m):
            answer = predicted[t] + torch.einsum("jrh,jrhv->hv", scores[t, :t], stored[:t])
            if delta:
                assert tokens.beta is not None
                values[t, 0] = tokens.beta[t].unsqueeze(-1) * (tokens.v[t] - answer)
            else:
                values[t, 0] = -answer
            stored[t] = values[t].to(dtype).float()
    q = tokens.q.repeat_interleave(rep, 1)
    out = from_before(q, path) + torch.einsum("tjrh,jrhv->thv", scores_among(q, path), stored)
    own = torch.einsum("thk,trhk->trh", q, keys)
    return out + torch.einsum("trh,trhv->thv", own, values), values


def _pair_keys(rule: UpdateRule, tokens: Tokens) -> list[Tensor]:
    if rule.correction is not Correction.REMOVAL:
        return [tokens.k]
    assert tokens.removal_write is not None
    return [tokens.removal_write, tokens.k]


def _decays_to_end(decays: Tensor) -> tuple[Tensor, Tensor]:
    """Return, in float64, the sum of log-decays after each record [n, HV, D], and of all of them [HV, D]."""
    decays = decays.double()
    from_each = decays.flip(0).cumsum(0).flip(0)
    return from_each - decays, decays.sum(0)


def _places(page_table: Tensor, index: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    return page_table[index // page_size].long(), index % page_size


def _gather(rule: UpdateRule, records: RecordPages, page_table: Tensor, n: int, heads: int) -> _Records:
    rows, offsets = _places(page_table, torch.arange(n), records.page_size)
    keys, values, decays = (pool[rows, :, offsets].float() for pool in records)
    keys = keys.repeat_interleave(heads // keys.shape[1], 1)
    pairs = rule.num_pairs
    keys, values = (x.unflatten(-1, (pairs, -1)).transpose(1, 2) for x in (keys, values))
    return _Records(keys, values, decays)


def _append(rule: UpdateRule, records: RecordPages, page_table: Tensor, n: int, tokens: Tokens, values: Tensor) -> None:
    index = torch.arange(n, n + len(values))
    rows, offsets = _places(page_table, index, records.page_size)
    records.keys[rows, :, offsets] = torch.cat(_pair_keys(rule, tokens), -1).to(records.keys.dtype)
    records.values[rows, :, offsets] = values.transpose(1, 2).flatten(2).to(records.values.dtype)
    records.decays[rows, :, offsets] = log_decay(rule, tokens)
