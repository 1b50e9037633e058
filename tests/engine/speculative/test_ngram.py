"""Prompt lookup."""

from __future__ import annotations

from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.request import Request
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState
from kvbuffer.engine.speculative.ngram import NgramDrafter

PARAMS = SamplingParams()


def request(tokens: list[int], name: str = "r") -> Request:
    state, detokenizer = SamplingState(PARAMS, [], []), IncrementalDetokenizer(None, PARAMS)  # type: ignore[arg-type]
    return Request(name, PARAMS, tokens, len(tokens), 100, state, detokenizer)


def proposal(tokens: list[int], limit: int = 3, low: int = 2, high: int = 4) -> list[int]:
    (draft,) = NgramDrafter(low, high).propose([request(tokens)], [limit])
    assert draft.parents is None
    return draft.token_ids


def test_what_followed_the_last_tokens_before_is_proposed() -> None:
    assert proposal([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5]


def test_the_longest_ngram_wins() -> None:
    assert proposal([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], limit=1) == [3]


def test_of_equals_the_latest_wins() -> None:
    assert proposal([1, 2, 3, 1, 2, 4, 1, 2], limit=1) == [4]


def test_a_period_goes_on() -> None:
    assert proposal([5, 5, 5], limit=4) == [5, 5, 5, 5]
    assert proposal([9, 1, 2, 3, 1, 2, 3], limit=7) == [1, 2, 3, 1, 2, 3, 1]


def test_a_match_that_is_too_short_is_none() -> None:
    assert proposal([1, 2, 3, 9, 2]) == []
    assert proposal([1, 2, 3, 9, 2], low=1) == [3, 9, 2]


def test_nothing_is_proposed_for_a_text_without_repetition() -> None:
    assert proposal([1, 2, 3, 4]) == []
    assert proposal([1]) == []


def test_a_text_is_followed_as_it_grows() -> None:
    drafter, growing = NgramDrafter(2, 3), request([1, 2, 3])
    assert drafter.propose([growing], [2])[0].token_ids == []
    for token in (7, 1, 2):
        growing.token_ids.append(token)
    other = request([4, 5, 6, 4, 5], "other")
    assert [d.token_ids for d in drafter.propose([growing, other], [2, 1])] == [[3, 7], [6]]


def test_a_request_that_ended_is_forgotten() -> None:
    drafter = NgramDrafter(1, 2)
    drafter.propose([request([1, 2, 1])], [2])
    drafter.forget(request([1]), True)
    assert drafter.propose([request([3, 4, 5, 3])], [2])[0].token_ids == [4, 5]
