"""What memory has no room for comes back from disk, also after a restart, and nothing in the output tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvbuffer import SamplingParams
from kvbuffer.engine.engine import Engine
from kvbuffer.errors import ConfigError
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.plans import drain, sized_engine


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(engine: Engine, text: list[int], max_tokens: int = 12) -> tuple[list[int], int]:
    """Return the output, and how many tokens of the prompt did not have to be computed."""
    engine.add_request("r", text, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    last = drain(engine)
    return last.tokens["r"], last.last["r"].num_cached_tokens


@pytest.fixture
def cold(tiny: Path) -> Engine:
    return sized_engine(tiny, enable_prefix_caching=False)


@pytest.mark.parametrize("length", [5, 24, 25, 48, 63, 64, 65, 100])
def test_an_evicted_prefix_is_loaded(tiny: Path, cold: Engine, tmp_path: Path, length: int) -> None:
    engine = sized_engine(tiny, slots=2, pages=8, cache_dir=tmp_path)
    engine._offload.tier.cheaper_to_load = lambda *_: True  # type: ignore[union-attr,method-assign]
    text = prompt(0, length)
    first, _ = generate(engine, text)
    generate(engine, prompt(1, 100))  # takes all the memory
    engine._offload.tier.flush()  # type: ignore[union-attr]
    again, cached = generate(engine, text)
    assert first == again == generate(cold, text)[0]
    assert cached == length - 1
    assert engine.stats.disk is not None
    assert engine.stats.disk.loaded >= 1
    engine.close()


def test_a_conversation_goes_on_after_a_restart(tiny: Path, cold: Engine, tmp_path: Path) -> None:
    text = prompt(2, 70)
    engine = sized_engine(tiny, cache_dir=tmp_path)
    reply, _ = generate(engine, text)
    engine.close()
    engine = sized_engine(tiny, cache_dir=tmp_path)
    text += reply + prompt(3, 9)
    again, cached = generate(engine, text)
    assert cached == 70 + len(reply) - 1  # the last token of the reply was never computed
    assert again == generate(cold, text)[0]
    engine.close()


def test_a_prefix_that_is_slower_to_load_is_computed(tiny: Path, tmp_path: Path) -> None:
    engine = sized_engine(tiny, slots=2, pages=8, cache_dir=tmp_path)
    engine._offload.tier.cheaper_to_load = lambda *_: False  # type: ignore[union-attr,method-assign]
    generate(engine, prompt(0, 60))
    generate(engine, prompt(1, 100))
    assert generate(engine, prompt(0, 60))[1] == 0
    engine.close()


def test_a_folder_in_use_is_refused(tiny: Path, tmp_path: Path) -> None:
    engine = sized_engine(tiny, cache_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"--cache-dir: .* is in use by another process"):
        sized_engine(tiny, cache_dir=tmp_path)
    engine.close()


def test_without_prefix_caching_a_folder_makes_no_sense(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave prefix caching enabled, or leave cache_dir out"):
        sized_engine(tiny, cache_dir=tmp_path, enable_prefix_caching=False)
