"""How the overload benchmark judges: shares, growth, and what counts as a correct answer or a clean error."""

from __future__ import annotations

import random

import pytest

from overload import DEMAND, client_table, finished_per_second, growth_of, judge, longest_silence, max_min_shares
from overload_load import Outcome, Prompt, make_prompts

CLEAN = {"type": "rate_limit_error", "message": "the queue is full (max_queue_len is 3)"}
EXPECTED = [[1, 2, 3], [4, 5]]


def outcome(**fields: object) -> Outcome:
    return Outcome(**{"client": "light", "prompt": 0, "sent": 0.0, "status": 200, "token_ids": [1, 2, 3], **fields})


@pytest.mark.parametrize(
    ("demand", "shares"),
    [
        ((1.0, 1.0, 1.0, 1.0), (0.25, 0.25, 0.25, 0.25)),
        ((2.4, 1.0, 0.4, 0.1), (0.3, 0.3, 0.3, 0.1)),
        ((0.1, 0.2, 0.1, 0.1), (0.1, 0.2, 0.1, 0.1)),
    ],
)
def test_nobody_gets_more_than_asked_for_and_the_rest_is_shared_equally(demand: tuple, shares: tuple) -> None:
    assert max_min_shares(dict(zip("abcd", demand, strict=True)), 1.0) == pytest.approx(
        dict(zip("abcd", shares, strict=True))
    )


def test_growth_is_that_of_the_trend() -> None:
    noise = random.Random(0)
    assert growth_of([100 + i + noise.uniform(-1, 1) for i in range(101)]) == pytest.approx(100, rel=0.02)
    assert growth_of([5.0]) == 0


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "ok"),
        ({"token_ids": [1, 2]}, "wrong"),
        ({"token_ids": [1, 2, 4]}, "wrong"),
        ({"token_ids": [1], "cancelled": True, "status": 0}, "cancelled"),
        ({"token_ids": [2], "cancelled": True, "status": 0}, "wrong"),
        ({"token_ids": [], "status": 429, "error": CLEAN, "retry_after": "3"}, "refused"),
        ({"token_ids": [], "status": 429, "error": CLEAN}, "wrong"),
        ({"token_ids": [], "status": 500, "error": {"type": "server_error", "message": ""}}, "wrong"),
        ({"token_ids": [], "status": 0, "error": "ConnectionResetError"}, "wrong"),
    ],
)
def test_every_outcome_is_judged(fields: dict, kind: str) -> None:
    counts, faults = judge([outcome(**fields)], EXPECTED)
    assert counts == {kind: 1}
    assert len(faults) == (kind == "wrong")


def test_the_rate_counts_whole_answers_between_the_warm_up_and_the_end() -> None:
    ends = [0.5, 1.5, 5.0, 9.5, 10.5]
    outcomes = [outcome(end=end) for end in ends] + [outcome(end=5.0, status=429), outcome(end=5.0, status=0)]
    assert finished_per_second(outcomes, start=0.0, seconds=10.0) == pytest.approx(3 / 9)


def test_silence_is_the_time_without_any_sign_of_life() -> None:
    outcomes = [outcome(first=1.0, end=2.0), outcome(first=1.5, end=7.0), outcome(first=4.0, end=4.5)]
    assert longest_silence(outcomes) == 2.5
    assert longest_silence([]) == 0


def test_shares_count_computed_tokens_within_the_window() -> None:
    prompts = [Prompt([7] * 10, 3)]
    late = outcome(client="heavy", sent=0.5, first=3.0, end=9.0)
    outcomes = [outcome(client=name, sent=1.0, first=2.0, end=3.0, cached_tokens=4) for name in DEMAND] + [late]
    rows = client_table(outcomes, prompts, start=1.0, end=5.0)
    assert all(row["served"] == 10 - 4 + 2 * 3 for row in rows.values())
    assert all(row["sent"] == 1 and row["ttft_s"] == 1.0 for row in rows.values())
    assert all(row["of_fair_share"] == pytest.approx(1.0, abs=0.1) for row in rows.values())


def test_prompts_are_mixed_and_reproducible() -> None:
    prompts = make_prompts("seed", 60, 4096)
    assert prompts == make_prompts("seed", 60, 4096)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    assert min(lengths) < 64
    assert max(lengths) > 600
    assert max(lengths) + 128 <= 2048
