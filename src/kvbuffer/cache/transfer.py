"""Moves blocks over all layers at once: from one number to another, out of the pools into bytes, and back.

Bytes are copied as they are, whatever the dtype, so what comes back is what went out, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvbuffer.cache.pools import POOL_KINDS, PoolKind, blocks_of
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.cache.store import AttentionCache, LinearCache

Caches = Sequence[LinearCache | AttentionCache]


def block_tensors(caches: Caches, kind: PoolKind) -> list[Tensor]:
    """Return the tensors of all layers whose first dim counts blocks of ``kind``, in a fixed order."""
    return [tensor for cache in caches for tensor in _tensors(cache, kind) if tensor is not None]


def _tensors(cache: LinearCache | AttentionCache, kind: PoolKind) -> tuple[Tensor | None, ...]:
    if isinstance(cache, AttentionCache):
        return (cache.pages,) if kind == "attention_pages" else ()
    of_kind: dict[PoolKind, tuple[Tensor | None, ...]] = {
        "slots": cache.states,
        "rings": (cache.rings,),
        "record_pages": cache.records,
    }
    return of_kind.get(kind, ())


def copy_blocks(caches: Caches, kind: PoolKind, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Copy blocks ``sources`` of one kind to ``targets``, in every layer.

    All are read before any is written, so a block may be both.

    Raises:
        RuntimeError: not as many targets as sources.
    """
    if len(sources) != len(targets):
        raise RuntimeError(f"{len(sources)} blocks cannot be copied to {len(targets)}")
    for tensor in block_tensors(caches, kind):
        rows = _bytes(tensor).numpy()
        rows[list(targets)] = rows[list(sources)]


def extract(caches: Caches, attention_pages: Sequence[int], snapshot: Snapshot) -> Tensor:
    """Return a copy of a prefix's blocks.

    Args:
        caches: memory of every layer, on the CPU.
        attention_pages: the prefix's attention pages, in order.
        snapshot: its blocks of linear-attention memory.

    Returns:
        [bytes] uint8, for :func:`restore`.
    """
    parts = list(_parts(caches, attention_pages, snapshot))
    data = torch.empty(sum(len(blocks) * rows.shape[1] for rows, blocks in parts), dtype=torch.uint8)
    for (rows, blocks), target in zip(parts, _split(data, parts), strict=True):
        torch.index_select(rows, 0, torch.tensor(blocks, dtype=torch.int64), out=target)
    return data


def restore(caches: Caches, attention_pages: Sequence[int], snapshot: Snapshot, data: Tensor) -> None:
    """Write what :func:`extract` returned into other blocks, of the same kinds and numbers.

    Args:
        caches: memory of every layer, on the CPU.
        attention_pages: pages to write, as many as were extracted.
        snapshot: blocks to write: with a slot if there was one, with as many record pages as there were.
        data: [bytes] uint8; may be read-only memory.

    Raises:
        RuntimeError: the data is not of so many blocks; nothing is written.
    """
    parts = list(_parts(caches, attention_pages, snapshot))
    size = sum(len(blocks) * rows.shape[1] for rows, blocks in parts)
    if data.numel() != size:
        raise RuntimeError(f"{data.numel()} bytes cannot be restored into blocks of {size}")
    for (rows, blocks), source in zip(parts, _split(data, parts), strict=True):
        # index_copy_ would go byte by byte; NumPy copies whole rows.
        rows.numpy()[list(blocks)] = source.numpy()


def block_layout(caches: Caches) -> str:
    """Return what the bytes of a block mean: dtypes and shapes of all kinds and layers, however many blocks there are.

    Data that was extracted under one layout can be restored only under the same.
    """
    return "; ".join(
        f"{kind} {tensor.dtype} {list(tensor.shape[1:])}"
        for cache in caches
        for kind in POOL_KINDS
        for tensor in block_tensors([cache], kind)
    )


def _parts(
    caches: Caches, attention_pages: Sequence[int], snapshot: Snapshot
) -> Iterator[tuple[Tensor, Sequence[int]]]:
    """Yield the rows of bytes behind each tensor, and which of them belong to the prefix."""
    for kind, blocks in zip(POOL_KINDS, blocks_of(snapshot, tuple(attention_pages)), strict=True):
        for tensor in block_tensors(caches, kind):
            yield _bytes(tensor), blocks


def _split(data: Tensor, parts: list[tuple[Tensor, Sequence[int]]]) -> Iterator[Tensor]:
    sizes = [len(blocks) * rows.shape[1] for rows, blocks in parts]
    for piece, (rows, blocks) in zip(data.split(sizes), parts, strict=True):
        yield piece.view(len(blocks), rows.shape[1])


def _bytes(tensor: Tensor) -> Tensor:
    """View a pool as [num_blocks, bytes of a block] uint8."""
    return tensor.view(torch.uint8).view(len(tensor), math.prod(tensor.shape[1:]) * tensor.itemsize)
