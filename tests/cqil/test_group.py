"""Layers fused into a group compute what the equations say, layer by layer, for every size, bypass and kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvbuffer.cache.shapes import run_order
from kvbuffer.cache.store import allocate
from kvbuffer.cqil.reference import naive_group
from kvbuffer.cqil.text import batch_of, memory_for
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from tests.support.checkpoints import VOCAB_SIZE

REQUESTS, PROMPT, STEPS = 3, 70, 3

Groups = tuple[tuple[int, ...], ...]


def decoder(folder: Path, dtype: torch.dtype = torch.float32, groups: Groups = (), bypass: int = 0) -> Decoder:
    config = ModelConfig.from_folder(folder)
    return Decoder(folder, config, dtype, 128, show_progress=False, groups=groups, bypass=bypass)


def batches(model: Decoder, seed: int = 0):  # type: ignore[no-untyped-def]
    """A prompt of each request in chunks, then tokens one by one."""
    plan = memory_for(model, REQUESTS, 128)
    rng = torch.Generator().manual_seed(seed)
    yield batch_of(torch.randint(3, VOCAB_SIZE, (REQUESTS, PROMPT), generator=rng), 0, plan)
    for step in range(STEPS):
        yield batch_of(torch.randint(3, VOCAB_SIZE, (REQUESTS, 1), generator=rng), PROMPT + step, plan)


def poisoned(model: Decoder, groups: Groups = ()) -> list:  # type: ignore[type-arg]
    shape = dataclasses.replace(model.config.cache_shape, groups=groups)
    caches = allocate(shape, memory_for(model, REQUESTS, 128))
    for cache in caches:
        for tensor in cache:
            for part in [tensor] if isinstance(tensor, Tensor) else [t for t in tensor if t is not None]:
                part.fill_(float("nan"))
    return caches


def fused(model: Decoder, groups: Groups) -> Tensor:
    caches = poisoned(model, groups)
    return torch.cat([model.forward(inputs, caches) for inputs in batches(model)])


@torch.inference_mode()
def naive(model: Decoder, groups: Groups, bypass: int) -> Tensor:
    caches, logits = poisoned(model), []
    for inputs in batches(model):
        x, residual = None, torch.nn.functional.embedding(inputs.token_ids, model.embedding).float()
        for unit in run_order(model.config.num_layers, groups):
            layers, own = [model.layers[i] for i in unit], [caches[i] for i in unit]
            if len(unit) == 1:
                x = layers[0].forward(x, residual, inputs, own[0])
            else:
                x = naive_group(layers, bypass, x, residual, inputs, own)
        logits.append(model.lm_head.of_add_rms_norm(x, residual, model.norm, model.config.rms_norm_eps))
    return torch.cat(logits)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(params=["dense", "sparse"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("groups", "bypasses"),
    [
        (((0, 1), (2, 3), (4, 5), (6, 7)), (0, 1)),
        (((1, 2, 3), (4, 5, 6)), (0, 1, 2)),
        (((0, 1, 2, 3), (4, 5, 6, 7)), (0, 1, 2, 3)),
        (((0, 2), (1, 3), (5, 7)), (1,)),
    ],
    ids=["pairs", "threes", "fours", "across others"],
)
def test_fused_equals_one_by_one(folder: Path, groups: Groups, bypasses: tuple[int, ...]) -> None:
    alone = decoder(folder)
    for bypass in bypasses:
        expected = naive(alone, groups, bypass)
        assert error(fused(decoder(folder, groups=groups, bypass=bypass), groups), expected) < 1e-4


def test_portable(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbuffer.ops import dispatch

    groups = ((0, 1, 2), (4, 5), (6, 7))
    expected = naive(decoder(sparse), groups, 1)
    monkeypatch.setattr(dispatch, "cpu_kernels", lambda: None)
    assert error(fused(decoder(sparse, groups=groups, bypass=1), groups), expected) < 1e-4


def test_bypass_and_grouping_matter(dense: Path) -> None:
    """What the other tests compare would differ visibly if the one or the other were ignored."""
    alone, groups = decoder(dense), ((0, 1, 2, 3),)
    results = [naive(alone, (), 0), *(naive(alone, groups, bypass) for bypass in range(4))]
    for i, left in enumerate(results):
        for right in results[:i]:
            assert error(left, right) > 1e-2


def test_groups_of_one_change_no_bit(folder: Path) -> None:
    groups = tuple((index,) for index in range(8))
    assert torch.equal(fused(decoder(folder, groups=groups, bypass=3), groups), fused(decoder(folder), ()))


def test_bfloat16_weights_lose_little_more_by_folding_norms(dense: Path) -> None:
    groups = ((1, 2, 3), (4, 5))
    exact = naive(decoder(dense), groups, 1)
    one_by_one = error(naive(decoder(dense, torch.bfloat16), groups, 1), exact)
    assert error(fused(decoder(dense, torch.bfloat16, groups, 1), groups), exact) < 1.5 * one_by_one
