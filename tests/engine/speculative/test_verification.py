"""Whatever is drafted, the model says what it would have said without drafts.

The drafters know what that is, and are wrong as often and wherever a test wants.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbuffer import SamplingParams
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import FinishReason
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.drafters import OracleDrafter, TreeDrafter, fixed_length, sometimes, use_drafter
from tests.support.plans import Outputs, check_idle, poison_free, sized_engine

MAX_LEN = 160
#: Longer than a page of 16 and than several buffers, so that drafts lie across every border.
OUTPUT_LEN = 40
PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (1, 7, 15, 16, 17, 40, 64, 77)
]
ALWAYS, NEVER = sometimes(1.0), sometimes(0.0)


def greedy(max_tokens: int | None = OUTPUT_LEN, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **{"ignore_eos": True, **others})


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> Outputs:
    """Add a request every other step, so that they are at different places; memory is checked after each step."""
    outputs, waiting, steps = Outputs(), list(enumerate(prompts)), 0
    while waiting or engine.has_work():
        if waiting and steps % 2 == 0:
            number, prompt = waiting.pop(0)
            engine.add_request(str(number), prompt, params[number] if isinstance(params, list) else params)
        poison_free(engine)
        outputs.add(engine.step())
        engine.check_integrity()
        steps += 1
    check_idle(engine)
    return outputs


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    """What follows each prompt, and a little more than any request asks for."""
    engine = sized_engine(tiny, max_model_len=MAX_LEN, enable_prefix_caching=False)
    return list(run(engine, PROMPTS, greedy(OUTPUT_LEN + 10)).tokens.values())


@pytest.fixture(scope="module")
def oracle(expected: list[list[int]]) -> Callable[[Callable[[int], bool]], OracleDrafter]:
    outputs = {tuple(prompt): output for prompt, output in zip(PROMPTS, expected, strict=True)}
    return lambda is_right: OracleDrafter(outputs, is_right, VOCAB_SIZE)


def speculating(tiny: Path, num_drafts: int = 5, **options: Any) -> Engine:
    options = {"slots": 16, "pages": 128, "max_model_len": MAX_LEN, **options}
    return sized_engine(tiny, speculative_config=fixed_length(num_drafts), **options)


class TestIdentity:
    @pytest.mark.parametrize("buffer_len", [1, 3, 16])
    @pytest.mark.parametrize("kv_only_len", [0, 24])
    @pytest.mark.parametrize(
        "is_right", [ALWAYS, NEVER, sometimes(0.6), *(lambda place, n=n: place % 6 != n for n in range(6))]
    )
    def test_chains(self, tiny: Path, expected, oracle, is_right, buffer_len: int, kv_only_len: int) -> None:
        """The last ones are wrong at every sixth place: drafts of 5 are rejected at each of theirs."""
        engine = speculating(tiny, buffer_len=buffer_len, kv_only_len=kv_only_len)
        use_drafter(engine, oracle(is_right))
        outputs = run(engine, PROMPTS, greedy())
        assert list(outputs.tokens.values()) == [output[:OUTPUT_LEN] for output in expected]
        stats = engine.stats.speculative
        assert stats.num_draft_tokens > 0
        if is_right is ALWAYS:
            assert stats.num_accepted_tokens == stats.num_draft_tokens
            assert engine.stats.num_folds > 0
        if is_right is NEVER:
            assert stats.num_accepted_tokens == 0

    @pytest.mark.parametrize("num_drafts", [3, 12, 40])
    @pytest.mark.parametrize(("buffer_len", "kv_only_len"), [(1, 0), (3, 24), (16, 24)])
    def test_trees(self, tiny: Path, expected, oracle, buffer_len: int, kv_only_len: int, num_drafts: int) -> None:
        engine = speculating(tiny, num_drafts, buffer_len=buffer_len, kv_only_len=kv_only_len, tokens=512)
        use_drafter(engine, TreeDrafter(oracle(ALWAYS).outputs, sometimes(0.9), VOCAB_SIZE))
        outputs = run(engine, PROMPTS, greedy())
        assert list(outputs.tokens.values()) == [output[:OUTPUT_LEN] for output in expected]
        assert engine.stats.speculative.num_accepted_tokens > 0

    def test_trees_beside_chains(self, tiny: Path, expected, oracle) -> None:
        engine = speculating(tiny, 8, buffer_len=3)
        trees = TreeDrafter(oracle(ALWAYS).outputs, sometimes(0.9), VOCAB_SIZE)
        chains, propose = oracle(sometimes(0.5)), trees._propose
        trees._propose = lambda request, limit: (propose, chains._propose)[int(request.request_id) % 2](request, limit)
        use_drafter(engine, trees)
        outputs = run(engine, PROMPTS, greedy())
        assert list(outputs.tokens.values()) == [output[:OUTPUT_LEN] for output in expected]

    def test_where_the_recurrence_is_cheaper(self, tiny: Path, expected, oracle, monkeypatch) -> None:
        """Drafts are verified in a buffer all the same; its records are folded before the recurrence goes on."""
        engine = speculating(tiny, buffer_len=4, kv_only_len=0)
        monkeypatch.setattr(engine._scheduler.forms, "buffer_len", lambda batch: 0)
        drafter = oracle(sometimes(0.6))
        monkeypatch.setattr(drafter, "propose", skip_some(drafter.propose))
        use_drafter(engine, drafter)
        outputs = run(engine, PROMPTS, greedy())
        assert list(outputs.tokens.values()) == [output[:OUTPUT_LEN] for output in expected]
        assert engine.stats.speculative.num_accepted_tokens > 0

    @pytest.mark.parametrize("record_pages", [18, 6])
    def test_with_little_memory(self, tiny: Path, expected, oracle, record_pages: int) -> None:
        """Requests are preempted, and drafts left out where there are no pages for them."""
        engine = speculating(
            tiny, slots=3, pages=14, buffer_len=4, pools={"num_record_pages": record_pages}, max_model_len=128
        )
        use_drafter(engine, oracle(sometimes(0.8)))
        outputs = run(engine, PROMPTS, greedy())
        assert list(outputs.tokens.values()) == [output[:OUTPUT_LEN] for output in expected]

    def test_of_later_requests_that_begin_with_what_was_said(self, tiny: Path, expected, oracle) -> None:
        """What a prefix keeps are accepted tokens only, however the drafts behind them fared."""
        engine = speculating(tiny, slots=40, pages=400)
        use_drafter(engine, oracle(sometimes(0.6)))
        run(engine, PROMPTS, greedy())
        use_drafter(engine, oracle(NEVER))
        for length in range(1, OUTPUT_LEN):
            longer = [prompt + output[:length] for prompt, output in zip(PROMPTS, expected, strict=True)]
            engine._speculator.drafter.outputs.update(
                {tuple(prompt): output[length:] for prompt, output in zip(longer, expected, strict=True)}
            )
            outputs = run(engine, longer, greedy(3))
            assert list(outputs.tokens.values()) == [output[length : length + 3] for output in expected]
        assert engine._memory.prefixes.counters.hit_tokens > 0

    def test_of_adaptive_lengths(self, tiny: Path, expected, oracle) -> None:
        config = {**fixed_length(5), "adaptive": True}
        engine = sized_engine(tiny, slots=16, pages=128, max_model_len=MAX_LEN, speculative_config=config)
        use_drafter(engine, oracle(ALWAYS))
        assert run(engine, PROMPTS, greedy()).tokens == {
            str(number): output[:OUTPUT_LEN] for number, output in enumerate(expected)
        }
        assert engine.stats.speculative.num_accepted_tokens > 0

    def test_of_the_prompt_lookup(self, tiny: Path, expected) -> None:
        engine = speculating(tiny)
        repetitive = [(output * 3)[: len(output) + 20] for output in expected]
        alone = run(sized_engine(tiny, max_model_len=MAX_LEN), repetitive, greedy(30))
        assert run(engine, repetitive, greedy(30)).tokens == alone.tokens
        assert engine.stats.speculative.num_draft_tokens > 0

    @pytest.mark.parametrize(("state", "record"), [("int8", "bfloat16"), ("bfloat16", "bfloat16")])
    def test_of_low_precision_where_nothing_is_folded(self, tiny: Path, state: str, record: str) -> None:
        """Otherwise rounding depends on where the folds fall."""
        dtypes = {"state_dtype": state, "record_dtype": record, "buffer_len": 64}
        plain = sized_engine(tiny, slots=16, pages=128, max_model_len=MAX_LEN, **dtypes)
        without = run(plain, PROMPTS, greedy()).tokens
        engine = speculating(tiny, **dtypes)
        outputs = {tuple(prompt): without[str(number)] for number, prompt in enumerate(PROMPTS)}
        use_drafter(engine, OracleDrafter(outputs, sometimes(0.7), VOCAB_SIZE))
        assert run(engine, PROMPTS, greedy()).tokens == without
        assert engine.stats.speculative.num_accepted_tokens > 0


def skip_some(propose: Callable[..., Any]) -> Callable[..., Any]:
    """Propose nothing in two steps of three."""
    calls = iter(range(1 << 30))

    def sparse(requests: Any, limits: Any) -> Any:
        drafts = propose(requests, limits)
        return drafts if next(calls) % 3 == 0 else [draft._replace(token_ids=[]) for draft in drafts]

    return sparse


class TestEndings:
    """A request ends at just the token at which it would have ended, though more was accepted."""

    @pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 7, 11])
    def test_length(self, tiny: Path, expected, oracle, max_tokens: int) -> None:
        engine = speculating(tiny)
        use_drafter(engine, oracle(ALWAYS))
        outputs = run(engine, PROMPTS[:3], greedy(max_tokens))
        assert list(outputs.tokens.values()) == [output[:max_tokens] for output in expected[:3]]
        assert all(last.finish_reason == FinishReason.LENGTH for last in outputs.last.values())

    def test_the_end_of_the_context(self, tiny: Path, expected, oracle) -> None:
        engine = speculating(tiny, max_model_len=len(PROMPTS[3]) + 20)
        use_drafter(engine, oracle(ALWAYS))
        outputs = run(engine, [PROMPTS[3]], greedy(None))
        assert outputs.tokens["0"] == expected[3][:20]

    @pytest.mark.parametrize("place", range(8))
    def test_stop_token(self, tiny: Path, expected, oracle, place: int) -> None:
        engine = speculating(tiny)
        use_drafter(engine, oracle(ALWAYS))
        stop = expected[4][place]
        outputs = run(engine, [PROMPTS[4]], greedy(stop_token_ids=[stop]))
        assert outputs.tokens["0"] == expected[4][: expected[4].index(stop) + 1]
        assert outputs.last["0"].stop_reason == stop

    def test_stop_string(self, tiny: Path, expected, oracle) -> None:
        plain, engine = sized_engine(tiny, max_model_len=MAX_LEN), speculating(tiny)
        use_drafter(engine, oracle(ALWAYS))
        text = plain.tokenizer.decode(expected[5])
        params = [greedy(stop=[text[i : i + 3]]) for i in range(0, 24, 3) if "\ufffd" not in text[i : i + 3]]
        assert params
        batch = [PROMPTS[5]] * len(params)
        with_drafts, without = run(engine, batch, params), run(plain, batch, params)
        assert with_drafts.tokens == without.tokens
        assert with_drafts.text == without.text

    def test_cancelling_frees_everything(self, tiny: Path, oracle) -> None:
        engine = speculating(tiny)
        use_drafter(engine, oracle(sometimes(0.5)))
        for steps in range(6):
            for number, prompt in enumerate(PROMPTS):
                engine.add_request(str(number), prompt, greedy())
            for _ in range(steps):
                engine.step()
            for number in range(len(PROMPTS)):
                engine.abort_request(str(number))
            check_idle(engine)


def test_what_is_counted(tiny: Path, oracle) -> None:
    """Of drafts of 3 whose second token is always wrong, one is accepted."""
    engine = speculating(tiny, num_drafts=3)
    drafter = oracle(ALWAYS)
    propose = drafter.propose

    def second_is_wrong(requests: Any, limits: Any) -> Any:
        drafts = propose(requests, limits)
        return [
            d._replace(token_ids=[*d.token_ids[:1], *((t + 1) % VOCAB_SIZE for t in d.token_ids[1:])]) for d in drafts
        ]

    drafter.propose = second_is_wrong
    use_drafter(engine, drafter)
    last = run(engine, PROMPTS[:1], greedy(9)).last["0"]
    stats = engine.stats.speculative
    # One token from the prompt, two from each of four steps; the last draft is cut to what may still be said.
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (4, 3 + 3 + 3 + 1, 4)
    assert stats.num_accepted_tokens_per_pos == [4, 0, 0]
    assert stats.mean_accepted_length == 2.0
    assert (last.num_draft_tokens, last.num_accepted_tokens) == (10, 4)
    assert stats.draft_seconds > 0.0
    assert stats.verify_seconds > 0.0
