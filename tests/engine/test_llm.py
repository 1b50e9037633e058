"""Offline inference: prompts in every form, parameters for all or for each, errors that leave nothing behind."""

from __future__ import annotations

import pytest
from torch import Tensor

from kvbuffer import LLM, SamplingParams
from kvbuffer.engine.engine import Engine
from kvbuffer.errors import InvalidRequestError
from tests.engine.test_engine import PROMPT, greedy, prompts
from tests.support.plans import check_idle


@pytest.fixture
def llm(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(Engine, "from_config", lambda config: engine)
    return LLM("tiny")


class TestLLM:
    def test_prompts_in_every_form(self, llm: LLM) -> None:
        text = "the state of the buffer"
        ids = llm.engine.tokenizer.encode(text)
        forms = [text, ids, {"prompt": text}, {"prompt_token_ids": ids}]
        results = llm.generate(forms, greedy(), use_tqdm=False)
        assert [r.prompt for r in results] == [text, None, text, None]
        assert all(r.prompt_token_ids == ids for r in results)
        first = results[0].outputs[0]
        assert len(first.token_ids) == 12
        assert first.text == llm.engine.tokenizer.decode(first.token_ids)
        for form in forms:
            (single,) = llm.generate(form, greedy(), use_tqdm=False)
            assert single.outputs == first_outputs(results)

    def test_results_keep_the_order_of_prompts_with_parameters_for_each(self, llm: LLM) -> None:
        lengths = [9, 1, 5, 3]
        results = llm.generate(prompts(4), [greedy(n) for n in lengths], use_tqdm=False)
        assert [r.prompt_token_ids for r in results] == prompts(4)
        assert [len(r.outputs[0].token_ids) for r in results] == lengths

    def test_no_prompts_no_results(self, llm: LLM) -> None:
        assert llm.generate([], greedy(), use_tqdm=False) == []

    def test_several_completions_differ_and_are_reproducible(self, llm: LLM) -> None:
        params = SamplingParams(n=3, temperature=1.5, seed=5, max_tokens=8, ignore_eos=True)
        (first,), (second,) = (llm.generate([PROMPT], params, use_tqdm=False) for _ in range(2))
        assert [o.index for o in first.outputs] == [0, 1, 2]
        assert len({tuple(o.token_ids) for o in first.outputs}) == 3
        assert first == second

    def test_logprobs_are_collected(self, llm: LLM) -> None:
        output = llm.generate([PROMPT], greedy(4, logprobs=2), use_tqdm=False)[0].outputs[0]
        assert [entry.token_id for entry in output.logprobs or []] == output.token_ids

    def test_chat(self, llm: LLM) -> None:
        messages = [{"role": "user", "content": "the key"}]
        (one,) = llm.chat(messages, greedy(), use_tqdm=False)
        many = llm.chat([messages, messages], greedy(), use_tqdm=False)
        assert many == [one, one]
        tokenizer = llm.engine.tokenizer
        assert tokenizer.decode(one.prompt_token_ids, skip_special_tokens=False) == (
            "<|im_start|>user\nthe key<|im_end|>\n<|im_start|>assistant\n"
        )
        (more,) = llm.chat(messages, greedy(), use_tqdm=False, add_generation_prompt=False)
        assert len(more.prompt_token_ids) < len(one.prompt_token_ids)

    @pytest.mark.parametrize(
        ("bad", "words"),
        [([[3], []], "empty"), ([{"text": "x"}], "prompt or prompt_token_ids, got"), (["", "a"], "empty")],
    )
    def test_one_bad_prompt_stops_the_call_before_anything_runs(self, llm: LLM, bad: list, words: str) -> None:
        with pytest.raises(InvalidRequestError, match=words):
            llm.generate(bad, greedy(), use_tqdm=False)
        check_idle(llm.engine)

    def test_parameters_for_another_number_of_prompts(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError, match="2 prompts but 1 sampling_params"):
            llm.generate([PROMPT, PROMPT], [greedy()], use_tqdm=False)

    def test_priorities_and_salts_reach_the_engine(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        add = llm.engine.add_request
        monkeypatch.setattr(llm.engine, "add_request", lambda *args: (seen.append(args[-1]), add(*args)))
        forms = [PROMPT, {"prompt_token_ids": PROMPT, "cache_salt": "s"}]
        llm.generate(forms, greedy(1), use_tqdm=False, priority=[3, -1])
        llm.generate(forms, greedy(1), use_tqdm=False, priority=7)
        llm.generate(PROMPT, greedy(1), use_tqdm=False)
        assert [options.priority for options in seen] == [3, -1, 7, 7, 0]
        assert [options.cache_salt for options in seen] == [None, "s", None, "s", None]
        with pytest.raises(InvalidRequestError, match="2 prompts but 1 priorities"):
            llm.generate(forms, greedy(1), use_tqdm=False, priority=[1])
        with pytest.raises(InvalidRequestError, match="cache_salt must be a non-empty string"):
            llm.generate({"prompt": "x", "cache_salt": ""}, greedy(1), use_tqdm=False)

    def test_any_number_of_prompts_may_wait(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        configs = []
        monkeypatch.setattr(Engine, "from_config", lambda config: configs.append(config) or engine)
        LLM("tiny")
        LLM("tiny", max_queue_len=5)
        assert [config.max_queue_len for config in configs] == [None, 5]

    def test_a_failing_model_leaves_nothing_behind(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> Tensor:
            raise RuntimeError("out of order")

        with monkeypatch.context() as patched:
            patched.setattr(llm.engine._model, "forward", fail)
            with pytest.raises(RuntimeError, match="out of order"):
                llm.generate(prompts(3), greedy(), use_tqdm=False)
        check_idle(llm.engine)
        assert len(llm.generate([PROMPT], greedy(3), use_tqdm=False)[0].outputs[0].token_ids) == 3


def first_outputs(results: list) -> list:
    return results[0].outputs
