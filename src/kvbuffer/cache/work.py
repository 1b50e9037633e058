"""Does the copies and folds that :class:`~kvbuffer.cache.memory.RequestMemory` has noted, over all layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from kvbuffer.cache.memory import Copy, Fold
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.cache.transfer import copy_blocks
from kvbuffer.ops.buffered import fold_records
from kvbuffer.ops.rule import GATED_DELTANET


def do_work(work: Iterable[Copy | Fold], caches: Sequence[LinearCache | AttentionCache]) -> None:
    """Do work in its order: a block may be freed, and taken again, between two pieces of it."""
    for batch in _batches(work):
        copies = [piece for piece in batch if isinstance(piece, Copy)]
        folds = [piece for piece in batch if isinstance(piece, Fold)]
        if copies:
            sources, targets = zip(*((piece.source, piece.target) for piece in copies), strict=True)
            copy_blocks(caches, copies[0].kind, sources, targets)
        else:
            _fold(folds, caches)


def _batches(work: Iterable[Copy | Fold]) -> Iterator[list[Copy | Fold]]:
    """Group neighbours that can be done at once: of one kind, none writing what another one reads or writes."""
    batch: list[Copy | Fold] = []
    batch_kind, read, written = "", set[int](), set[int]()
    for piece in work:
        kind, source = (piece.kind, piece.source) if isinstance(piece, Copy) else ("fold", piece.slot)
        if batch and (kind != batch_kind or piece.target in read | written or source in written):
            yield batch
            batch, read, written = [], set(), set()
        batch.append(piece)
        batch_kind = kind
        read.add(source)
        written.add(piece.target)
    if batch:
        yield batch


def _fold(folds: Sequence[Fold], caches: Sequence[LinearCache | AttentionCache]) -> None:
    width = max(1, *(len(fold.pages) for fold in folds))
    slots, targets, count = (
        torch.tensor(values, dtype=torch.int32)
        for values in zip(*((fold.slot, fold.target, fold.num_records) for fold in folds), strict=True)
    )
    pages = torch.tensor([[*fold.pages, *[0] * (width - len(fold.pages))] for fold in folds], dtype=torch.int32)
    for cache in caches:
        if isinstance(cache, LinearCache):
            fold_records(GATED_DELTANET, cache.states, slots, cache.records, pages, count, targets)
