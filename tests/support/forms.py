"""Every form of the operators driven alike: ragged sequences in, outputs out, final states left in the pool."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvbuffer.ops.buffered import buffered_verify, fold_records, recurrent_decode
from kvbuffer.ops.chunked import chunked_prefill
from kvbuffer.ops.layout import Tokens
from tests.support.operators import Pool, int32, poison, stack

#: Runs request b of a pool, from the state it has there, through sequence b; returns each one's outputs [T, HV, V].
Form = Callable[[Pool, list[Tokens]], list[Tensor]]


def recurrent(pool: Pool, sequences: list[Tokens]) -> list[Tensor]:
    """Token by token, rewriting the state."""
    outputs = _empty_outputs(sequences)
    for rows, positions, step in _steps(sequences):
        _spread(outputs, rows, positions, recurrent_decode(pool.rule, step, pool.states, pool.slots[rows]))
    return outputs


def buffered(pool: Pool, sequences: list[Tokens]) -> list[Tensor]:
    """Token by token into the buffers, at different fills, folding each when it is full."""
    outputs = _empty_outputs(sequences)
    for rows, positions, step in _steps(sequences):
        _spread(outputs, rows, positions, pool.decode(step, rows))
    pool.fold()
    return outputs


def chunked(pool: Pool, sequences: list[Tokens]) -> list[Tensor]:
    """All tokens in one call."""
    borders = _borders(sequences)
    fresh = torch.zeros(len(sequences), dtype=torch.uint8)
    out = chunked_prefill(pool.rule, stack(sequences), pool.states, pool.slots, int32(borders), fresh)
    return [out[begin:end] for begin, end in itertools.pairwise(borders)]


def verified(pool: Pool, sequences: list[Tokens]) -> list[Tensor]:
    """A few tokens at a time, ragged and at times none, folding when a buffer would overflow."""
    return _verify(pool, sequences, pool.slots)


def kv_only(pool: Pool, sequences: list[Tokens]) -> list[Tensor]:
    """As ``verified`` from the zero state, which is not there until a buffer would overflow."""
    poison(pool.states.data)
    return _verify(pool, sequences, torch.full_like(pool.slots, -1))


FORMS: dict[str, Form] = {form.__name__: form for form in (recurrent, buffered, chunked, verified, kv_only)}


def _verify(pool: Pool, sequences: list[Tokens], slots: Tensor) -> list[Tensor]:
    outputs, done = _empty_outputs(sequences), [0] * len(sequences)

    def fold() -> None:
        fold_records(pool.rule, pool.states, slots, pool.records, pool.page_table, pool.fill, pool.slots)
        pool.fill.zero_()

    for step in itertools.count():
        left = [len(x.v) - n for x, n in zip(sequences, done, strict=True)]
        if not any(left):
            break
        lengths = [min((3 * step + 2 * b + 1) % 6, pool.m, n) for b, n in enumerate(left)]
        if (pool.fill + int32(lengths)).max() > pool.m:
            fold()
            slots = pool.slots
        parts = [x.rows(slice(n, n + more)) for x, n, more in zip(sequences, done, lengths, strict=True)]
        borders = _borders(parts)
        out = buffered_verify(
            pool.rule, stack(parts), pool.states, slots, pool.records, pool.page_table, pool.fill, int32(borders)
        )
        for b, (begin, end) in enumerate(itertools.pairwise(borders)):
            outputs[b][done[b] : done[b] + lengths[b]] = out[begin:end]
            done[b] += lengths[b]
        pool.fill += int32(lengths)
    fold()
    return outputs


def _steps(sequences: list[Tokens]) -> Iterator[tuple[list[int], list[int], Tokens]]:
    """Yield each decode step's requests, their positions and their tokens; request b joins b steps late."""
    for t in range(max(len(x.v) + b for b, x in enumerate(sequences))):
        rows = [b for b, x in enumerate(sequences) if 0 <= t - b < len(x.v)]
        if rows:
            yield rows, [t - b for b in rows], stack([sequences[b].rows(slice(t - b, t - b + 1)) for b in rows])


def _spread(outputs: list[Tensor], rows: list[int], positions: list[int], out: Tensor) -> None:
    for b, t, row in zip(rows, positions, out, strict=True):
        outputs[b][t] = row


def _empty_outputs(sequences: list[Tokens]) -> list[Tensor]:
    outputs = [torch.empty_like(x.v) for x in sequences]
    poison(*outputs)
    return outputs


def _borders(sequences: list[Tokens]) -> list[int]:
    return [0, *itertools.accumulate(len(x.v) for x in sequences)]
