"""Blocks move bit for bit, over all layers, and nothing else changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kvbuffer.cache.pools import POOL_KINDS, PoolKind
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.cache.store import allocate
from kvbuffer.cache.transfer import Caches, block_layout, block_tensors, copy_blocks, extract, restore
from tests.support.plans import plan_for, shape

STATES = [torch.float32, torch.bfloat16, torch.int8]
#: Pools of different sizes, so that a block number of the wrong kind does not go unnoticed.
SIZES = {"num_slots": 5, "num_record_pages": 13, "num_rings": 6, "num_attention_pages": 9}


def caches_of(
    rng: torch.Generator,
    linear: int = 2,
    attention: int = 2,
    state: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> Caches:
    """Pools of random bytes: every pattern of bits is data, NaNs with payloads among them."""
    plan = plan_for(shape(linear, attention), max_model_len=128, buffer_len=40, state_dtype=state, dtype=dtype)
    caches = allocate(shape(linear, attention), dataclasses.replace(plan, **SIZES))
    for tensor in tensors_of(caches):
        content = torch.randint(256, (tensor.nbytes,), dtype=torch.uint8, generator=rng)
        tensor.view(torch.uint8).flatten().copy_(content)
    return caches


def tensors_of(caches: Caches) -> list[Tensor]:
    return [tensor for kind in POOL_KINDS for tensor in block_tensors(caches, kind)]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.contiguous().view(torch.uint8).clone() for tensor in tensors]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def test_every_tensor_belongs_to_one_kind(rng: torch.Generator) -> None:
    caches = caches_of(rng, linear=2, attention=3, state=torch.int8)
    counts = {kind: len(block_tensors(caches, kind)) for kind in POOL_KINDS}
    assert counts == {
        "attention_pages": 3,
        "slots": 2 * 2,  # with their scales
        "rings": 2,
        "record_pages": 2 * 3,
    }
    assert len({tensor.data_ptr() for tensor in tensors_of(caches)}) == sum(counts.values())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", POOL_KINDS)
def test_copying_changes_the_targets_and_nothing_else(rng: torch.Generator, kind: PoolKind, state: torch.dtype) -> None:
    caches = caches_of(rng, state=state, dtype=torch.bfloat16)
    expected = bits(tensors_of(caches))
    for tensor, before in zip(tensors_of(caches), expected, strict=True):
        if any(tensor is mine for mine in block_tensors(caches, kind)):
            before[[4, 1]] = before[[0, 2]]
    copy_blocks(caches, kind, [0, 2], [4, 1])
    assert same(bits(tensors_of(caches)), expected)


def test_blocks_may_be_source_and_target_at_once(rng: torch.Generator) -> None:
    caches = caches_of(rng)
    pages = block_tensors(caches, "attention_pages")
    expected = bits([page[[2, 1, 0]] for page in pages])
    copy_blocks(caches, "attention_pages", [0, 1, 2], [2, 1, 0])
    assert same(bits([page[:3] for page in pages]), expected)


def test_copying_nothing_changes_nothing(rng: torch.Generator) -> None:
    caches = caches_of(rng)
    before = bits(tensors_of(caches))
    copy_blocks(caches, "record_pages", [], [])
    assert same(bits(tensors_of(caches)), before)


def test_every_source_needs_a_target(rng: torch.Generator) -> None:
    with pytest.raises(RuntimeError, match="2 blocks cannot be copied to 1"):
        copy_blocks(caches_of(rng), "rings", [0, 1], [2])


@pytest.mark.parametrize("slot", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", STATES)
def test_what_is_extracted_is_restored_into_other_blocks(
    rng: torch.Generator, state: torch.dtype, dtype: torch.dtype, slot: int | None
) -> None:
    caches = caches_of(rng, state=state, dtype=dtype)
    taken = Snapshot(start=40, end=70, checkpoint=40 * (slot is not None), slot=slot, record_pages=(7, 2), ring=1)
    other = taken._replace(slot=slot and 0, record_pages=(5, 11), ring=4)
    data = extract(caches, [8, 3, 0], taken)

    expected = bits(tensors_of(caches))
    moves = {
        "attention_pages": ([8, 3, 0], [1, 2, 3]),
        "slots": ([], []) if slot is None else ([3], [0]),
        "rings": ([1], [4]),
        "record_pages": ([7, 2], [5, 11]),
    }
    kinds = [kind for kind in POOL_KINDS for _ in block_tensors(caches, kind)]
    for kind, before in zip(kinds, expected, strict=True):
        sources, targets = moves[kind]
        before[targets] = before[sources].clone()
    restore(caches, [1, 2, 3], other, data)
    assert same(bits(tensors_of(caches)), expected)


def test_extracted_data_is_a_copy(rng: torch.Generator) -> None:
    caches = caches_of(rng)
    snapshot = Snapshot(0, 20, 0, None, (0, 1), 0)
    data = extract(caches, [0, 1], snapshot)
    before = data.clone()
    for tensor in tensors_of(caches):
        tensor.zero_()
    assert torch.equal(data, before)


@pytest.mark.parametrize(("linear", "attention"), [(2, 0), (0, 2)])
def test_models_of_one_kind_of_layer_have_prefixes_too(rng: torch.Generator, linear: int, attention: int) -> None:
    caches = caches_of(rng, linear, attention)
    source, target = Snapshot(3, 9, 3, 0, (0,), 0), Snapshot(3, 9, 3, 1, (1,), 1)
    restore(caches, [1], target, extract(caches, [0], source))
    assert all(torch.equal(*bits([tensor[0], tensor[1]])) for tensor in tensors_of(caches))
    assert len(tensors_of(caches)) > 0


def test_data_of_other_blocks_is_refused_and_nothing_is_written(rng: torch.Generator) -> None:
    caches = caches_of(rng)
    snapshot = Snapshot(0, 20, 0, None, (0, 1), 0)
    data = extract(caches, [0, 1], snapshot)
    before = bits(tensors_of(caches))
    for pages, blocks in (([2], snapshot), ([2, 3], snapshot._replace(slot=1))):
        with pytest.raises(RuntimeError, match="cannot be restored into blocks of"):
            restore(caches, pages, blocks, data)
    assert same(bits(tensors_of(caches)), before)


def test_the_layout_tells_apart_whatever_changes_the_meaning_of_bytes(rng: torch.Generator) -> None:
    layouts = [
        block_layout(caches_of(rng)),
        block_layout(caches_of(rng, linear=3)),
        block_layout(caches_of(rng, attention=1)),
        block_layout(caches_of(rng, dtype=torch.bfloat16)),
        block_layout(caches_of(rng, state=torch.bfloat16)),
        block_layout(caches_of(rng, state=torch.int8)),
        block_layout(list(reversed(caches_of(rng)))),
    ]
    assert len(set(layouts)) == len(layouts)


def test_the_layout_does_not_depend_on_how_much_memory_there_is(rng: torch.Generator) -> None:
    plan = plan_for(shape(), max_model_len=128)
    few, many = (
        block_layout(allocate(shape(), dataclasses.replace(plan, num_slots=n, num_attention_pages=n))) for n in (1, 7)
    )
    assert few == many
