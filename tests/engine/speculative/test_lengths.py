"""The lengths of drafts follow what pays: a simulated machine and simulated texts."""

from __future__ import annotations

from itertools import takewhile
from random import Random

import pytest

from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.request import Request
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState
from kvbuffer.engine.speculative.lengths import DraftLengths

PARAMS = SamplingParams()
MOST = 6


def request(name: str) -> Request:
    state, detokenizer = SamplingState(PARAMS, [], []), IncrementalDetokenizer(None, PARAMS)  # type: ignore[arg-type]
    return Request(name, PARAMS, [1], 1, 1000, state, detokenizer)


class Simulation:
    """Requests whose tokens are accepted with given probabilities, on a machine of given costs.

    A step with drafts may cost a ``fixed`` time besides, however few they are. A drafter that has not been asked about
    a request in the last step takes ``wake`` seconds to prepare.

    Attributes:
        tokens: generated so far, by request.
        seconds: time that the steps took.
        drafted: tokens drafted so far, by request.
    """

    def __init__(
        self,
        acceptance: list[float],
        plain: float,
        per_token: float,
        found: float = 1.0,
        ask: float = 0.0,
        fixed: float = 0.0,
        wake: float = 0.0,
    ) -> None:
        self.acceptance, self.plain, self.per_token = acceptance, plain, per_token
        self.found, self.ask, self.fixed, self.wake = found, ask, fixed, wake
        self.awake: set[int] = set()
        self.lengths, self.random = DraftLengths(MOST), Random(1)
        self.requests = [request(str(i)) for i in range(len(acceptance))]
        self.tokens, self.drafted = [0] * len(acceptance), [0] * len(acceptance)
        self.seconds = 0.0

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def run_short(self, requests: int, steps: int) -> None:
        """Each time ``steps`` steps have been run, other requests take their place."""
        for _ in range(requests):
            self.run(steps)
            for ended in self.requests:
                self.lengths.forget(ended)
            self.requests = [request(ended.request_id) for ended in self.requests]

    def step(self) -> None:
        asked, total, gained = 0, 0, sum(self.tokens)
        chosen = self.lengths.choose(self.requests)
        wanted = {i for i, length in enumerate(chosen) if length}
        if self.wake and wanted - self.awake:
            self.lengths.observe_preparation(len(wanted - self.awake), self.wake * len(wanted - self.awake))
            self.seconds += self.wake * len(wanted - self.awake)
        self.awake = wanted
        for i, length in enumerate(chosen):
            self.tokens[i] += 1
            asked += length > 0
            if not length:
                continue
            if self.random.random() >= self.found:
                self.lengths.observe_nothing_found(self.requests[i])
                continue
            draws = (self.random.random() < self.acceptance[i] for _ in range(length))
            accepted = sum(takewhile(bool, draws))
            self.lengths.observe_draft(self.requests[i], length, accepted)
            self.tokens[i] += accepted
            self.drafted[i] += length
            total += length
        if asked and not total:
            self.lengths.observe_search(asked, asked * self.ask)
        noise = self.random.uniform(0.9, 1.1) * (5 if self.random.random() < 0.01 else 1)
        verified = self.plain + (self.fixed + self.per_token * total if total else 0.0)
        seconds = verified + (self.ask * asked if total else 0.0)
        accepted = sum(self.tokens) - gained - len(self.requests)
        self.lengths.observe_step(len(self.requests), total, accepted, seconds * noise)
        self.seconds += verified + self.ask * asked

    def speed(self, skip: int, steps: int) -> float:
        """Tokens per second in ``steps`` steps after the first ``skip``, with plain decoding as 1."""
        self.run(skip)
        tokens, seconds = sum(self.tokens), self.seconds
        self.run(steps)
        return (sum(self.tokens) - tokens) / (self.seconds - seconds) / (len(self.tokens) / self.plain)


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize(("acceptance", "per_token"), [(0.05, 0.5), (0.5, 1.2), (0.0, 0.2), (0.9, 2.0)])
def test_it_is_never_slower_by_more_than_two_per_cent(batch: int, acceptance: float, per_token: float) -> None:
    """``per_token`` is relative to what a request costs in a plain step: 1 is the worst that a machine can do."""
    simulation = Simulation([acceptance] * batch, plain=0.01, per_token=per_token * 0.01 / batch)
    assert simulation.speed(skip=50, steps=1000) > 0.98


@pytest.mark.parametrize("batch", [8, 32])
@pytest.mark.parametrize(("acceptance", "per_token"), [(0.7, 0.7), (0.9, 0.9), (0.9, 1.0)])
def test_nor_where_drafts_all_but_pay(batch: int, acceptance: float, per_token: float) -> None:
    """What noise makes look like a gain is a small loss, which adds up unless it is noticed."""
    simulation = Simulation([acceptance] * batch, plain=0.01, per_token=per_token * 0.01 / batch, fixed=0.0003)
    assert simulation.speed(skip=50, steps=1500) > 0.98


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_what_turns_out_to_be_useless_has_cost_little_from_the_start(batch: int) -> None:
    """Even if a step with drafts takes three times as long."""
    simulation = Simulation([0.0] * batch, plain=0.01, per_token=0.001 / batch, fixed=0.02)
    assert simulation.speed(skip=0, steps=500) > 0.98


@pytest.mark.parametrize("batch", [1, 32])
def test_a_drafter_that_searches_in_vain_is_hardly_asked(batch: int) -> None:
    simulation = Simulation([0.9] * batch, plain=0.01, per_token=0.0001, found=0.0, ask=0.001 / batch)
    assert simulation.speed(skip=200, steps=2000) > 0.98


@pytest.mark.parametrize(("batch", "acceptance", "plain", "fixed", "per_token", "best"), [
    (8, 0.9, 0.0127, 0.0067, 0.00059, 1.39), (32, 0.7, 0.0473, 0.0097, 0.00043, 1.22),
])  # fmt: skip
def test_what_drafts_cost_however_few_they_are_is_told_from_what_each_token_costs(
    batch: int, acceptance: float, plain: float, fixed: float, per_token: float, best: float
) -> None:
    """Or else a trial of one token says that longer drafts do not pay; ``best`` is what they would give."""
    simulation = Simulation([acceptance] * batch, plain=plain, per_token=per_token, fixed=fixed)
    assert simulation.speed(skip=100, steps=1000) > 1 + 0.7 * (best - 1)


@pytest.mark.parametrize(("batch", "plain", "fixed", "per_token", "best"), [
    (32, 0.0443, 0.0025, 0.0006, 1.141), (8, 0.0146, 0.0015, 0.00075, 1.138),
])  # fmt: skip
def test_luck_does_not_tell_requests_apart(
    batch: int, plain: float, fixed: float, per_token: float, best: float
) -> None:
    """All are accepted with 0.7: none is left without drafts. Costs are measured ones; ``best`` is one token each."""
    simulation = Simulation([0.7] * batch, plain=plain, per_token=per_token, fixed=fixed)
    assert simulation.speed(skip=100, steps=1000) > 1 + 0.7 * (best - 1)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_drafter_that_wakes_up_slowly_is_hardly_woken(batch: int) -> None:
    """Nor is that taken for what a draft costs: once awake, it drafts where that pays."""
    simulation = Simulation([0.1] * batch, plain=0.01, per_token=0.005 / batch, wake=0.01 / batch)
    assert simulation.speed(skip=200, steps=2000) > 0.98
    simulation.acceptance = [0.95] * batch
    assert simulation.speed(skip=4000, steps=1000) > 1.15


@pytest.mark.parametrize(("acceptance", "best"), [(0.5, 1.7), (0.7, 2.3), (0.9, 3.7)])
def test_where_drafts_cost_little_they_are_long(acceptance: float, best: float) -> None:
    """At 3 % of a step for each token; ``best`` is near what the best fixed length gives."""
    assert Simulation([acceptance], plain=0.01, per_token=0.0003).speed(skip=50, steps=2000) > 0.95 * best


def test_each_request_gets_what_pays_for_it() -> None:
    simulation = Simulation([0.9, 0.9, 0.1, 0.1], plain=0.01, per_token=0.0015)
    simulation.run(500)
    before = list(simulation.drafted)
    simulation.run(500)
    good, bad = (sum(simulation.drafted[i] - before[i] for i in which) for which in ((0, 1), (2, 3)))
    assert good > 20 * bad > 0


def test_a_text_that_becomes_predictable_is_noticed() -> None:
    simulation = Simulation([0.05], plain=0.01, per_token=0.003)
    simulation.run(1000)
    simulation.acceptance[0] = 0.95
    assert simulation.speed(skip=200, steps=500) > 1.5


def test_requests_that_end_before_a_try_is_due_are_followed_by_ones_that_are_tried() -> None:
    simulation = Simulation([0.05] * 8, plain=0.0107, per_token=0.0008, fixed=0.0045)
    simulation.run_short(requests=20, steps=40)
    simulation.acceptance = [0.95] * 8
    simulation.run_short(requests=20, steps=40)
    assert simulation.speed(skip=0, steps=400) > 1.1


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    simulation = Simulation([0.5] * 3, plain=0.01, per_token=0.001)
    simulation.run(20)
    for ended in simulation.requests:
        simulation.lengths.forget(ended)
    assert not simulation.lengths._histories


def test_a_search_that_something_else_held_up_stops_drafts_for_a_while_only() -> None:
    simulation = Simulation([0.9], plain=0.01, per_token=0.0003)
    simulation.run(50)
    simulation.lengths.observe_search(1, 5.0)
    before = sum(simulation.drafted)
    simulation.run(200)
    assert sum(simulation.drafted) > before + 100
