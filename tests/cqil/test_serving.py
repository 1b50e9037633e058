"""A plan serves through the whole engine: chunked prompts, buffers, cached prefixes, preemption, the tier on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbuffer.cache.disk.identity import checkpoint_id
from kvbuffer.cqil.plan import CqilPlan
from kvbuffer.cqil.text import TextModel
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.errors import ConfigError
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.plans import drain, poison_free, sized_engine

GROUPS, BYPASS, NEW_TOKENS = ((1, 2, 3), (5, 7)), 1, 12


def plan_file(folder: Path, path: Path, groups: tuple[tuple[int, ...], ...] = GROUPS) -> Path:
    CqilPlan(checkpoint_id(folder), groups, BYPASS).save(path)
    return path


def serve(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    poison_free(engine)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True))
    tokens = drain(engine).tokens
    return [tokens[str(number)] for number in range(len(prompts))]


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=rng).tolist() for length in lengths]


SPECULATION = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "adaptive": False}


@pytest.mark.parametrize(
    "options",
    [{}, {"slots": 2}, {"speculative_config": SPECULATION}],
    ids=["room", "preemption", "speculation"],
)
def test_the_engine_writes_what_the_equations_say(dense: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """At every position the naive loop over the whole text finds the engine's token likeliest, but for ties."""
    path = plan_file(dense, tmp_path / "plan.json")
    engine = sized_engine(dense, max_model_len=192, tokens=64, cqil=path, **options)
    prompts = prompts_of((1, 7, 30, 65, 150))
    outputs = serve(engine, prompts)
    model = Decoder(dense, ModelConfig.from_folder(dense), torch.float32, 192, show_progress=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        text = TextModel(model, torch.tensor([prompt + output[:-1]]))
        logits = model.lm_head(text.hidden(GROUPS, BYPASS)[len(prompt) - 1 :])
        best = logits.max(-1).values
        assert torch.all(best - logits[range(NEW_TOKENS), output] <= 1e-4 * best.abs())
    # Each prompt again, as far as it is still cached from there.
    assert serve(engine, prompts) == outputs


def test_groups_of_one_are_no_plan(dense: Path, tmp_path: Path) -> None:
    ones = tuple((index,) for index in range(8))
    prompts = prompts_of((5, 40, 100))
    engines = [
        sized_engine(dense, max_model_len=192, cqil=path) for path in (None, plan_file(dense, tmp_path / "p", ones))
    ]
    captured: list[list[Tensor]] = [[], []]
    for engine, seen in zip(engines, captured, strict=True):
        forward = engine._model.forward
        engine._model.forward = lambda *args, f=forward, s=seen: s.append(f(*args)) or s[-1]  # type: ignore[method-assign]
    assert serve(engines[0], prompts) == serve(engines[1], prompts)
    assert all(map(torch.equal, *captured))
    assert len(captured[0]) == len(captured[1]) > NEW_TOKENS


def test_a_plan_of_another_model_is_refused(dense: Path, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another checkpoint"):
        sized_engine(dense, cqil=plan_file(sparse, tmp_path / "plan.json"))


def test_the_tier_on_disk_keeps_plans_apart(dense: Path, tmp_path: Path) -> None:
    """What was computed under one plan does not serve another, though memory has the same layout."""
    prompt, cached = prompts_of((90,)), []
    for groups, bypass in ((GROUPS, 1), (GROUPS, 0), (GROUPS, 1)):
        path = tmp_path / "plan.json"
        CqilPlan(checkpoint_id(dense), groups, bypass).save(path)
        engine = sized_engine(dense, max_model_len=192, cqil=path, cache_dir=tmp_path / "cache")
        engine.add_request("a", prompt[0], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
        cached.append(drain(engine).last["a"].num_cached_tokens)
        engine.close()
    assert cached[:2] == [0, 0]
    assert cached[2] > 0
