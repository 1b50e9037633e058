"""Another model, or the same model with another layout, has another fingerprint."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch

from kvbuffer.cache.disk import fingerprint
from kvbuffer.cache.store import allocate
from kvbuffer.cache.transfer import Caches
from kvbuffer.models.weights import DEMO_MODEL_DIR
from tests.support.plans import plan_for, shape


def caches(slots: int = 2, **options: torch.dtype) -> Caches:
    plan = dataclasses.replace(plan_for(shape(), max_model_len=128, **options), num_slots=slots, num_attention_pages=8)
    return allocate(shape(), plan)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL_DIR, tmp_path / "model"))


def test_it_is_the_same_for_the_same_model_with_more_memory(model: Path) -> None:
    assert fingerprint(model, caches(slots=2)) == fingerprint(model, caches(slots=3))


def test_it_depends_on_the_dtypes_of_the_blocks(model: Path) -> None:
    plain = fingerprint(model, caches())
    assert fingerprint(model, caches(dtype=torch.bfloat16)) != plain
    assert fingerprint(model, caches(state_dtype=torch.bfloat16)) != plain


def test_it_depends_on_the_configuration(model: Path) -> None:
    before = fingerprint(model, caches())
    config = model / "config.json"
    config.write_text(config.read_text().replace("\n", "\n ", 1))
    assert fingerprint(model, caches()) != before


def test_weights_of_the_same_size_and_time_but_other_values_are_told_apart(model: Path) -> None:
    before = fingerprint(model, caches())
    weights = next(model.glob("*.safetensors"))
    times = weights.stat()
    content = bytearray(weights.read_bytes())
    content[1 << 18 :] = bytes(byte ^ 1 for byte in content[1 << 18 :])
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(model, caches()) != before


def test_weights_written_anew_are_taken_for_others(model: Path) -> None:
    before = fingerprint(model, caches())
    os.utime(next(model.glob("*.safetensors")), ns=(0, 0))
    assert fingerprint(model, caches()) != before
