"""The operators on a KV buffer: decode, verify, fold, compact; and the plain recurrent decode they are compared with.

From a checkpoint ``S_c`` and the records ``(k_j, u_j, g_j)`` of the tokens since, with ``A_{j->t}`` the product of the
decays after token j up to token t (paper §3.2; one pair per token and the delta rule shown)::

    u_t = beta_t (v_t - (A_{c->t} S_c)^T k_t - sum_j ((k_j * A_{j->t}) . k_t) u_j)
    o_t = (A_{c->t} S_c)^T q_t + sum_j ((k_j * A_{j->t}) . q_t) u_j            (j up to and including t)
    fold: S_t = A_{c->t} S_c + sum_j (k_j * A_{j->t}) u_j^T

A token appends one record and writes no state; a decode step that is told to fold first rewrites the state in the same
pass that reads it. Records keep g per token, not prefix sums, and by default k and u in float32, so that folding what
was stored is as exact as the recurrence. A request without a state (slot -1) lives on its records alone: the paper's
"KV only", §3.4.

One contract for every family and backend; :mod:`kvbuffer.ops.dispatch` chooses the backend. A request's results do not
depend on the other requests of a call. Arguments of a wrong shape, dtype or layout raise ValueError or TypeError; the
values of slots, pages, fills and borders are trusted, as in any kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbuffer.ops.dispatch import backend_for
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.library import custom_operator
from kvbuffer.ops.rule import UpdateRule
from kvbuffer.ops.validation import check_length, check_operands, check_page_table, check_vectors


@custom_operator(writes=("states", "records"))
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
    """Decode one token per request, appending its record; requests may be at different fills.

    Args:
        rule: the family.
        tokens: inputs of B tokens, one per request.
        states: the layer's states; written only where ``fold`` says so.
        slots: [B] int32, each request's state, all different; -1 for a request that has none (KV only).
        records: the layer's pages; each request's next record is written.
        page_table: [B, P] int32, the pages of each request's buffer.
        fill: [B] int32, records in the buffer before this step.
        fold: [B] uint8, 1 to fold those records into the state first: the new record then becomes the first one.
            0 for a request without a state.

    Returns:
        [B, HV, V] float32.
    """
    check_operands(rule, states, tokens, records)
    requests, device = tokens.v.shape[0], states.data.device
    check_vectors(requests, device, slots=slots, fill=fill, fold=fold)
    check_page_table(page_table, requests, device)
    backend = backend_for(rule, tokens, states, records)
    return backend.buffered_decode(rule, tokens, states, slots, records, page_table, fill, fold)


@custom_operator(writes=("records",))
def buffered_verify(
    rule: UpdateRule,
    tokens: Tokens,
    states: StatePool,
    slots: Tensor,
    records: RecordPages,
    page_table: Tensor,
    fill: Tensor,
    cu_seqlens: Tensor,
    parents: Tensor | None = None,
) -> Tensor:
    """Run any number of new tokens per request against state and buffer, reading each state once and writing none.

    The tokens' records are appended; accepting a prefix of a chain is then the caller's moving its fill, accepting a
    path of a tree :func:`compact_records`. With slot -1 this is also the prefill of a KV-only request.

    Args:
        rule: the family.
        tokens: inputs of N tokens, request after request.
        states: the layer's states, only read.
        slots: [B] int32; -1 for a request that has none.
        records: the layer's pages; records ``fill`` to ``fill + m - 1`` of each request are written.
        page_table: [B, P] int32, the pages of each request's buffer.
        fill: [B] int32, records in the buffer before the call.
        cu_seqlens: [B + 1] int32 borders of the requests among the tokens; a request may have none.
        parents: [N] int32, the token that each one follows, counted among its request's own new tokens and less than
            its own place; -1 follows the buffer. None is a chain.

    Returns:
        [N, HV, V] float32: what each token would see if the tokens on its path had been decoded one by one.
    """
    check_operands(rule, states, tokens, records)
    requests, device = check_length("slots", slots), states.data.device
    check_vectors(requests, device, slots=slots, fill=fill)
    check_vectors(requests + 1, device, cu_seqlens=cu_seqlens)
    check_page_table(page_table, requests, device)
    if parents is not None:
        check_vectors(tokens.v.shape[0], device, parents=parents)
    backend = backend_for(rule, tokens, states, records)
    return backend.buffered_verify(rule, tokens, states, slots, records, page_table, fill, cu_seqlens, parents)


@custom_operator(writes=("states",))
def fold_records(
    rule: UpdateRule,
    states: StatePool,
    slots: Tensor,
    records: RecordPages,
    page_table: Tensor,
    count: Tensor,
    target_slots: Tensor | None = None,
) -> None:
    """Fold the first records of each request into a state: its own, or another slot's.

    With ``target_slots`` the states of ``slots`` stay as they are: a fork that writes, the state at any buffered token
    for a prefix cache, or the first state of a KV-only request.

    Args:
        rule: the family.
        states: the layer's states; the rows of the targets are written.
        slots: [B] int32, the states to start from; -1 starts from zero. All different, unless there are targets.
        records: the layer's pages, only read.
        page_table: [B, P] int32, the pages of each request's buffer.
        count: [B] int32, how many records to fold; 0 copies the state, or leaves it as it is.
        target_slots: [B] int32, where the results go, all different and none of them another request's source; None
            for ``slots``.
    """
    target_slots = slots if target_slots is None else target_slots
    check_operands(rule, states, records=records)
    requests, device = check_length("slots", slots), states.data.device
    check_vectors(requests, device, slots=slots, count=count, target_slots=target_slots)
    check_page_table(page_table, requests, device)
    backend = backend_for(rule, None, states, records)
    backend.fold_records(rule, states, slots, records, page_table, count, target_slots)


@custom_operator(writes=("records",))
def compact_records(
    records: RecordPages, page_table: Tensor, fill: Tensor, accepted: Tensor, cu_accepted: Tensor
) -> None:
    """Keep the accepted path of a verified tree: move its records to the end of what was there before.

    Args:
        records: the layer's pages.
        page_table: [B, P] int32, the pages of each request's buffer.
        fill: [B] int32, records in the buffer before the tree; afterwards the caller adds the accepted ones.
        accepted: [A] int32, the accepted tokens, counted among their request's own, ascending.
        cu_accepted: [B + 1] int32 borders of the requests in ``accepted``.
    """
    requests, count, device = check_length("fill", fill), check_length("accepted", accepted), records.keys.device
    check_vectors(requests, device, fill=fill)
    check_vectors(requests + 1, device, cu_accepted=cu_accepted)
    check_vectors(count, device, accepted=accepted)
    check_page_table(page_table, requests, device)
    index = torch.arange(count, dtype=torch.int32, device=device)
    # The request whose borders enclose each index. Unlike repeat_interleave, this needs no look at lengths on a GPU.
    request = torch.searchsorted(cu_accepted, index, right=True) - 1
    source = fill[request] + accepted
    target = fill[request] + index - cu_accepted[request]
    size = records.page_size
    from_page, to_page = (page_table[request, place // size].long() for place in (source, target))
    for pool in records:
        pool[to_page, :, target % size] = pool[from_page, :, source % size]


@custom_operator(writes=("states",))
def recurrent_decode(rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor) -> Tensor:
    """Decode one token per request by reading and rewriting its state: what other systems do, the baseline.

    Args:
        rule: the family.
        tokens: inputs of B tokens, one per request.
        states: the layer's states; the rows of ``slots`` are rewritten.
        slots: [B] int32, all different.

    Returns:
        [B, HV, V] float32.
    """
    check_operands(rule, states, tokens)
    check_vectors(tokens.v.shape[0], states.data.device, slots=slots)
    return backend_for(rule, tokens, states).recurrent_decode(rule, tokens, states, slots)
