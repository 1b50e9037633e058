"""Copies, folds and moves: noted while a step is scheduled, and done over all layers before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kvbuffer.cache.pools import PoolKind
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.cache.transfer import copy_blocks
from kvbuffer.ops.attention import PAGE_SIZE, compact_pages
from kvbuffer.ops.buffered import compact_records, fold_records
from kvbuffer.ops.conv import compact_rings
from kvbuffer.ops.rule import GATED_DELTANET


class Copy(NamedTuple):
    """Copy a block, in every layer that has blocks of its kind."""

    kind: PoolKind
    source: int
    target: int


class Fold(NamedTuple):
    """Fold records into the state of a slot (-1: zero), leaving the result in ``target``."""

    slot: int
    target: int
    pages: tuple[int, ...]
    num_records: int


class Compact(NamedTuple):
    """Move what is kept of the accepted tokens of a tree to where that of a chain lies.

    Attributes:
        fill: records before the tree, those of full pages left out.
        record_pages: from the one in which the tree begins.
        num_tokens: tokens before the tree.
        attention_pages: from the one in which the tree begins.
        ring: the ring.
        accepted: which of its tokens were accepted, ascending.
    """

    fill: int
    record_pages: tuple[int, ...]
    num_tokens: int
    attention_pages: tuple[int, ...]
    ring: int
    accepted: tuple[int, ...]


Work = Copy | Fold | Compact


def do_work(work: Iterable[Work], caches: Sequence[LinearCache | AttentionCache]) -> None:
    """Do work in its order: a block may be freed, and taken again, between two pieces of it."""
    for batch in _batches(work):
        copies = [piece for piece in batch if isinstance(piece, Copy)]
        folds = [piece for piece in batch if isinstance(piece, Fold)]
        trees = [piece for piece in batch if isinstance(piece, Compact)]
        if copies:
            sources, targets = zip(*((piece.source, piece.target) for piece in copies), strict=True)
            copy_blocks(caches, copies[0].kind, sources, targets)
        elif folds:
            _fold(folds, caches)
        else:
            _compact(trees, caches)


def _batches(work: Iterable[Work]) -> Iterator[list[Work]]:
    """Group neighbours that can be done at once: of one kind, none writing what another one reads or writes."""
    batch: list[Work] = []
    batch_kind, read, written = "", set[int](), set[int]()
    for piece in work:
        kind, source, target = _reach(piece)
        if batch and (kind != batch_kind or target in read | written or source in written):
            yield batch
            batch, read, written = [], set(), set()
        batch.append(piece)
        batch_kind = kind
        read.add(source)
        written.add(target)
    if batch:
        yield batch


def _reach(piece: Work) -> tuple[str, int, int]:
    """Return the kind of a piece of work, what it reads and what it writes."""
    if isinstance(piece, Copy):
        return piece.kind, piece.source, piece.target
    if isinstance(piece, Fold):
        return "fold", piece.slot, piece.target
    return "compact", piece.ring, piece.ring  # all else that it moves is the same request's


def _fold(folds: Sequence[Fold], caches: Sequence[LinearCache | AttentionCache]) -> None:
    slots, targets, count = (
        torch.tensor(values, dtype=torch.int32)
        for values in zip(*((fold.slot, fold.target, fold.num_records) for fold in folds), strict=True)
    )
    pages = _table([fold.pages for fold in folds])
    for cache in caches:
        if isinstance(cache, LinearCache):
            fold_records(GATED_DELTANET, cache.states, slots, cache.records, pages, count, targets)


def _compact(trees: Sequence[Compact], caches: Sequence[LinearCache | AttentionCache]) -> None:
    fill, before, rings = (
        torch.tensor(values, dtype=torch.int32)
        for values in zip(*((tree.fill, tree.num_tokens, tree.ring) for tree in trees), strict=True)
    )
    accepted = torch.tensor([place for tree in trees for place in tree.accepted], dtype=torch.int32)
    borders = torch.tensor([0, *(len(tree.accepted) for tree in trees)]).cumsum(0).int()
    records, attention = (_table([getattr(t, name) for t in trees]) for name in ("record_pages", "attention_pages"))
    for cache in caches:
        if isinstance(cache, LinearCache):
            compact_records(cache.records, records, fill, accepted, borders)
            compact_rings(cache.rings, rings, before, accepted, borders)
        else:
            compact_pages(cache.pages, attention, before % PAGE_SIZE, accepted, borders)


def _table(pages: Sequence[Sequence[int]]) -> Tensor:
    """Return lists of pages as the rows of a table, int32."""
    width = max(1, *(len(row) for row in pages))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in pages], dtype=torch.int32)
