"""Prefix caching changes nothing but the time it takes: in float32, token for token, the outputs are those without it.

Everything here runs on memory whose free blocks are NaN at every step: what is shared, copied or folded a moment too
early or too late shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from kvbuffer import SamplingParams
from kvbuffer.cache.plan import PROMPT_TAIL, RING_SLACK
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import FinishReason, RequestOptions
from kvbuffer.models.layers import GatedAttention
from tests.support.caching import FORMS, MAX_LEN, Cold, drain, engine_with, greedy, recorded, run, step, text
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.plans import Outputs, check_idle, sized_engine


@pytest.fixture(scope="module")
def cold(tiny: Path) -> Cold:
    return Cold(sized_engine(tiny, max_model_len=MAX_LEN, enable_prefix_caching=False))


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"buffer_len={form[0]},kv_only_len={form[1]}")
def engine(request: pytest.FixtureRequest, tiny: Path) -> Engine:
    """An engine of ample memory for each form."""
    return engine_with(tiny, request.param, slots=48, pages=400)


class Covered(NamedTuple):
    """A text, and the lengths of its beginnings that a snapshot can be resumed at."""

    tokens: list[int]
    start: int
    end: int

    def reach(self, prompt: list[int]) -> int:
        """Return how many tokens of a prompt need not be computed thanks to this; the last one always is."""
        shared = 0
        for one, other in zip(self.tokens[: self.end], prompt[:-1], strict=False):
            if one != other:
                break
            shared += 1
        return shared if shared >= self.start else 0


def reach_of(snapshots: Iterable[Covered], prompt: list[int]) -> int:
    """Return the same for the best of some snapshots."""
    return max((covered.reach(prompt) for covered in snapshots), default=0)


def stored(engine: Engine) -> Iterator[Covered]:
    """Go through all snapshots."""
    assert engine._memory.prefixes is not None
    for tokens, _, _, snapshot in engine._memory.prefixes.snapshots():
        yield Covered(tokens, max(1, snapshot.start), snapshot.end)


def left_by_prompt(engine: Engine, prompt: list[int]) -> list[Covered]:
    """What a prompt leaves behind at its end and before its last tokens: each from its state on, as far back as the
    convolutions' inputs are kept.
    """
    left, length = [], len(prompt)
    for end in (length - PROMPT_TAIL, length):
        checkpoint = length - PROMPT_TAIL if engine.plan.starts_with_state(length) else 0
        kept = end - RING_SLACK if end > engine.plan.ring_len else 0
        if end > 0:
            left.append(Covered(prompt, max(1, checkpoint, kept), end))
    return left


@pytest.fixture(autouse=True)
def nothing_left_over(request: pytest.FixtureRequest) -> Iterator[None]:
    if "engine" not in request.fixturenames:
        yield
        return
    engine = request.getfixturevalue("engine")
    engine.reset_prefix_cache()
    yield
    for request_id in list(engine._requests):
        engine.abort_request(request_id)


class TestHitPositions:
    """A first request leaves its prefix; a second one shares exactly t tokens with it."""

    @pytest.mark.parametrize("length", [1, 9, 17, 25, 64, 65, 100])
    def test_around_every_border(self, engine: Engine, cold: Cold, length: int) -> None:
        first = text(length, length)
        output, cached = run(engine, first, greedy(7))
        assert cached == 0
        cold.check(first, output, 7)
        known, left = first + output[:-1], left_by_prompt(engine, first)
        shared = {*range(length - 6, len(known) + 1), *(border + d for border in (1, 16, 64) for d in (-1, 0, 1))}
        logits: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine._model, "forward", recorded(engine, logits))
            for t in sorted(t for t in shared if 0 <= t <= len(known)):
                # Ends of one token, of some that fit into a buffer or do not, and of more than a chunk.
                prompt = known[:t] + text(1000 + t, (1, 12, 40, 70)[(t + length) % 4])
                if t < len(known) and prompt[t] == known[t]:
                    prompt[t] = 3 if prompt[t] != 3 else 4
                reach = reach_of(stored(engine), prompt)
                assert reach >= reach_of(left, prompt)
                logits.clear()
                output, cached = run(engine, prompt, greedy(3))
                assert cached == reach, t
                cold.check(prompt, output, 3)
                expected = cold(prompt, 3)[2]
                assert (logits[0][0, :VOCAB_SIZE] - expected).abs().max() < 1e-4 * expected.abs().max(), t

    @pytest.mark.parametrize("length", [1, 2, 17, 24, 25, 64, 65, 100])
    def test_the_same_prompt_again(self, engine: Engine, cold: Cold, length: int) -> None:
        """One token is computed again, for its logits."""
        prompt = text(length, length)
        for turn in range(4):
            output, cached = run(engine, prompt, greedy(20))
            assert cached == (reach_of(left_by_prompt(engine, prompt), prompt) if turn else 0)
            cold.check(prompt, output, 20)

    @pytest.mark.parametrize("length", [20, 64, 69, 133, 150])
    def test_a_text_that_leaves_the_prompt_at_its_last_tokens(self, engine: Engine, cold: Cold, length: int) -> None:
        """As the next turn of a chat does where the template has opened thoughts; and another one after it."""
        prompt = text(length, length)
        run(engine, prompt, greedy(20))
        for shared in range(length - PROMPT_TAIL, length - 1):
            following = prompt[:shared] + text(shared, 30)
            output, cached = run(engine, following, greedy(20))
            assert cached >= length - PROMPT_TAIL
            cold.check(following, output, 20)

    def test_prompts_that_grow_by_a_token(self, engine: Engine, cold: Cold) -> None:
        prompt = text(5, 70)
        for length in range(1, 71):
            output, cached = run(engine, prompt[:length], greedy(1))
            assert cached == length - 1
            cold.check(prompt[:length], output, 1)


class TestConversations:
    @pytest.mark.parametrize("turn_lengths", [(1, 1, 1), (20, 5, 40), (63, 30, 2), (64, 64, 20), (100, 17, 16)])
    def test_turns_go_on_from_the_answers_before(
        self, engine: Engine, cold: Cold, turn_lengths: tuple[int, ...]
    ) -> None:
        history: list[int] = []
        for turn, length in enumerate(turn_lengths):
            prompt = history + text(77 + turn, length)
            output, cached = run(engine, prompt, greedy(15))
            # The last token of an answer is never computed.
            assert cached == max(0, len(history) - 1)
            cold.check(prompt, output, 15)
            history = prompt + output

    def test_an_answer_is_written_again(self, engine: Engine, cold: Cold) -> None:
        """At two turns of one conversation, each three times."""
        history: list[int] = []
        for turn in range(2):
            prompt = history + text(88 + turn, 30)
            for _ in range(3):
                output, _ = run(engine, prompt, greedy(25))
                cold.check(prompt, output, 25)
            history = prompt + output


class TestForks:
    @pytest.mark.parametrize("length", [1, 10, 24, 40, 64, 100])
    def test_requests_with_one_prompt_are_as_they_are_alone(self, engine: Engine, cold: Cold, length: int) -> None:
        """They share a state until their first folds, at temperatures of their own."""
        prompt = text(length, length)
        params = [SamplingParams(temperature=0.5 * i, seed=i, max_tokens=24, ignore_eos=True) for i in range(6)]
        alone = []
        for one in params:
            cold.engine.add_request("r", prompt, one)
            tokens: list[int] = []
            while cold.engine.has_work():
                tokens += [token for delta in cold.engine.step() for token in delta.token_ids]
            alone.append(tokens)
        outputs = Outputs()
        engine.add_request("0", prompt, params[0])
        step(engine, outputs)
        for i in range(1, 6):
            engine.add_request(str(i), prompt, params[i])
        step(engine, outputs)
        if length > 2:
            assert outputs.last["5"].num_cached_tokens == length - 1
            assert engine.stats.pools["slots"].used <= 2  # the first may have folded
        drain(engine, outputs)
        assert [outputs.tokens[str(i)] for i in range(6)] == alone

    def test_requests_that_begin_in_one_step(self, engine: Engine, cold: Cold) -> None:
        """None finds what the others compute; all leave it behind."""
        prompts = [text(3, 40) + text(i, i) for i in range(6)]
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, greedy(12))
        outputs = drain(engine)
        for i, prompt in enumerate(prompts):
            cold.check(prompt, outputs.tokens[str(i)], 12)
            again, _ = run(engine, prompt, greedy(12))
            cold.check(prompt, again, 12)


def family(seed: int) -> list[list[int]]:
    """Prompts of all lengths that share beginnings of all lengths."""
    trunk = text(seed, 120)
    cuts = [0, 1, 15, 16, 20, 33, 47, 48, 63, 64, 65, 90, 100, 120]
    return [trunk[:cut] + text(seed + i, (3, 22, 50)[i % 3]) for i, cut in enumerate(cuts)]


#: What is short, and the pools that it is about. A longest request needs 16 attention pages.
SHORTAGES = {
    "slots": {"num_slots": 2},
    "rings": {"num_rings": 3},
    "record_pages": {"num_record_pages": 5},
    "attention_pages": {"num_attention_pages": 18},
}


class TestShortages:
    @pytest.mark.parametrize("kind", SHORTAGES)
    def test_of_any_kind_change_no_token(self, tiny: Path, cold: Cold, kind: str) -> None:
        """Requests are preempted and prefixes evicted, with requests arriving all the time."""
        for form in FORMS[1::4]:
            few = engine_with(tiny, form, slots=24, pages=160, tokens=64, pools=SHORTAGES[kind])
            prompts = [prompt for seed in (100, 200) for prompt in family(seed)]
            outputs = Outputs()
            for i, prompt in enumerate(prompts):
                few.add_request(str(i), prompt, greedy(30))
                for _ in range(i % 3):
                    step(few, outputs)
            drain(few, outputs)
            for i, prompt in enumerate(prompts):
                cold.check(prompt, outputs.tokens[str(i)], 30)
            assert few._memory.prefixes.counters.evicted[kind] > 0
            if kind == "attention_pages":
                assert few.stats.num_preemptions > 0

    @pytest.mark.parametrize("form", FORMS[1::2])
    @pytest.mark.parametrize("room", [1.0, 2.5])
    def test_of_bytes_change_no_token(self, tiny: Path, cold: Cold, form: tuple[int, int], room: float) -> None:
        """All kinds share a budget for one longest request, or little more."""
        plan = engine_with(tiny, form).plan
        least = plan.block_bytes.of(plan.longest_request)
        few = engine_with(tiny, form, slots=99, pages=199, tokens=64, pools={"budget": int(room * least)})
        prompts, outputs = family(400), Outputs()
        for i, prompt in enumerate(prompts):
            few.add_request(str(i), prompt, greedy(30))
            for _ in range(i % 3):
                step(few, outputs)
        drain(few, outputs)
        for i, prompt in enumerate(prompts):
            cold.check(prompt, outputs.tokens[str(i)], 30)
        assert all(few._memory.prefixes.counters.evicted.values())
        assert few.stats.delays["memory"] > 0
        assert few.stats.resident_bytes <= few.plan.budget

    @pytest.mark.parametrize("form", FORMS)
    def test_of_everything_at_once(self, tiny: Path, cold: Cold, form: tuple[int, int]) -> None:
        """Memory for one longest request."""
        least = {"num_slots": 1, "num_rings": 2, "num_record_pages": 3, "num_attention_pages": 16}
        few = engine_with(tiny, form, tokens=64, pools=least)
        for i, prompt in enumerate(family(300)):
            few.add_request(str(i), prompt, greedy(20))
        outputs = drain(few)
        for i, prompt in enumerate(family(300)):
            cold.check(prompt, outputs.tokens[str(i)], 20)

    def test_preempted_requests_go_on_from_what_they_left(self, tiny: Path, cold: Cold) -> None:
        few = engine_with(tiny, (4, 24), slots=8, pages=18)
        for i in range(3):
            few.add_request(str(i), text(i, 60), greedy(100))
        outputs = drain(few)
        assert few.stats.num_preemptions > 0
        assert few._memory.prefixes.counters.hits > 0
        for i in range(3):
            cold.check(text(i, 60), outputs.tokens[str(i)], 100)


class TestSalts:
    def test_nothing_is_shared_between_salts(self, engine: Engine, cold: Cold) -> None:
        prompt = text(1, 70)
        for salt in (None, "a", "b"):
            output, cached = run(engine, prompt, greedy(10), cache_salt=salt)
            assert cached == 0
            cold.check(prompt, output, 10)
        for salt in (None, "a", "b"):
            output, cached = run(engine, prompt, greedy(10), cache_salt=salt)
            assert cached == 69
            cold.check(prompt, output, 10)


class TestWhatIsNotPublished:
    @pytest.mark.parametrize("bad_token", [0, 3])
    def test_logits_that_are_not_numbers(
        self, engine: Engine, cold: Cold, monkeypatch: pytest.MonkeyPatch, bad_token: int
    ) -> None:
        """A prompt's first token, or a later one: then the prompt alone is kept, which was sound."""
        prompt, count = text(2, 50), 0
        forward = engine._model.forward

        def spoiled(inputs, caches) -> Tensor:
            nonlocal count
            logits = forward(inputs, caches).clone()
            logits[:, 9] = float("nan") if count == bad_token else logits[:, 9]
            count += len(logits)
            return logits

        with monkeypatch.context() as patch:
            patch.setattr(engine._model, "forward", spoiled)
            engine.add_request("r", prompt, greedy(10))
            assert drain(engine).last["r"].finish_reason == FinishReason.ABORT
        assert {covered.end for covered in stored(engine)} == ({50 - PROMPT_TAIL, 50} if bad_token else set())
        output, cached = run(engine, prompt, greedy(10))
        assert cached == (49 if bad_token else 0)
        cold.check(prompt, output, 10)

    @pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
    def test_aborted_requests_leave_nothing_wrong(self, tiny: Path, engine: Engine, cold: Cold, steps: int) -> None:
        """In the middle of a prompt, which takes two steps here, and while decoding."""
        prompts = [text(4, 180), text(4, 100) + text(5, 40), text(4, 10)]
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, greedy(20))
        for _ in range(steps):
            step(engine, Outputs())
        for i in range(3):
            engine.abort_request(str(i))
            engine.check_integrity()
        check_idle(engine)
        for prompt in prompts:
            output, _ = run(engine, prompt, greedy(20))
            cold.check(prompt, output, 20)

    @pytest.mark.parametrize("failing_step", [0, 1, 5])
    def test_a_step_that_fails_half_way(
        self, engine: Engine, cold: Cold, monkeypatch: pytest.MonkeyPatch, failing_step: int
    ) -> None:
        """Some layers have moved on and some have not: no later request may go on from there."""
        prompt, outputs = text(6, 200), Outputs()
        engine.add_request("r", prompt, greedy(20))
        for _ in range(failing_step):
            step(engine, outputs)

        def fail(*arguments) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(engine._model, "_at_once", lambda caches: None)  # layer by layer
            patch.setattr(GatedAttention, "forward", fail)  # the second layer
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        engine.abort_request("r")
        check_idle(engine)
        assert not engine.has_work()
        output, _ = run(engine, prompt, greedy(20))
        cold.check(prompt, output, 20)


class TestPins:
    def test_a_pinned_prefix_is_kept_while_others_go(self, tiny: Path) -> None:
        engine = sized_engine(tiny, slots=8, pages=32)
        pinned = text(1, 60)
        engine.add_request("p", pinned, greedy(4), RequestOptions(cache_ttl_s=100))
        answer = drain(engine).tokens["p"]
        for i in range(2, 9):
            run(engine, text(i, 100), greedy(4))
        assert run(engine, pinned + answer, greedy(4))[1] == 63

    def test_pins_never_keep_a_request_from_running(self, tiny: Path) -> None:
        """A quarter of the pages is pinned, and the next request needs eight of the nine."""
        engine = sized_engine(tiny, slots=4, pages=9)
        engine.add_request("p", text(1, 20), greedy(4), RequestOptions(cache_ttl_s=100))
        drain(engine)
        assert len(run(engine, text(2, 100), greedy(28))[0]) == 28
