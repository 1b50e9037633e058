"""Decode on a KV buffer: a checkpoint state read once per step, recent tokens in paged records, folds once in a while.

From a checkpoint ``S_c`` and the records ``(k_j, u_j, g_j)`` of the tokens since, with ``A_{j->t}`` the product of the
decays after token j up to token t (paper §3.2; DESIGN §2)::

    u_t = beta_t (v_t - (A_{c->t} S_c)^T k_t - sum_j ((k_j * A_{j->t}) . k_t) u_j)
    o_t = (A_{c->t} S_c)^T q_t + sum_j ((k_j * A_{j->t}) . q_t) u_j            (j up to and including t)
    fold: S_t = A_{c->t} S_c + sum_j (k_j * A_{j->t}) u_j^T

A step appends one record per request and writes no state; a step that is told to fold first rewrites the state in the
same pass that reads it. Records keep u and k in float32 and g per token (not prefix sums), so that folding what was
stored is as exact as the recurrence. With a buffer of one token the compiled kernels return the recurrence's results
bit for bit.
"""

from __future__ import annotations

from ctypes import CDLL, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvbuffer.ops import dispatch
from kvbuffer.ops.reference import log_decay
from kvbuffer.ops.rule import GATED_DELTANET, Decay, UpdateRule


class RecordPages(NamedTuple):
    """The pool of record pages of one layer.

    Attributes:
        keys: [num_pages, HK, page_size, K] float32.
        values: [num_pages, HV, page_size, V] float32: written values u.
        decays: [num_pages, HV, page_size, D] float32 log-decays; D is K for vector decays, otherwise 1.
    """

    keys: Tensor
    values: Tensor
    decays: Tensor

    @classmethod
    def allocate(
        cls,
        rule: UpdateRule,
        num_pages: int,
        page_size: int,
        key_heads: int,
        value_heads: int,
        k: int,
        v: int,
    ) -> RecordPages:
        """Return an uninitialised pool for a family's records."""
        width = k if rule.decay is Decay.VECTOR else 1
        return cls(
            torch.empty(num_pages, key_heads, page_size, k),
            torch.empty(num_pages, value_heads, page_size, v),
            torch.empty(num_pages, value_heads, page_size, width),
        )


@cache
def _bind(lib: CDLL) -> CDLL:
    pages: list[Any] = [*[c_void_p] * 4, c_int64]
    inputs: list[Any] = [*[c_void_p, c_int64] * 3, c_void_p, c_void_p]
    lib.kvb_buffered_decode.argtypes = [*inputs, *[c_void_p] * 2, *pages, *[c_void_p] * 3, *[c_int64] * 7]
    lib.kvb_fold.argtypes = [c_void_p, c_void_p, *pages, c_void_p, *[c_int64] * 7]
    lib.kvb_recurrent_decode.argtypes = [*inputs, *[c_void_p] * 3, *[c_int64] * 6]
    return lib


def _kernels(rule: UpdateRule, value_dim: int) -> CDLL | None:
    """Return the compiled kernels when they cover this family and shape."""
    lib = dispatch.cpu_kernels()
    if lib is None or rule != GATED_DELTANET or value_dim % lib.kvb_vector_width():
        return None
    return _bind(lib)


def buffered_decode(
    rule: UpdateRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    slots: Tensor,
    records: RecordPages,
    page_table: Tensor,
    fill: Tensor,
    fold: Tensor,
) -> Tensor:
    """Decode one token per request, appending its record; requests may be at different fills.

    Args:
        rule: the family.
        q: [B, HK, K] float32 with the softmax scale folded in; rows of q, k and v may be strided.
        k: [B, HK, K] float32.
        v: [B, HV, V] float32.
        g: log-decays, [B, HV], [B, HV, K] or None, as the rule says.
        beta: [B, HV] or None, as the rule says.
        states: [num_slots, HV, K, V] float32 or bfloat16.
        slots: [B] int32, all different.
        records: the layer's pages; each request's next record is written.
        page_table: [B, P] int32, the pages of each request's buffer.
        fill: [B] int32, records in the buffer before this step.
        fold: [B] uint8, 1 to fold those records into the state first: the new record then becomes the first one.

    Returns:
        [B, HV, V] float32.
    """
    lib = _kernels(rule, v.shape[-1])
    if lib is None:
        return _decode_portable(rule, q, k, v, g, beta, states, slots, records, page_table, fill, fold)
    out = torch.empty(v.shape)
    lib.kvb_buffered_decode(
        *_input_arguments(q, k, v, g, beta), states.data_ptr(), slots.data_ptr(),
        *_page_arguments(records, page_table), fill.data_ptr(), fold.data_ptr(), out.data_ptr(),
        v.shape[0], k.shape[1], v.shape[1], k.shape[2], v.shape[2], records.keys.shape[2],
        dispatch.DTYPE_CODES[states.dtype],
    )  # fmt: skip
    return out


def fold_records(
    rule: UpdateRule, states: Tensor, slots: Tensor, records: RecordPages, page_table: Tensor, fill: Tensor
) -> None:
    """Fold each request's records into its state; the buffer is empty afterwards (its fill is the caller's to reset).

    Args:
        rule: the family.
        states: [num_slots, HV, K, V] float32 or bfloat16; the rows of ``slots`` are rewritten.
        slots: [B] int32, all different.
        records: the layer's pages.
        page_table: [B, P] int32.
        fill: [B] int32 records in the buffer; 0 leaves the state as it is.
    """
    lib = _kernels(rule, states.shape[-1])
    if lib is None:
        for b, slot in enumerate(slots.tolist()):
            states[slot] = _fold_one(states[slot], _gather(records, page_table[b], int(fill[b])))
        return
    lib.kvb_fold(
        states.data_ptr(), slots.data_ptr(), *_page_arguments(records, page_table), fill.data_ptr(),
        slots.shape[0], records.keys.shape[1], *states.shape[1:], records.keys.shape[2],
        dispatch.DTYPE_CODES[states.dtype],
    )  # fmt: skip


def recurrent_decode(
    rule: UpdateRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    slots: Tensor,
) -> Tensor:
    """Decode one token per request by reading and rewriting its state: what other systems do, the baseline.

    Arguments and result are those of :func:`buffered_decode`, without a buffer.
    """
    lib = _kernels(rule, v.shape[-1])
    if lib is None:
        return _recurrent_portable(rule, q, k, v, g, beta, states, slots)
    out = torch.empty(v.shape)
    lib.kvb_recurrent_decode(
        *_input_arguments(q, k, v, g, beta), states.data_ptr(), slots.data_ptr(),
        out.data_ptr(),
        v.shape[0], k.shape[1], v.shape[1], k.shape[2], v.shape[2], dispatch.DTYPE_CODES[states.dtype],
    )  # fmt: skip
    return out


def _input_arguments(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> tuple[int, ...]:
    assert g is not None  # the compiled kernels serve Gated DeltaNet
    assert beta is not None
    rows = (part for x in (q, k, v) for part in (x.data_ptr(), x.stride(0)))
    return *rows, g.data_ptr(), beta.data_ptr()


def _page_arguments(records: RecordPages, page_table: Tensor) -> tuple[int, ...]:
    keys, values, decays = records
    return keys.data_ptr(), values.data_ptr(), decays.data_ptr(), page_table.data_ptr(), page_table.stride(0)


def _gather(records: RecordPages, pages: Tensor, fill: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return one request's records in order: keys [n, HV, K], values [n, HV, V], log-decays [n, HV, D]."""
    index = torch.arange(fill)
    page_size = records.keys.shape[2]
    rows, offsets = pages[index // page_size].long(), index % page_size
    keys, values, decays = (pool[rows, :, offsets] for pool in records)
    return keys.repeat_interleave(values.shape[1] // keys.shape[1], 1), values, decays


def _decays_to_end(decays: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp of the sum of log-decays after each record [n, HV, D], and of all of them [HV, D]."""
    from_each = decays.flip(0).cumsum(0).flip(0)
    after_each = torch.cat([from_each[1:], torch.zeros_like(decays[:1])])
    return after_each[: len(decays)].exp(), decays.sum(0).exp()


def _fold_one(state: Tensor, gathered: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    keys, values, decays = gathered
    weights, total = _decays_to_end(decays)
    return total.unsqueeze(-1) * state.float() + torch.einsum("nhk,nhv->hkv", keys * weights, values)


def _decode_portable(
    rule: UpdateRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    slots: Tensor,
    records: RecordPages,
    page_table: Tensor,
    fill: Tensor,
    fold: Tensor,
) -> Tensor:
    out = torch.empty_like(v)
    decay = log_decay(rule, g, v)
    rep = v.shape[1] // k.shape[1]
    page_size = records.keys.shape[2]
    for b, slot in enumerate(slots.tolist()):
        n = int(fill[b])
        if fold[b]:
            states[slot] = _fold_one(states[slot], _gather(records, page_table[b], n))
            n = 0
        keys, values, decays = _gather(records, page_table[b], n)
        weights, total = _decays_to_end(torch.cat([decays, decay[b : b + 1]]))
        state = total.unsqueeze(-1) * states[slot].float()
        keys = keys * weights[:n]
        q_t, k_t = q[b].repeat_interleave(rep, 0), k[b].repeat_interleave(rep, 0)

        def read(x: Tensor, state: Tensor = state, keys: Tensor = keys, values: Tensor = values) -> Tensor:
            from_records = torch.einsum("nhk,hk,nhv->hv", keys, x, values)
            return torch.einsum("hkv,hk->hv", state, x) + from_records

        u = v[b]
        if rule.delta:
            assert beta is not None
            u = beta[b].unsqueeze(-1) * (u - read(k_t))
        out[b] = read(q_t) + (k_t * q_t).sum(-1, keepdim=True) * u
        row, offset = page_table[b, n // page_size], n % page_size
        records.keys[row, :, offset] = k[b]
        records.values[row, :, offset] = u
        records.decays[row, :, offset] = decay[b]
    return out


def _recurrent_portable(
    rule: UpdateRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    states: Tensor,
    slots: Tensor,
) -> Tensor:
    rep = v.shape[1] // k.shape[1]
    q, k = q.repeat_interleave(rep, 1), k.repeat_interleave(rep, 1)
    rows = slots.long()
    state = log_decay(rule, g, v).exp().unsqueeze(-1) * states[rows].float()
    u = v
    if rule.delta:
        assert beta is not None
        u = beta.unsqueeze(-1) * (v - torch.einsum("bhkv,bhk->bhv", state, k))
    states[rows] = (state + k.unsqueeze(-1) * u.unsqueeze(-2)).to(states.dtype)
    return torch.einsum("bhkv,bhk->bhv", state, q) + (k * q).sum(-1, keepdim=True) * u
