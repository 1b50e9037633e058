"""The model's own head drafts what transformers' layers say it should, and the model says what it always says.

The head is one full-attention layer with a norm: transformers' model of one layer, given the projected inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import Draft
from kvbuffer.errors import ModelError
from kvbuffer.models.config import ModelConfig
from tests.engine.speculative.test_verification import greedy, run
from tests.support.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.support.plans import sized_engine

DRAFTS = 3
PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (1, 15, 16, 33, 70, 150)
]


class Reference:
    """The head in float32, everything computed anew for every token."""

    def __init__(self, path: Path) -> None:
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model, self.layer = (load(p, dtype=torch.float32).eval() for p in (path, path / "mtp_layer"))
        tensors = load_file(path / "model.safetensors")
        self.fc = tensors["mtp.fc.weight"]
        self.norms = [1 + tensors[f"mtp.pre_fc_norm_{part}.weight"] for part in ("embedding", "hidden")]
        self.eps = self.model.config.rms_norm_eps

    @torch.inference_mode()
    def drafts(self, token_ids: Sequence[int], count: int, skipped: tuple[int, int] = (0, 0)) -> list[int]:
        """Return what the head guesses after ``token_ids``, one token after the other; it has skipped some of them."""
        tokens = list(token_ids)
        hidden = self.model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
        for _ in range(count):
            out = self._head(tokens[1:], hidden, skipped)
            tokens.append(int(self.model.lm_head(out[-1]).argmax()))
            hidden = torch.cat([hidden, out[-1:]])
        return tokens[-count:]

    def _head(self, tokens: Sequence[int], hidden: Tensor, skipped: tuple[int, int]) -> Tensor:
        embedded = self.model.get_input_embeddings()(torch.tensor(tokens))
        normed = [F.rms_norm(x, x.shape[-1:], w, self.eps) for x, w in zip((embedded, hidden), self.norms, strict=True)]
        inputs = F.linear(torch.cat(normed, -1), self.fc)[None]
        seen = torch.tensor([i for i in range(len(tokens)) if not skipped[0] <= i < skipped[1]])
        return self.layer.model(inputs_embeds=inputs[:, seen], position_ids=seen[None]).last_hidden_state[0]


class Checked:
    """Compares every draft of an engine with the reference's."""

    def __init__(self, engine: Engine, reference: Reference) -> None:
        self.reference, self.drafter = reference, engine._speculator.drafter
        self.propose, self.drafter.propose = self.drafter.propose, self._propose
        self.count = 0

    def _propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        drafts = self.propose(requests, limits)
        for request, limit, draft in zip(requests, limits, drafts, strict=True):
            assert len(draft.token_ids) in (1, limit)  # one where there are no pages for more
            assert draft.token_ids == self.reference.drafts(request.token_ids, len(draft.token_ids))
            self.count += 1
        return drafts


@pytest.fixture(scope="module", params=["qwen3_next", "qwen3_5_tied", "qwen3_5_moe"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("mtp"), request.param, mtp=True)


@pytest.fixture(scope="module")
def reference(path: Path) -> Reference:
    return Reference(path)


def drafting(path: Path, **options: Any) -> Engine:
    config = {"method": "qwen3_next_mtp", "num_speculative_tokens": DRAFTS, "adaptive": False}
    options = {"slots": 16, "pages": 128, "max_model_len": 200, **options}
    return sized_engine(path, speculative_config=config, **options)


@pytest.mark.parametrize("tokens", [64, 512], ids=["chunked", "whole"])
def test_drafts_of_ragged_requests(path: Path, reference: Reference, tokens: int) -> None:
    engine = drafting(path, tokens=tokens)
    checked = Checked(engine, reference)
    plain = sized_engine(path, slots=16, pages=128, max_model_len=200)
    assert run(engine, PROMPTS, greedy(10)).tokens == run(plain, PROMPTS, greedy(10)).tokens
    assert checked.count >= 8 * len(PROMPTS)


def test_drafts_that_are_wanted_only_now_and_then(path: Path, reference: Reference) -> None:
    """Decoded tokens wait, and are computed together with hidden states of several steps."""
    engine = drafting(path)
    checked, steps, draft = Checked(engine, reference), iter(range(1 << 30)), engine._speculator.draft
    engine._speculator.draft = lambda requests: draft(requests if next(steps) % 7 == 6 else [])
    run(engine, PROMPTS, greedy(25))
    assert checked.count >= 2 * len(PROMPTS)


class Sleeper:
    """An engine whose head is asked for nothing until its requests have ``steps`` tokens."""

    def __init__(self, path: Path, steps: int) -> None:
        self.engine, self.steps = drafting(path, slots=30, max_model_len=300), steps
        self.drafter = self.engine._speculator.drafter
        self.skipped: dict[str, tuple[int, int]] = {}
        draft, self.prepare = self.engine._speculator.draft, self.drafter.prepare
        self.engine._speculator.draft = lambda requests: draft([r for r in requests if r.num_output_tokens > steps])
        self.drafter.prepare = self._prepare

    def _prepare(self, requests: Sequence[Request]) -> int:
        for request in requests:
            if request.request_id not in self.skipped:
                self.skipped[request.request_id] = request.num_prompt_tokens, self.drafter._waiting[request].begin
        return self.prepare(requests)


def test_a_head_that_has_slept_goes_on_as_if_the_text_between_were_not_there(path: Path, reference: Reference) -> None:
    sleeper = Sleeper(path, steps=60)
    propose, count = sleeper.drafter.propose, 0

    def checked(requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        nonlocal count
        drafts = propose(requests, limits)
        for request, draft in zip(requests, drafts, strict=True):
            skipped = sleeper.skipped[request.request_id]
            assert skipped[1] - skipped[0] >= 32
            assert draft.token_ids == reference.drafts(request.token_ids, len(draft.token_ids), skipped)
            count += 1
        return drafts

    sleeper.drafter.propose = checked
    # Prompts that end with a page: where others end, the rest of the page is empty, but there.
    run(sleeper.engine, [prompt[: len(prompt) // 16 * 16] for prompt in PROMPTS[2:]], greedy(70))
    assert count > 10


def test_requests_of_a_head_that_sleeps_say_the_same(path: Path) -> None:
    """So do those that go on where they ended, and nothing that was in a page before gets into the head."""
    sleeper, plain = Sleeper(path, steps=50), sized_engine(path, slots=30, pages=128, max_model_len=300)
    forward, seen = sleeper.drafter.head.forward, []
    sleeper.drafter.head.forward = lambda *given: seen.append(forward(*given)) or seen[-1]
    for length in (30, 70):
        said = run(sleeper.engine, PROMPTS, greedy(length)).tokens
        assert said == run(plain, PROMPTS, greedy(length)).tokens
        turns = [prompt + said[str(i)] + [7, 8, 9] for i, prompt in enumerate(PROMPTS)]
        assert run(sleeper.engine, turns, greedy(60)).tokens == run(plain, turns, greedy(60)).tokens
    assert all(bool(out.isfinite().all()) for out in seen)
    assert sleeper.engine.stats.speculative.num_draft_tokens > 0


def test_drafts_after_a_cached_prefix(path: Path, reference: Reference) -> None:
    """The next turn of a conversation, and the same prompt again: keys and values of the head are cached, too."""
    engine = drafting(path, slots=30)
    first = run(engine, PROMPTS, greedy(20)).tokens
    checked = Checked(engine, reference)
    hits = engine.stats.prefixes.hit_tokens
    run(engine, [prompt + first[str(i)] + [7, 8, 9] for i, prompt in enumerate(PROMPTS)], greedy(6))
    run(engine, PROMPTS, greedy(6))
    assert engine.stats.prefixes.hit_tokens > hits + 2 * sum(map(len, PROMPTS[1:])) - 20
    assert checked.count >= 8 * len(PROMPTS)


def test_drafts_of_requests_that_were_preempted(path: Path, reference: Reference) -> None:
    engine = drafting(path, slots=6, pages=24)
    checked = Checked(engine, reference)
    run(engine, [prompt[:60] for prompt in PROMPTS], greedy(40))
    assert engine.stats.num_preemptions > 0
    assert checked.count > 20


def test_the_head_takes_memory_only_where_it_drafts(path: Path) -> None:
    plain, with_head = (ModelConfig.from_folder(path, with_mtp).cache_shape for with_mtp in (False, True))
    assert with_head.num_attention_layers == plain.num_attention_layers + 1
    caches = len(drafting(path)._runner.caches)
    assert caches == len(sized_engine(path)._runner.caches) + 1


def test_a_checkpoint_without_a_head_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"has no multi-token-prediction head \(no mtp\.\* weights\): choose another"):
        drafting(tiny)
