"""How many tokens are drafted for each request: as many as pay, by what was accepted and what steps cost lately.

The drafter is asked for k_i tokens for request i, and has any with probability q_i. A step of B requests then takes
``a_B``, or ``a_B + f_B + b_B * sum(q_i * k_i)`` if anything is drafted, and brings
``B + sum(q_i * (p_i + p_i^2 + … + p_i^k_i))`` tokens, if a token is accepted with probability p_i. The lengths that
bring the most tokens per second are found by adding tokens in the order of p_i^j. All of a, f, b, p_i and q_i are
measured while serving; what has not paid is tried again, so rarely that it costs little.

Estimates may be wrong, so an account is kept of the time that steps with drafts took beyond what their tokens would
have taken without. Nothing is drafted while it stands at more than a hundredth of the time: that much can be lost, and
a few steps' time, whatever the machine and the texts are like.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvbuffer.engine.request import Request

#: What is measured anew counts for this much of an average.
_STEP_SHARE, _TRIAL_SHARE = 0.1, 0.1
#: Acceptance that requests are taken to have before anything is known.
_FIRST_GUESS = 0.6
#: What is known of all requests counts for as much as this many tokens of a request's own.
_PRIOR_TRIALS = 10
#: Steps that are averaged before any one of them is called disturbed; plain ones come before the first with drafts.
_LEAST_STEPS = 3
#: Gains below this are not worth the risk that they are noise.
_LEAST_GAIN = 0.02
#: Share of the time that may be lost by trying drafts of one token again where they did not pay.
_TRY_SHARE = 0.005
#: Share of the time that drafts may lose in all, and how many plain steps' time they may lose of what they have won.
_RISK_SHARE, _RISK_STEPS = 0.01, 4
#: Where they do pay, a step goes without after so many at most, so that it is known what that costs: as many as leave
#: this share of what drafts bring, so that the less they bring, the better it is known.
_PLAIN_INTERVAL, _PLAIN_SHARE = 64, 0.01
#: Standard deviation of what drafts cost however few they are, to a plain step, before any have been verified.
_FIRST_DOUBT = 0.3
#: A step that takes longer or shorter than expected by more standard deviations than this says no more for that.
_MOST_SURPRISE = 2.0
#: By how much what a draft token costs may change from one step to the next, relatively, with and without drafts.
_DRIFT = 0.05
#: Draft tokens of a request while it is not known what they cost.
_FIRST_LENGTH = 2
#: A step that took longer than this many times the usual was disturbed by something else.
_DISTURBED = 2.0


@dataclass
class _StepCost:
    """Seconds of steps of about the same number of requests: ``plain``, and ``fixed + per_token * tokens`` for drafts.

    These two are followed by a Kalman filter: the more tokens a step drafts, the more it says about the second.
    """

    num_plain: int = 0
    num_drafted: int = 0
    steps_since_plain: int = 0
    plain: float = 0.0
    fixed: float = 0.0
    per_token: float = 0.0
    _noise: float = 0.0  # variance of the time of plain steps
    _doubt: tuple[float, float, float] = (0.0, 0.0, 0.0)  # variances of fixed and per_token, covariance

    def drafted(self, num_draft_tokens: float) -> float:
        """Return the expected seconds of a step with drafts."""
        return self.plain + self.fixed + self.per_token * num_draft_tokens

    def undisturbed(self, num_draft_tokens: int, seconds: float) -> float:
        """Return the seconds of a step, cut to what it may have taken by itself."""
        if (self.num_drafted if num_draft_tokens else self.num_plain) < _LEAST_STEPS:
            return seconds
        return min(seconds, _DISTURBED * (self.drafted(num_draft_tokens) if num_draft_tokens else self.plain))

    def observe(self, num_draft_tokens: int, seconds: float) -> None:
        fixed, per_token, both = self._doubt
        self._doubt = fixed + (_DRIFT * self.fixed) ** 2, per_token + (_DRIFT * self.per_token) ** 2, both
        if num_draft_tokens:
            self._observe_drafted(num_draft_tokens, seconds)
            return
        self.num_plain += 1
        self.steps_since_plain = 0
        share = max(_STEP_SHARE, 1 / self.num_plain)
        deviation = seconds - self.plain
        self.plain += share * deviation
        if self.num_plain > 1:
            self._noise += share * (deviation**2 - self._noise)

    def _observe_drafted(self, num_draft_tokens: int, seconds: float) -> None:
        if not self.num_drafted:
            self._doubt = (_FIRST_DOUBT * self.plain) ** 2, self.plain**2, 0.0
        self.num_drafted += 1
        self.steps_since_plain += 1
        fixed, per_token, both = self._doubt
        # Of the difference to what was expected, how much each varies with it. The model is not quite right, either.
        for_fixed, for_token = fixed + both * num_draft_tokens, both + per_token * num_draft_tokens
        noise = self._noise + (_DRIFT * self.plain) ** 2
        variance = for_fixed + for_token * num_draft_tokens + noise
        most = _MOST_SURPRISE * math.sqrt(variance)
        surprise = max(-most, min(seconds - self.drafted(num_draft_tokens), most)) / variance
        self.fixed = max(0.0, self.fixed + for_fixed * surprise)
        self.per_token = max(0.0, self.per_token + for_token * surprise)
        both -= for_fixed * for_token / variance
        self._doubt = fixed - for_fixed**2 / variance, per_token - for_token**2 / variance, both


@dataclass
class _History:
    """What became of a request's drafts.

    Attributes:
        acceptance: p, how often a token was accepted whose predecessors were.
        tried: the step in which drafts that do not seem to pay were last tried; tokens accepted since put it back.
        found: q, how often the drafter had anything to propose.
    """

    acceptance: float
    tried: float
    found: float = 1.0
    _trials: float = 0.0
    _accepted: float = 0.0

    def observe(self, accepted: float, usual: float) -> None:
        """Take note of whether a token was accepted, where all requests' tokens are with a probability of ``usual``.

        A few tokens say little: by themselves they would leave requests that were unlucky without drafts, and those
        that were lucky with long ones.
        """
        self._trials += 1.0 - _TRIAL_SHARE * self._trials
        self._accepted += accepted - _TRIAL_SHARE * self._accepted
        self.acceptance = (self._accepted + _PRIOR_TRIALS * usual) / (self._trials + _PRIOR_TRIALS)


@dataclass
class DraftLengths:
    """Chooses the lengths of drafts.

    Attributes:
        most: most tokens of a draft.
    """

    most: int
    _costs: dict[int, _StepCost] = field(default_factory=dict)
    _histories: dict[Request, _History] = field(default_factory=dict)
    _acceptance: float = _FIRST_GUESS
    _ask_seconds: float = 0.0
    _preparation: float = 0.0  # seconds that a request takes of the drafter which it has not drafted for lately
    _plain: float = 0.0  # seconds of a step without drafts, for the requests that lengths were last chosen for
    _lost: float = 0.0  # seconds lost by drafting, less those that may be
    _step: int = 0
    _tried: int = 0  # the step in which drafts that do not seem to pay were last tried for any request
    _resting: list[Request] = field(default_factory=list)
    _rest_end: float = 0.0

    def choose(self, requests: Sequence[Request]) -> list[int]:
        """Return how many tokens to draft for each of the requests that decode in a step."""
        if not requests:
            return []
        self._step += 1
        if self._step <= self._rest_end and requests == self._resting:
            return [0] * len(requests)
        if self._lost > 0.0:
            return [0] * len(requests)
        cost = self._cost(len(requests))
        if cost.num_plain < _LEAST_STEPS:
            return [0] * len(requests)
        self._plain = cost.plain
        histories = [self._history(request) for request in requests]
        lengths, gain = self._best_lengths(histories, cost)
        if cost.steps_since_plain > min(_PLAIN_INTERVAL, gain / _PLAIN_SHARE):
            return [0] * len(requests)
        if not cost.num_drafted:
            return [min(length, _FIRST_LENGTH) for length in lengths]
        # What a try loses: what it costs beyond what its tokens are expected to be worth. So many steps may lose that.
        cost_of_one = cost.per_token + self._ask_seconds + self._preparation
        worth = cost.plain / (len(requests) * (1.0 + gain))  # seconds that a token takes otherwise
        idle = [history for history, length in zip(histories, lengths, strict=True) if not length]
        lost = sum(max(0.0, cost_of_one - history.acceptance * worth) for history in idle)
        interval = (lost + (0.0 if any(lengths) else cost.fixed)) / (_TRY_SHARE * cost.plain)
        oldest = min((history.tried for history in idle), default=0.0)
        # Together they cost less: those who will soon be tried again are tried with those whose turn it is.
        for i, history in enumerate(histories):
            if not lengths[i] and self._step > max(oldest + interval, history.tried + interval / 2):
                lengths[i] = 1
                self._tried = self._step
            if lengths[i]:
                history.tried = self._step
        if not any(lengths):
            # Nothing is learned until the first of them is tried again, and nothing has to be worked out.
            self._resting = list(requests)
            self._rest_end = min(history.tried for history in histories) + interval
        return lengths

    def _best_lengths(self, histories: Sequence[_History], cost: _StepCost) -> tuple[list[int], float]:
        """Return the lengths with the highest rate of tokens, none if that is hardly more than without drafts.

        And by how much, relatively, the rate is higher.
        """
        count = len(histories)
        tokens, seconds = float(count), cost.drafted(0) + self._ask_seconds * count
        lengths, brings = [0] * count, [0.0] * count
        likeliest = [(-history.acceptance, i) for i, history in enumerate(histories)]
        heapq.heapify(likeliest)
        # Later tokens are less likely: the rate has its maximum where the next one brings less than it.
        while likeliest and -likeliest[0][0] * seconds > tokens * cost.per_token:
            share, i = -likeliest[0][0], likeliest[0][1]
            history = histories[i]
            lengths[i] += 1
            brings[i] += share
            tokens += history.found * share
            seconds += history.found * cost.per_token
            if lengths[i] < self.most:
                heapq.heapreplace(likeliest, (-share * history.acceptance, i))
            else:
                heapq.heappop(likeliest)
        rate = tokens / seconds
        gain = rate * cost.plain / count - 1.0
        if gain < _LEAST_GAIN:
            return [0] * count, 0.0
        worth_asking = (
            history.found * brought > rate * self._ask_seconds
            for history, brought in zip(histories, brings, strict=True)
        )
        return [length * worth for length, worth in zip(lengths, worth_asking, strict=True)], gain

    def observe_draft(self, request: Request, depth: int, num_accepted: int) -> None:
        """Take note of how a draft fared, ``depth`` tokens along its longest path."""
        history = self._history(request)
        history.found += _TRIAL_SHARE * (1.0 - history.found)
        history.tried -= num_accepted / _TRY_SHARE
        for trial in range(min(depth, num_accepted + 1)):
            accepted = float(trial < num_accepted)
            history.observe(accepted, self._acceptance)
            self._acceptance += _TRIAL_SHARE**2 * (accepted - self._acceptance)

    def observe_step(self, num_requests: int, num_draft_tokens: int, num_accepted: int, seconds: float) -> None:
        """Take note of a step in which nothing but ``num_requests`` requests decoded."""
        cost = self._cost(num_requests)
        seconds = cost.undisturbed(num_draft_tokens, seconds)
        if num_draft_tokens:
            self._lost += seconds - cost.plain * (1 + num_accepted / num_requests)
        cost.observe(num_draft_tokens, seconds)
        self._lost = max(self._lost - _RISK_SHARE * cost.plain, -_RISK_STEPS * cost.plain)

    def observe_nothing_found(self, request: Request) -> None:
        """Take note that the drafter had nothing to propose."""
        history = self._history(request)
        history.found -= _TRIAL_SHARE * history.found

    def observe_search(self, num_requests: int, seconds: float) -> None:
        """Take note of the time in which the drafter found nothing for any of ``num_requests`` requests."""
        seconds = min(seconds, self._plain)  # what takes longer than a step was disturbed by something else
        self._ask_seconds += _STEP_SHARE * (seconds / num_requests - self._ask_seconds)
        self._lost += seconds

    def observe_preparation(self, num_requests: int, seconds: float) -> None:
        """Take note of the time in which the drafter prepared for requests that it had not drafted for lately."""
        seconds = min(seconds, self._plain * num_requests)
        share = _TRIAL_SHARE if self._preparation else 1.0
        self._preparation += share * (seconds / num_requests - self._preparation)
        self._lost += seconds

    def forget(self, request: Request) -> None:
        """Drop the history of a request that has ended."""
        self._histories.pop(request, None)

    def _history(self, request: Request) -> _History:
        if request not in self._histories:
            # It waits no longer for a try than those before it: they may all end before their turn.
            self._histories[request] = _History(self._acceptance, self._tried)
        return self._histories[request]

    def _cost(self, num_requests: int) -> _StepCost:
        # Steps of about the same size: two sizes to a doubling.
        return self._costs.setdefault(round(2 * math.log2(num_requests)), _StepCost())
