"""Log-probabilities of prompts, against transformers: in chunks, beside others, cached, preempted, without output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from kvbuffer import LLM, SamplingParams
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import FinishReason, TokenLogprob
from kvbuffer.engine.scheduler import _MAX_SCORED_TOKENS
from kvbuffer.errors import InvalidRequestError
from tests.support.caching import text
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.plans import Outputs, drain, poison_free, sized_engine


def scored(max_tokens: int = 3, top: int = 2, **options) -> SamplingParams:
    fields = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "prompt_logprobs": top}
    return SamplingParams(**{**fields, **options})


@pytest.fixture(scope="module")
def oracle(tiny: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def check(oracle: transformers.PreTrainedModel, prompt: list[int], found: list[TokenLogprob], top: int = 2) -> None:
    """Hold log-probabilities, ranks and most likely tokens to transformers'."""
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    assert [token.token_id for token in found] == prompt[1:]
    for token, row in zip(found, expected, strict=False):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=2e-4)
        assert abs(token.rank - 1 - int((row > row[token.token_id]).sum())) <= 1
        values, _ = row.topk(max(1, top))
        assert [value for _, value in token.top] == pytest.approx(values.tolist()[:top], abs=2e-4)


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> Outputs:
    engine.add_request("r", prompt, params)
    poison_free(engine)
    return drain(engine)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 63, 64, 65, 100, 127])
def test_equal_transformers(engine: Engine, oracle: transformers.PreTrainedModel, length: int) -> None:
    prompt = text(length, length)
    outputs = run(engine, prompt, scored(max_tokens=1))
    check(oracle, prompt, outputs.prompt_logprobs["r"])
    assert len(outputs.tokens["r"]) == 1


def test_of_long_prompts_are_computed_a_chunk_at_a_time(tiny: Path, oracle: transformers.PreTrainedModel) -> None:
    engine = sized_engine(tiny, max_model_len=1024, tokens=1024, pages=200)
    sizes: list[int] = []
    forward = engine._model.forward

    def recorded(inputs, caches):
        sizes.append(len(inputs.logits_rows))
        return forward(inputs, caches)

    engine._model.forward = recorded  # type: ignore[method-assign]
    prompts = [text(1, 700), text(2, 300), text(3, 90)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, scored())
    engine.add_request("unscored", text(4, 500), scored(prompt_logprobs=None))
    outputs = drain(engine)
    for i, prompt in enumerate(prompts):
        check(oracle, prompt, outputs.prompt_logprobs[str(i)])
    assert "unscored" not in outputs.prompt_logprobs
    assert max(sizes) <= _MAX_SCORED_TOKENS + len(prompts) + 1


def test_are_whole_where_the_prompt_is_cached(tiny: Path, oracle: transformers.PreTrainedModel) -> None:
    engine = sized_engine(tiny, enable_prefix_caching=True)
    prompt = text(5, 90)
    plain = run(engine, prompt, scored(prompt_logprobs=None))
    outputs = run(engine, prompt, scored())
    check(oracle, prompt, outputs.prompt_logprobs["r"])
    assert outputs.last["r"].num_cached_tokens == 0
    assert outputs.tokens == plain.tokens
    assert run(engine, prompt, scored(prompt_logprobs=None)).last["r"].num_cached_tokens == len(prompt) - 1


def test_of_equal_prompts_at_once(tiny: Path, oracle: transformers.PreTrainedModel) -> None:
    engine = sized_engine(tiny, enable_prefix_caching=True)
    prompt = text(6, 80)
    for i in range(3):
        engine.add_request(str(i), prompt, scored(top=i))
    outputs = drain(engine)
    for i in range(3):
        check(oracle, prompt, outputs.prompt_logprobs[str(i)], top=i)


def test_survive_preemption(tiny: Path, oracle: transformers.PreTrainedModel) -> None:
    engine = sized_engine(tiny, pages=11, tokens=64)
    prompts = [text(seed, 60) for seed in range(4)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, scored(max_tokens=40))
    outputs = drain(engine)
    assert engine.stats.num_preemptions > 0
    for i, prompt in enumerate(prompts):
        check(oracle, prompt, outputs.prompt_logprobs[str(i)])
        assert len(outputs.tokens[str(i)]) == 40


def test_go_with_speculation(tiny: Path, oracle: transformers.PreTrainedModel) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 3}
    engine = sized_engine(tiny, speculative_config=speculative)
    prompt = text(7, 20) * 3
    outputs = run(engine, prompt, scored(max_tokens=30))
    check(oracle, prompt, outputs.prompt_logprobs["r"])
    plain = run(sized_engine(tiny), prompt, scored(max_tokens=30, prompt_logprobs=None))
    assert outputs.tokens == plain.tokens


@pytest.mark.parametrize("length", [1, 2, 90])
def test_without_any_output(engine: Engine, oracle: transformers.PreTrainedModel, length: int) -> None:
    prompt = text(8, length)
    outputs = run(engine, prompt, scored(max_tokens=0))
    check(oracle, prompt, outputs.prompt_logprobs["r"])
    last = outputs.last["r"]
    assert (outputs.tokens["r"], last.finish_reason, last.num_output_tokens) == ([], FinishReason.LENGTH, 0)


def test_no_output_is_refused_where_nothing_else_is_asked_for() -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens must be an integer between 1 and"):
        SamplingParams(max_tokens=0)


@pytest.mark.parametrize("value", [-1, 21, 1.5, True, "1"])
def test_a_count_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequestError, match="prompt_logprobs must be an integer between 0 and 20"):
        SamplingParams(prompt_logprobs=value)  # type: ignore[arg-type]


def test_offline(tiny: Path, oracle: transformers.PreTrainedModel) -> None:
    llm = LLM(str(tiny), dtype="float32", memory=64 << 20, max_model_len=128, show_progress=False)
    prompts = [text(9, 30), text(10, 40)]
    params = [scored(), scored(prompt_logprobs=None)]
    first, second = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    check(oracle, prompts[0], first.prompt_logprobs[1:])  # type: ignore[arg-type]
    assert second.prompt_logprobs is None
    assert all(token < VOCAB_SIZE for token in first.outputs[0].token_ids)
