"""A separate model drafts what it would say itself, wherever the model has led it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import Draft
from kvbuffer.errors import CapacityError, ConfigError
from tests.engine.speculative.test_verification import MAX_LEN, PROMPTS, greedy, run
from tests.support.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.support.plans import Outputs, sized_engine

DRAFTS = 4


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another architecture with the same tokens, which says something else."""
    return make_checkpoint(tmp_path_factory.mktemp("draft"), "qwen3_next", num_hidden_layers=4)


def drafting(target: Path, draft: Path, drafts: int = DRAFTS, **options: Any) -> Engine:
    config = {
        "method": "draft_model", "model": str(draft), "num_speculative_tokens": drafts, "adaptive": False
    }  # fmt: skip
    options = {"slots": 16, "pages": 128, "max_model_len": MAX_LEN, **options}
    return sized_engine(target, speculative_config=config, **options)


class Watched:
    """Notes what an engine's drafter proposes, and checks its memory."""

    def __init__(self, engine: Engine) -> None:
        self.drafter = engine._speculator.drafter
        self.propose, self.drafter.propose = self.drafter.propose, self._propose
        self.texts: list[list[int]] = []
        self.drafts: list[list[int]] = []

    def _propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        drafts = self.propose(requests, limits)
        self.drafter.memory.check_integrity()
        for request, limit, draft in zip(requests, limits, drafts, strict=True):
            assert len(draft.token_ids) in (0, limit)
            self.texts.append(list(request.token_ids))
            self.drafts.append(draft.token_ids)
        return drafts

    def check(self, draft: Path) -> None:
        """Compare with what the draft model says by itself; nothing is left in its memory."""
        alone = sized_engine(draft, slots=40, pages=400, max_model_len=MAX_LEN + DRAFTS)
        said = run(alone, self.texts, [greedy(max(1, len(d))) for d in self.drafts]).tokens.values()
        differing = sum(a[: len(b)] != b for a, b in zip(said, self.drafts, strict=True))
        assert differing <= len(self.drafts) // 100  # near-ties
        assert self.drafter.memory.rows.num_used == 0
        self.drafter.memory.check_integrity()


@pytest.fixture(scope="module")
def expected(tiny: Path) -> Outputs:
    return run(sized_engine(tiny, max_model_len=MAX_LEN), PROMPTS, greedy())


@pytest.mark.parametrize(("buffer_len", "kv_only_len", "tokens"), [(4, 24, 128), (16, 0, 64), (1, 0, 512)])
def test_a_model_that_is_mostly_wrong(
    tiny: Path, other: Path, expected: Outputs, buffer_len: int, kv_only_len: int, tokens: int
) -> None:
    engine = drafting(tiny, other, buffer_len=buffer_len, kv_only_len=kv_only_len, tokens=tokens)
    watched = Watched(engine)
    assert run(engine, PROMPTS, greedy()).tokens == expected.tokens
    watched.check(other)
    assert all(watched.drafts)


@pytest.mark.parametrize("kv_only_len", [0, 24])
def test_a_model_that_is_always_right(tiny: Path, expected: Outputs, kv_only_len: int) -> None:
    """The model itself: every draft is accepted, and the draft model goes on behind it."""
    engine = drafting(tiny, tiny, kv_only_len=kv_only_len)
    watched = Watched(engine)
    assert run(engine, PROMPTS, greedy()).tokens == expected.tokens
    watched.check(tiny)
    stats = engine.stats.speculative
    assert stats.num_accepted_tokens > 0.98 * stats.num_draft_tokens


def test_many_drafts_across_short_buffers(tiny: Path, expected: Outputs) -> None:
    engine = drafting(tiny, tiny, drafts=21, buffer_len=2, kv_only_len=0)
    assert run(engine, PROMPTS, greedy()).tokens == expected.tokens
    assert engine.stats.speculative.num_accepted_tokens > 0.8 * engine.stats.speculative.num_draft_tokens


def test_prefixes_are_cached_in_both_models(tiny: Path, other: Path, expected: Outputs) -> None:
    engine = drafting(tiny, other, slots=40)
    run(engine, PROMPTS, greedy())
    watched = Watched(engine)
    longer = [prompt + expected.tokens[str(i)] + [5, 6, 7] for i, prompt in enumerate(PROMPTS)]
    run(engine, longer, greedy(8))
    watched.check(other)
    assert watched.drafter.memory.prefixes.counters.hit_tokens > 0.8 * sum(map(len, longer))


def test_requests_that_its_memory_has_no_room_for_go_on_without(tiny: Path, expected: Outputs) -> None:
    engine = drafting(tiny, tiny, draft_memory=220 << 10, enable_prefix_caching=False)
    watched = Watched(engine)
    assert run(engine, PROMPTS, greedy()).tokens == expected.tokens
    assert [] in watched.drafts
    watched.check(tiny)


def test_preempted_requests_are_followed_on(tiny: Path, other: Path, expected: Outputs) -> None:
    engine = drafting(tiny, other, slots=6, pages=14, max_model_len=128)
    watched = Watched(engine)
    assert run(engine, PROMPTS, greedy()).tokens == expected.tokens
    assert engine.stats.num_preemptions > 0
    watched.check(other)


def test_both_models_share_the_memory(tiny: Path, other: Path) -> None:
    config = {"method": "draft_model", "model": str(other), "num_speculative_tokens": 2}
    options = {"dtype": "float32", "show_progress": False, "max_model_len": 256, "buffer_len": 8, "kv_only_len": 0}
    budget = 32 << 20
    engine = Engine.from_config(EngineConfig(str(tiny), memory=budget, speculative_config=config, **options))
    draft = engine._speculator.drafter.memory.plan
    assert engine.plan.budget + draft.budget == budget
    assert engine.plan.max_concurrency(256) == pytest.approx(draft.max_concurrency(256), rel=0.3)
    with pytest.raises(CapacityError, match="raise --memory"):
        Engine.from_config(EngineConfig(str(tiny), memory=64 << 10, speculative_config=config, **options))


def test_a_model_with_other_tokens_is_refused(tiny: Path, tmp_path: Path) -> None:
    larger = make_checkpoint(tmp_path, "qwen3_5", vocab_size=VOCAB_SIZE + 16)
    with pytest.raises(ConfigError, match=f"has other tokens than the model .{VOCAB_SIZE + 16} and {VOCAB_SIZE}"):
        drafting(tiny, larger)
    swapped = make_checkpoint(tmp_path / "swapped", "qwen3_5")
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="choose one with the same tokenizer"):
        drafting(tiny, swapped)
