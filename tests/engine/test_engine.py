"""The engine on a real tiny checkpoint: endings, errors, preemption, aborts, and memory that starts poisoned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvbuffer import SamplingParams
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import FinishReason
from kvbuffer.errors import InvalidRequestError
from tests.support.checkpoints import EOS_TOKEN_ID, VOCAB_SIZE
from tests.support.operators import poison
from tests.support.plans import Outputs, check_idle, drain, sized_engine

MAX_LEN = 128


def prompts(count: int, low: int = 3, high: int = 100) -> list[list[int]]:
    """Return seeded prompts of ragged lengths."""
    rng = torch.Generator().manual_seed(count * 1000 + low + high)
    lengths = torch.randint(low, high, (count,), generator=rng).tolist()
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=rng).tolist() for n in lengths]


def greedy(max_tokens: int | None = 12, **options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **options})


def run(engine: Engine, batch: list[list[int]], params: SamplingParams) -> Outputs:
    for i, prompt in enumerate(batch):
        engine.add_request(str(i), prompt, params)
    return drain(engine)


def alone(engine: Engine, batch: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [run(engine, [prompt], params).tokens["0"] for prompt in batch]


def watch_logits(engine: Engine, monkeypatch: pytest.MonkeyPatch, edit) -> None:
    """Let ``edit(inputs, logits)`` change every step's logits."""
    forward = engine._model.forward

    def edited(inputs, caches) -> Tensor:
        logits = forward(inputs, caches).clone()  # inference tensors cannot be edited
        edit(inputs, logits)
        return logits

    monkeypatch.setattr(engine._model, "forward", edited)


def write(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """Make every request say ``text``, then end-of-sequence for ever; return the text's tokens."""
    ids = engine.tokenizer.encode(text)

    def force(inputs, logits: Tensor) -> None:
        positions = inputs.positions[inputs.logits_rows] - len(PROMPT) + 1
        for row, place in zip(logits, positions.tolist(), strict=True):
            row.fill_(0.0)
            row[ids[place] if place < len(ids) else EOS_TOKEN_ID] = 50.0

    watch_logits(engine, monkeypatch, force)
    return ids


PROMPT = [5, 6, 7]


class TestBatching:
    def test_a_request_gives_the_same_tokens_alone_and_in_a_batch(self, engine: Engine) -> None:
        batch = prompts(20)
        together = run(engine, batch, greedy())
        assert [together.tokens[str(i)] for i in range(20)] == alone(engine, batch, greedy())

    def test_the_token_budget_is_kept(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        watch_logits(engine, monkeypatch, lambda inputs, logits: sizes.append(inputs.token_ids.numel()))
        run(engine, prompts(12), greedy())
        assert 100 < max(sizes) <= engine.config.max_num_batched_tokens == 128

    def test_ten_thousand_requests_queue_and_many_of_them_leave(self, tiny: Path) -> None:
        engine = sized_engine(tiny, slots=32, pages=128, enable_prefix_caching=True, max_queue_len=None)
        for i in range(10_000):
            engine.add_request(str(i), [3 + i % 500, 4], greedy(1 + i % 3))
        assert engine.stats.num_waiting == 10_000
        for i in range(0, 10_000, 4):
            engine.abort_request(str(i))
        outputs = drain(engine)
        assert len(outputs.last) == 7_500
        assert all(len(tokens) == 1 + int(name) % 3 for name, tokens in outputs.tokens.items())
        assert outputs.tokens["1"] == outputs.tokens["1501"]

    def test_requests_may_come_at_any_time(self, engine: Engine) -> None:
        batch, outputs = prompts(6), Outputs()
        for i, prompt in enumerate(batch):
            engine.add_request(str(i), prompt, greedy())
            outputs.add(engine.step())
        outputs.add(delta for _ in range(200) for delta in engine.step())
        assert [outputs.tokens[str(i)] for i in range(6)] == alone(engine, batch, greedy())

    def test_a_step_without_work_does_nothing(self, engine: Engine) -> None:
        assert not engine.has_work()
        assert engine.step() == []


class TestMemory:
    @pytest.mark.parametrize("tokens", [64, 128])
    def test_preempted_requests_give_the_same_tokens(self, tiny: Path, engine: Engine, tokens: int) -> None:
        """Eight requests of up to 8 pages, and 10 pages: they are interrupted and computed again."""
        few = sized_engine(tiny, slots=4, pages=10, max_model_len=MAX_LEN, tokens=tokens)
        batch = prompts(8, 10, 60)
        outputs = run(few, batch, greedy(50))
        assert few.stats.num_preemptions > 0
        assert [outputs.tokens[str(i)] for i in range(8)] == alone(engine, batch, greedy(50))

    def test_sampling_goes_on_where_it_was_after_preemption(self, tiny: Path, engine: Engine) -> None:
        few = sized_engine(tiny, slots=4, pages=8, max_model_len=MAX_LEN)
        params = greedy(50, temperature=1.0, seed=3, repetition_penalty=1.3, frequency_penalty=0.2)
        batch = prompts(5, 10, 60)
        outputs = run(few, batch, params)
        assert few.stats.num_preemptions > 0
        assert [outputs.tokens[str(i)] for i in range(5)] == alone(engine, batch, params)
        assert all(outputs.text[str(i)] == few.tokenizer.decode(outputs.tokens[str(i)]) for i in range(5))

    def test_admission_never_takes_more_than_there_is(self, tiny: Path) -> None:
        few = sized_engine(tiny, slots=2, pages=8, max_model_len=MAX_LEN)
        for i, prompt in enumerate(prompts(10)):
            few.add_request(str(i), prompt, greedy(5))
        while few.has_work():
            few.step()
            few.check_integrity()
            stats = few.stats
            assert stats.pools["slots"].used <= min(stats.num_running, 2)
            assert stats.pools["attention_pages"].used <= stats.pools["attention_pages"].total == 8
        check_idle(few)

    @pytest.mark.parametrize("buffer_len", [1, 4, 16])
    def test_what_lies_in_unused_memory_never_shows(self, tiny: Path, engine: Engine, buffer_len: int) -> None:
        """Memory is not cleared at the start nor between requests; here all of it is NaN before every request."""
        batch = prompts(6)
        expected = alone(engine, batch, greedy(20))
        options = {"buffer_len": buffer_len, "enable_prefix_caching": False}
        poisoned = sized_engine(tiny, slots=6, pages=48, max_model_len=MAX_LEN, **options)
        for _ in range(2):
            for cache in poisoned._runner.caches:
                for part in cache:
                    poison(*([part] if isinstance(part, Tensor) else part))
            outputs = run(poisoned, batch, greedy(20))
            assert [outputs.tokens[str(i)] for i in range(6)] == expected

    def test_a_request_gets_a_state_when_records_do_not_pay_any_more(self, tiny: Path) -> None:
        """Three tokens of prompt, of 14 more all but the last are decoded, the first one at a fill of 3."""
        engine = sized_engine(tiny, buffer_len=4, kv_only_len=6)
        engine.add_request("r", PROMPT, greedy(14))
        slots = []
        while engine.has_work():
            engine.step()
            slots.append(engine.stats.pools["slots"].used)
        # The prompt and three decoded tokens without a state; folds before decoded tokens 4 (all six), 8 and 11.
        assert slots == [0] * 4 + [1] * 9 + [0]
        assert engine.stats.num_folds == 3


class TestAbort:
    @pytest.mark.parametrize("steps", range(5))
    def test_at_any_moment_it_frees_everything(self, tiny: Path, steps: int) -> None:
        """Waiting, in the middle of a prompt, after it, decoding."""
        engine = sized_engine(tiny, slots=2, tokens=64, max_model_len=MAX_LEN)
        for i in range(4):
            engine.add_request(str(i), [9] * 120, greedy(5))
        for _ in range(steps):
            engine.step()
        for i in (2, 0, 3, 1):
            engine.abort_request(str(i))
            engine.check_integrity()
        check_idle(engine)
        assert not engine.has_work()
        assert engine.step() == []

    def test_of_a_preempted_request(self, tiny: Path) -> None:
        engine = sized_engine(tiny, slots=2, pages=8, max_model_len=MAX_LEN)
        for token, name in enumerate("ab", 9):
            engine.add_request(name, [token] * 60, greedy(60))
        while engine.stats.num_preemptions == 0:
            assert engine.step()
        assert [r.request_id for r in engine._scheduler.waiting] == ["b"]
        engine.abort_request("b")
        engine.check_integrity()
        assert len(drain(engine).last) == 1

    def test_leaves_others_as_they_were(self, engine: Engine) -> None:
        batch = prompts(4)
        for i, prompt in enumerate(batch):
            engine.add_request(str(i), prompt, greedy())
        outputs = Outputs()
        for _ in range(4):
            outputs.add(engine.step())
        engine.abort_request("1")
        while engine.has_work():
            outputs.add(engine.step())
        expected = alone(engine, batch, greedy())
        assert [outputs.tokens[i] for i in "023"] == [expected[i] for i in (0, 2, 3)]
        assert outputs.last["1"].finish_reason is None

    def test_of_an_unknown_or_finished_request_is_ignored(self, engine: Engine) -> None:
        run(engine, [PROMPT], greedy(1))
        engine.abort_request("0")
        engine.abort_request("never seen")
        run(engine, [PROMPT], greedy(1))  # the id is free again


class TestEndings:
    def test_max_tokens(self, engine: Engine) -> None:
        outputs = run(engine, [PROMPT], greedy(7))
        last = outputs.last["0"]
        assert (last.finish_reason, last.stop_reason) == (FinishReason.LENGTH, None)
        assert (last.num_prompt_tokens, last.num_output_tokens, len(outputs.tokens["0"])) == (3, 7, 7)

    def test_a_full_context(self, engine: Engine) -> None:
        outputs = run(engine, [PROMPT, [8] * (MAX_LEN - 1)], greedy(None))
        assert [len(outputs.tokens[i]) for i in "01"] == [MAX_LEN - 3, 1]
        assert outputs.last["0"].finish_reason == outputs.last["1"].finish_reason == FinishReason.LENGTH

    def test_end_of_sequence_is_a_token_without_text(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = write(engine, monkeypatch, "the state")
        outputs = run(engine, [PROMPT], greedy(20, ignore_eos=False))
        assert outputs.tokens["0"] == [*ids, EOS_TOKEN_ID]
        assert outputs.text["0"] == "the state"
        assert (outputs.last["0"].finish_reason, outputs.last["0"].stop_reason) == (FinishReason.STOP, None)

    def test_end_of_sequence_may_be_ignored(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = write(engine, monkeypatch, "the state")
        outputs = run(engine, [PROMPT], greedy(20))
        assert outputs.tokens["0"] == ids + [EOS_TOKEN_ID] * (20 - len(ids))
        assert outputs.last["0"].finish_reason == FinishReason.LENGTH

    @pytest.mark.parametrize("include", [False, True])
    @pytest.mark.parametrize("stop", ["ate bu", "t", "keys!"])
    def test_stop_strings_end_the_text_wherever_they_fall(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, stop: str, include: bool
    ) -> None:
        """Within a token, across tokens, or nowhere: then the part held back comes at the end."""
        text = "the state buffer keys"
        ids = write(engine, monkeypatch, text)
        params = greedy(30, ignore_eos=False, stop=["zzz", stop], include_stop_str_in_output=include)
        outputs = run(engine, [PROMPT], params)
        last = outputs.last["0"]
        assert last.finish_reason == FinishReason.STOP
        if stop in text:
            end = text.index(stop) + (len(stop) if include else 0)
            assert (outputs.text["0"], last.stop_reason) == (text[:end], stop)
            assert len(outputs.tokens["0"]) < len(ids) + 1
        else:
            assert (outputs.text["0"], last.stop_reason) == (text, None)

    def test_text_held_back_comes_when_max_tokens_is_reached(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = write(engine, monkeypatch, "the state")
        outputs = run(engine, [PROMPT], greedy(len(ids), stop=["state, which never comes"]))
        assert (outputs.text["0"], outputs.last["0"].finish_reason) == ("the state", FinishReason.LENGTH)

    def test_stop_token_ids(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = write(engine, monkeypatch, "the state buffer")
        outputs = run(engine, [PROMPT], greedy(20, stop_token_ids=[ids[-1]]))
        assert outputs.tokens["0"] == ids
        assert outputs.text["0"] == engine.tokenizer.decode(ids[:-1])
        assert (outputs.last["0"].finish_reason, outputs.last["0"].stop_reason) == (FinishReason.STOP, ids[-1])

    @pytest.mark.parametrize("min_tokens", [0, 1, 5])
    def test_min_tokens_puts_endings_off(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, min_tokens: int
    ) -> None:
        write(engine, monkeypatch, "")
        outputs = run(engine, [PROMPT], greedy(9, ignore_eos=False, min_tokens=min_tokens))
        assert len(outputs.tokens["0"]) == min_tokens + 1
        assert outputs.tokens["0"].index(EOS_TOKEN_ID) == min_tokens
        assert outputs.last["0"].finish_reason == FinishReason.STOP

    def test_logits_that_are_not_numbers_end_one_request_only(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batch = [PROMPT, [*PROMPT, 8], [*PROMPT, 8, 9]]
        expected = alone(engine, batch, greedy())

        def poison(inputs, logits: Tensor) -> None:
            # The middle request alone has this position at this step.
            positions = inputs.positions[inputs.logits_rows].tolist()
            if sorted(positions) == [5, 6, 7]:
                logits[positions.index(6), 77] = float("nan")

        watch_logits(engine, monkeypatch, poison)
        outputs = run(engine, batch, greedy())
        assert [outputs.tokens[i] for i in "02"] == [expected[0], expected[2]]
        assert outputs.tokens["1"] == expected[1][:3]
        assert outputs.last["1"].finish_reason == FinishReason.ABORT
        assert "NaN" in str(outputs.last["1"].stop_reason)


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "params", "param", "words"),
        [
            ([], greedy(), "prompt", "empty"),
            ([3] * MAX_LEN, greedy(1), "prompt", f"has {MAX_LEN} tokens.*shorten the prompt to {MAX_LEN - 1}"),
            ([3] * 100, greedy(29), "max_tokens", "max_tokens is 29.*ask for 28 or less"),
            ([3, VOCAB_SIZE], greedy(), "prompt", f"token id {VOCAB_SIZE} .*0 to {VOCAB_SIZE - 1}"),
            ([3, -1], greedy(), "prompt", "token id -1"),
            ([3], greedy(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids", str(VOCAB_SIZE)),
            ([3], greedy(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias", str(VOCAB_SIZE)),
        ],
    )
    def test_what_cannot_be_served_is_not_queued(
        self, engine: Engine, prompt: list[int], params: SamplingParams, param: str, words: str
    ) -> None:
        with pytest.raises(InvalidRequestError, match=words) as caught:
            engine.add_request("r", prompt, params)
        assert caught.value.param == param
        assert not engine.has_work()

    def test_an_id_in_use(self, engine: Engine) -> None:
        engine.add_request("r", PROMPT, greedy(2))
        with pytest.raises(InvalidRequestError, match="'r' is already running"):
            engine.add_request("r", PROMPT, greedy(2))
        assert len(drain(engine).tokens["r"]) == 2

    def test_the_longest_that_fits_is_served(self, engine: Engine) -> None:
        assert len(run(engine, [[3] * 100], greedy(28)).tokens["0"]) == 28


class TestSampling:
    def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(self, engine: Engine) -> None:
        batch = prompts(6)
        params = [SamplingParams(temperature=1.5, seed=i, max_tokens=12, ignore_eos=True) for i in range(6)]
        for i, prompt in enumerate(batch):
            engine.add_request(str(i), prompt, params[i])
        together = drain(engine)
        for i, prompt in enumerate(batch):
            assert run(engine, [prompt], params[i]).tokens["0"] == together.tokens[str(i)]
        other = SamplingParams(temperature=1.5, seed=99, max_tokens=12, ignore_eos=True)
        assert run(engine, batch[:1], other).tokens["0"] != together.tokens["0"]

    def test_logprobs_are_those_of_the_models_distribution(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows: list[Tensor] = []
        watch_logits(engine, monkeypatch, lambda inputs, logits: rows.append(logits[0].double().log_softmax(0)))
        engine.add_request("r", PROMPT, SamplingParams(temperature=2.0, seed=1, max_tokens=5, logprobs=3))
        entries = [entry for _ in range(5) for delta in engine.step() for entry in delta.logprobs or []]
        assert len(entries) == 5
        for entry, row in zip(entries, rows, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
            assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()

    def test_logprobs_are_absent_unless_asked_for(self, engine: Engine) -> None:
        assert run(engine, [PROMPT], greedy(2)).last["0"].logprobs is None
