"""What the benchmarks report: speeds from arrival times, summaries over rounds, and the accuracy gate."""

from __future__ import annotations

import random
from typing import Any

import pytest

from accuracy import TIE_MARGIN, gate, judge
from client import Completion
from metrics import decode_metrics, prefill_metrics, summarise


def completion(times: list[float], num_tokens: int | None = None, prompt: int = 4) -> Completion:
    return Completion(prompt, len(times) if num_tokens is None else num_tokens, times, end=times[-1])


def measured(number: int, system: str, **metrics: float | None) -> dict[str, Any]:
    return {"round": number, "system": system, "workload": "8 concurrent", "metrics": metrics}


def test_a_steady_request_has_its_rate_without_the_first_token() -> None:
    generator = random.Random()
    first, step, num_tokens = generator.uniform(0.1, 2), generator.uniform(0.01, 0.1), generator.randrange(5, 50)
    times = [first + i * step for i in range(num_tokens)]
    metrics = decode_metrics([completion(times)])
    assert metrics["ttft_s"] == pytest.approx(first)
    assert metrics["tpot_s"] == pytest.approx(step)
    assert metrics["decode_tps"] == pytest.approx(1 / step)
    assert metrics["output_tps"] == pytest.approx(num_tokens / times[-1])


def test_decode_speed_counts_only_the_time_in_which_all_requests_decode() -> None:
    early = completion([1.0, 2.0, 3.0, 4.0])
    late = completion([2.0, 3.0, 4.0, 5.0])
    metrics = decode_metrics([early, late])
    assert metrics["decode_tps"] == pytest.approx(4 / 2)  # tokens at 3 and 4, over the time from 2 to 4
    assert metrics["output_tps"] == pytest.approx(8 / 5)
    assert metrics["ttft_s"] == pytest.approx(1.5)


def test_pieces_of_several_tokens_count_as_that_many() -> None:
    assert decode_metrics([completion([1.0, 2.0, 3.0], num_tokens=6)])["decode_tps"] == pytest.approx(2.0)


def test_there_is_no_decode_speed_when_requests_ran_one_after_the_other() -> None:
    assert decode_metrics([completion([1.0, 2.0]), completion([3.0, 4.0])])["decode_tps"] is None


def test_prefill_speed_is_all_prompt_tokens_until_the_last_answer() -> None:
    batch = [completion([1.0], prompt=100), completion([4.0], prompt=300)]
    assert prefill_metrics(batch) == {"prefill_tps": pytest.approx(100.0)}


def test_ratios_pair_rounds_and_are_above_one_when_ours_is_better() -> None:
    rounds = [
        *(measured(i, "kvbuffer", output_tps=tps, ttft_s=0.5) for i, tps in enumerate([30.0, 10.0, 40.0])),
        *(measured(i, "other", output_tps=tps, ttft_s=1.0) for i, tps in enumerate([10.0, 10.0, 20.0])),
    ]
    summary = summarise(rounds, ours="kvbuffer")
    assert summary["medians"]["8 concurrent"]["kvbuffer"] == {"output_tps": 30.0, "ttft_s": 0.5}
    assert summary["ratios"] == {"8 concurrent": {"other": {"output_tps": 2.0, "ttft_s": 2.0}}}


def test_rounds_without_a_value_are_left_out_of_the_summary() -> None:
    rounds = [measured(0, "kvbuffer", decode_tps=None), measured(1, "kvbuffer", decode_tps=5.0)]
    rounds.append(measured(0, "other", decode_tps=1.0))
    summary = summarise(rounds, ours="kvbuffer")
    assert summary["medians"]["8 concurrent"] == {"kvbuffer": {"decode_tps": 5.0}, "other": {"decode_tps": 1.0}}
    assert summary["ratios"] == {}


def test_judging_tells_ties_from_wrong_tokens() -> None:
    scores = {"regret": [[0.0, TIE_MARGIN / 2], [0.0, 1.0]], "margin": [[2.0, TIE_MARGIN / 2], [2.0, 1.0]]}
    judged = judge([[1, 2], [3, 4]], [[1, 9], [3, 9]], scores)
    assert (judged["agreement"], judged["ties"], judged["wrong"]) == (0.5, 0.25, 0.25)
    assert judged["regret"] == pytest.approx((1.0 + TIE_MARGIN / 2) / 4)


@pytest.mark.parametrize(("output", "position"), [([1, 2, 3], 3), ([1, 2, 9], 2), ([9, 2, 3], 0)])
def test_first_divergence_is_where_the_outputs_part(output: list[int], position: int) -> None:
    scores = {"regret": [[0.0] * 3], "margin": [[1.0] * 3]}
    assert judge([output], [[1, 2, 3]], scores)["first_divergence"] == position


@pytest.mark.parametrize(
    ("wrong", "regret", "green"), [(0.02, 0.002, True), (0.04, 0.002, False), (0.02, 0.2, False), (0.0, 0.0, True)]
)
def test_the_gate_holds_us_to_the_worst_of_the_others(wrong: float, regret: float, green: bool) -> None:
    judged = {
        "kvbuffer": {"wrong": wrong, "regret": regret},
        "best": {"wrong": 0.0, "regret": 0.0},
        "worst": {"wrong": 0.02, "regret": 0.002},
    }
    verdict, reason = gate(judged, ours="kvbuffer")
    assert verdict is green
    assert reason.startswith("green" if green else "RED")


@pytest.mark.parametrize("systems", [[], ["kvbuffer"], ["other"]])
def test_the_gate_says_nothing_without_a_comparison(systems: list[str]) -> None:
    verdict, _ = gate({name: {"wrong": 0.0, "regret": 0.0} for name in systems}, ours="kvbuffer")
    assert verdict is None
