"""Who computes what in a step: the budget, chunk borders, fairness, admission, preemption. No model is needed."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.forms import FormPolicy, folds_due
from kvbuffer.engine.request import Request
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState
from kvbuffer.engine.scheduler import Scheduler, Segment
from kvbuffer.ops.batch import LinearForm
from kvbuffer.ops.cost import Bandwidth, Costs, LayerShape
from kvbuffer.ops.rule import GATED_DELTANET
from tests.support.plans import sized_plan

PARAMS = SamplingParams()
KV_ONLY_LEN = 24


def request(name: str, prompt_len: int, max_tokens: int = 8, text: str | None = None) -> Request:
    """A request whose prompt begins like that of no other, unless it has the same ``text``."""
    state, detokenizer = SamplingState(PARAMS, [], []), IncrementalDetokenizer(None, PARAMS)  # type: ignore[arg-type]
    prompt = [zlib.crc32((text or name).encode())] * prompt_len
    return Request(name, PARAMS, prompt, prompt_len, prompt_len + max_tokens, state, detokenizer)


def scheduler(
    slots: int = 8,
    pages: int = 1000,
    budget: int = 128,
    max_model_len: int = 512,
    buffer_len: int = 16,
    record_pages: int | None = None,
) -> Scheduler:
    plan = sized_plan(slots, pages, max_model_len, buffer_len=buffer_len, kv_only_len=KV_ONLY_LEN)
    if record_pages is not None:
        plan = dataclasses.replace(plan, num_record_pages=record_pages)
    layer = LayerShape(GATED_DELTANET, 2, 4, 16, 32)
    forms = FormPolicy(layer, Costs(Bandwidth(1e9, 1e9)), buffer_len, KV_ONLY_LEN, plan.max_num_seqs)
    return Scheduler(RequestMemory(plan), forms, budget)


def step(scheduler: Scheduler) -> list[Segment]:
    """Do what the engine does with a scheduled step, every request ending at its ``max_len``."""
    batch = scheduler.schedule()
    for segment in [batch[place] for place in scheduler.commit(batch)]:
        request = segment.request
        scheduler.publish(request, "prompt")
        request.token_ids.append(0)
        if len(request.token_ids) >= request.max_len:
            scheduler.finish(request)
    scheduler.memory.check_integrity()
    return batch


def steps(scheduler: Scheduler) -> Iterator[list[Segment]]:
    while scheduler.waiting or scheduler.running:
        batch = step(scheduler)
        assert batch, "no progress"
        yield batch


def shares(batch: list[Segment]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for segment in batch:
        counts[segment.request.request_id] += segment.num_tokens
    return dict(counts)


def forms(batch: list[Segment]) -> list[tuple[str, int, str]]:
    return [(s.request.request_id, s.num_tokens, s.form.name) for s in batch]


def idle(scheduler: Scheduler) -> bool:
    return all(pool.num_used == pool.num_idle for pool in scheduler.memory.pools[:4])


def test_an_idle_scheduler_schedules_nothing() -> None:
    assert scheduler().schedule() == []


def test_short_prompts_share_a_step() -> None:
    s = scheduler()
    for name in "abc":
        s.add(request(name, 20))
    assert shares(step(s)) == {"a": 20, "b": 20, "c": 20}
    assert shares(step(s)) == {"a": 1, "b": 1, "c": 1}


def test_a_long_prompt_is_split_at_chunk_borders() -> None:
    s = scheduler(budget=150)
    s.add(request("a", 300))
    assert [shares(batch)["a"] for batch in steps(s)][:3] == [128, 128, 44]


def test_decodes_come_first_and_prompts_take_what_is_left() -> None:
    s = scheduler(budget=128)
    for name in "abc":
        s.add(request(name, 5))
    step(s)
    s.add(request("long", 300))
    batch = step(s)
    assert shares(batch) == {"a": 1, "b": 1, "c": 1, "long": 64}
    assert forms(batch)[-1] == ("long", 64, "CHUNKED")


def test_decodes_go_on_behind_any_number_of_prompts() -> None:
    s = scheduler(slots=64, budget=128)
    s.add(request("first", 10, max_tokens=30))
    step(s)
    for i in range(50):
        s.add(request(f"r{i}", 200, max_tokens=1))
    for _ in range(29):
        assert shares(step(s))["first"] == 1
    assert all(r.request_id != "first" for r in s.running)


def test_prompts_are_served_in_order_of_arrival() -> None:
    s = scheduler(slots=2)
    for name in "abcd":
        s.add(request(name, 60, max_tokens=2))
    order = [name for batch in steps(s) for name, count in shares(batch).items() if count == 60]
    assert order == list("abcd")


def test_a_slot_that_is_missing_keeps_a_request_waiting() -> None:
    s = scheduler(slots=1)
    s.add(request("a", 30, max_tokens=2))
    s.add(request("b", 30))
    assert shares(step(s)) == {"a": 30}
    assert shares(step(s)) == {"a": 1}
    assert shares(step(s)) == {"b": 30}


def test_pages_for_the_whole_prompt_are_taken_at_once() -> None:
    s = scheduler(pages=20, budget=64)
    s.add(request("a", 300))  # 19 pages, though only 64 tokens are computed now
    s.add(request("b", 17))
    step(s)
    assert s.memory.pools.attention_pages.num_used == 19
    assert [r.request_id for r in s.waiting] == ["b"]


def test_a_large_request_is_not_overtaken() -> None:
    """Else small ones could keep it waiting for ever."""
    s = scheduler(pages=32)
    s.add(request("a", 100))
    step(s)
    s.add(request("large", 480))
    s.add(request("small", 5))
    assert shares(step(s)) == {"a": 1}


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    s = scheduler(pages=2)
    for name in "abc":
        s.add(request(name, 16, max_tokens=10))
    assert shares(step(s)) == {"a": 16, "b": 16}
    assert shares(step(s)) == {"a": 1}  # its second page was b's first
    assert s.num_preemptions == 1
    assert [(r.request_id, r.num_computed_tokens, len(r.token_ids)) for r in s.waiting] == [("b", 0, 17), ("c", 0, 16)]
    prompts = [name for batch in steps(s) for name, count in shares(batch).items() if count > 1]
    assert prompts[0] == "b"


def test_a_preempted_request_computes_all_its_tokens_again() -> None:
    s = scheduler(pages=4)
    b = request("b", 14, max_tokens=30)
    s.add(request("a", 16, max_tokens=40))
    s.add(b)
    again = []
    for batch in steps(s):
        again += [count for name, count in shares(batch).items() if name == "b" and count > 1]
    assert again[0] == 14
    assert again[1] > 14
    assert len(b.token_ids) == 44


def test_where_record_pages_run_short_the_longest_records_are_folded_for_a_newcomer() -> None:
    s = scheduler()
    s.memory = RequestMemory(dataclasses.replace(s.memory.plan, num_record_pages=7))
    s.add(request("long", 20))
    s.add(request("short", 10))
    step(s)
    s.add(request("newcomer", 17))
    assert shares(step(s)) == {"long": 1, "short": 1, "newcomer": 17}
    rows = {r.request_id: r.row for r in s.running}
    assert {name: s.memory.slot[row] >= 0 for name, row in rows.items()} == {
        "long": True, "short": False, "newcomer": False
    }  # fmt: skip
    assert s.memory.fill[rows["long"]] == 1
    assert s.num_preemptions == 0
    for _ in steps(s):
        pass


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding", "preempted"])
def test_finishing_frees_everything_at_any_moment(state: str) -> None:
    s = scheduler(pages=13, budget=64)
    victim = request("victim", 100 if state == "prefilling" else 64)
    if state == "preempted":
        s.add(request("older", 127, max_tokens=40))
        for _ in range(2):
            step(s)
    s.add(victim)
    if state != "waiting":
        step(s)
    if state in ("decoding", "preempted"):
        step(s)
    while state == "preempted" and victim.row is not None:
        step(s)
    assert (victim.row is None) == (state in ("waiting", "preempted"))
    if victim.row is not None:
        assert victim.is_prefilling == (state == "prefilling")
    s.finish(victim)
    assert victim.row is None
    s.memory.check_integrity()
    for _ in steps(s):
        pass
    assert idle(s)


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 5),
    extra_pages=st.integers(0, 8),
    budget=st.integers(64, 200),
    lengths=st.lists(st.tuples(st.integers(1, 119), st.integers(1, 9), st.integers(0, 6)), min_size=1, max_size=12),
)
def test_every_request_ends_within_budget(slots: int, extra_pages: int, budget: int, lengths) -> None:
    """However tight memory is: 8 pages are one longest request's."""
    s = scheduler(slots, 8 + extra_pages, budget, max_model_len=128)
    arrivals = [(request(str(i), p, m), wait) for i, (p, m, wait) in enumerate(lengths)]
    pending = list(arrivals)
    for _ in range(2000):
        while pending and pending[0][1] <= 0:
            s.add(pending.pop(0)[0])
        pending = [(r, wait - 1) for r, wait in pending]
        decoding = [r for r in s.running if not r.is_prefilling]
        batch = step(s)
        # Over the budget only by letting one chunk in beside the requests that decode.
        assert sum(segment.num_tokens for segment in batch) <= max(budget, len(decoding) + 64)
        assert [segment.form for segment in batch] == sorted(segment.form for segment in batch)
        for segment in batch:
            assert (segment.request in decoding) == (segment.form in (LinearForm.RECURRENT, LinearForm.BUFFERED))
        assert all(r in [b.request for b in batch] or r.row is None for r in decoding)
        if not (pending or s.running or s.waiting):
            break
    assert [len(r.token_ids) for r, _ in arrivals] == [r.max_len for r, _ in arrivals]
    assert idle(s)


def test_a_long_prompt_never_starves_behind_decodes() -> None:
    """A budget of one chunk, already shared with a request that decodes, still lets the prompt's next chunk in."""
    s = scheduler(budget=64)
    s.add(request("decoding", 10, 100))
    step(s)
    s.add(request("long", 200, 1))
    counts = [shares(step(s)) for _ in range(4)]
    assert [c["decoding"] for c in counts] == [1, 1, 1, 1]
    assert [c["long"] for c in counts] == [64, 64, 64, 8]


def test_a_prompt_never_stops_half_way_for_want_of_record_pages() -> None:
    """The last 20 tokens of the first prompt would fit into its buffer, whose other pages the others hold."""
    s = scheduler(slots=3, budget=80, record_pages=7)
    s.add(request("a", 84, max_tokens=2))
    s.add(request("b", 24, max_tokens=2))
    s.add(request("c", 24, max_tokens=2))
    assert forms(step(s)) == [("a", 64, "CHUNKED"), ("b", 16, "APPENDED")]
    assert s.memory.pools.record_pages.num_free == 0
    assert forms(step(s))[:2] == [("a", 15, "CHUNKED"), ("a", 5, "APPENDED")]
    assert sum(len(batch) for batch in steps(s)) > 0


class TestForms:
    def test_the_end_of_a_prompt_goes_into_the_buffer(self) -> None:
        """So that the state before it stays at hand."""
        s = scheduler()
        s.add(request("a", 100))
        assert forms(step(s)) == [("a", 95, "CHUNKED"), ("a", 5, "APPENDED")]

    @pytest.mark.parametrize("length", [1, KV_ONLY_LEN])
    def test_a_short_prompt_is_only_records(self, length: int) -> None:
        s = scheduler()
        s.add(request("a", length))
        assert forms(step(s)) == [("a", length, "APPENDED")]
        assert s.memory.pools.slots.num_used == 0

    @pytest.mark.parametrize(
        ("length", "kept"),
        [
            (5, [0]),
            (6, [1]),
            (20, [15]),  # without a state
            (100, [95, 0]),
            (133, [128, 0]),  # the last tokens are in the next step
            (200, [0, 67, 0]),
        ],
    )
    def test_what_convolutions_need_before_the_end_of_a_prompt_is_kept(self, length: int, kept: list[int]) -> None:
        s = scheduler(budget=128)
        s.add(request("a", length))
        segments: list[Segment] = []
        while sum(segment.num_tokens for segment in segments) < length:
            segments += step(s)
        assert [segment.kept for segment in segments] == kept
        ends = [snapshot.end for _, _, _, snapshot in s.memory.prefixes.snapshots()]  # type: ignore[union-attr]
        assert ends.count(length) == 1
        assert ends.count(length - 5) == (length > 5)

    def test_a_budget_that_ends_before_the_prompt_leaves_its_end_to_the_next_step(self) -> None:
        s = scheduler(budget=100)
        s.add(request("a", 110))
        assert forms(step(s)) == [("a", 64, "CHUNKED")]
        assert forms(step(s)) == [("a", 41, "CHUNKED"), ("a", 5, "APPENDED")]

    def test_the_same_prompt_again_computes_one_token(self) -> None:
        s = scheduler()
        s.add(request("a", 100, text="same"))
        step(s)
        s.add(request("b", 100, text="same"))
        assert forms(step(s)) == [("a", 1, "BUFFERED"), ("b", 1, "APPENDED")]
        assert s.running[1].num_cached_tokens == 99

    def test_buffer_length_0_is_the_recurrence(self) -> None:
        s = scheduler()
        s.forms.buffer_len = lambda batch: 0  # type: ignore[method-assign]
        s.add(request("a", 40, max_tokens=4))
        step(s)
        assert [forms(batch) for batch in steps(s)] == [[("a", 1, "RECURRENT")]] * 3

    def test_requests_that_began_together_fold_one_after_the_other(self) -> None:
        s = scheduler(slots=32, budget=512)
        for i in range(8):
            s.add(request(f"r{i}", 17, max_tokens=80))
        folds, previous = [], 0
        for _ in steps(s):
            folds.append(s.num_folds - previous)
            previous = s.num_folds
        assert max(folds) == 1
        assert sum(folds) >= 8 * 4

    def test_buffers_are_longer_only_where_drafts_are_verified(self) -> None:
        """What speculation leaves alone is computed as if there were none."""
        layer, costs = LayerShape(GATED_DELTANET, 2, 4, 16, 32), Costs(Bandwidth(1e9, 1e9))
        seen = []
        for speculative in (False, True):
            s = scheduler(buffer_len=16)
            s.forms = FormPolicy(layer, costs, None, 0, 8, speculative)
            s.add(request("a", 40, max_tokens=40))
            seen.append([(forms(batch), s.num_folds) for batch in steps(s)])
        assert seen[0] == seen[1]
        assert s.forms.buffer_len(1) < s.forms.verify_len(1) == s.forms.longest_buffer == 16
        assert s.num_folds > 40 // 16 + 1


def test_folds_due_are_the_most_overdue_and_keep_pace() -> None:
    def due(*overdue: int) -> set[int]:
        return folds_due(np.array(overdue, np.int32), len(overdue) / 4)

    assert due() == set()
    assert due(-1, -2) == set()
    assert due(0, 3, 1) == {1}
    assert due(*[5] * 9) == {0, 1, 2}
    assert folds_due(np.array([5] * 9, np.int32), (9 + 8) / 4) == {0, 1, 2, 3, 4}  # with drafts
