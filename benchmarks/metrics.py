"""From arrival times to the numbers that are reported."""

from __future__ import annotations

from statistics import median

from client import Completion
from peers import OURS

LOWER_IS_BETTER = {"ttft_s", "tpot_s"}


def decode_metrics(batch: list[Completion]) -> dict[str, float | None]:
    """Speed of one batch of requests that were sent together.

    output_tps  all output tokens over the time until the last request finished: what a user of the server gets
    decode_tps  tokens per second while every request was decoding: after the last first token, until the first finish
    tpot_s      median over requests of the time per output token after the first
    ttft_s      median over requests of the time to the first token
    """
    num_tokens = sum(one.num_output_tokens for one in batch)
    begin = max(one.first for one in batch)
    finish = min(one.event_times[-1] for one in batch)
    decoding = None
    if finish > begin:
        # A piece of the stream is nearly always one token; where it is not, pieces are scaled to tokens.
        decoding = sum(
            sum(begin < time <= finish for time in one.event_times) * one.num_output_tokens / len(one.event_times)
            for one in batch
        ) / (finish - begin)
    return {
        "output_tps": num_tokens / max(one.end for one in batch),
        "decode_tps": decoding,
        "tpot_s": median((one.event_times[-1] - one.first) / max(one.num_output_tokens - 1, 1) for one in batch),
        "ttft_s": median(one.first for one in batch),
    }


def prefill_metrics(batch: list[Completion]) -> dict[str, float | None]:
    """Speed of a batch of long prompts that each ask for one token."""
    return {"prefill_tps": sum(one.num_prompt_tokens for one in batch) / max(one.end for one in batch)}


def summarise(rounds: list[dict], ours: str = OURS) -> dict:
    """Medians over rounds, and our speed over each other system's, paired by round.

    Args:
        rounds: raw measurements with the keys round, system, workload and metrics.
        ours: the system that the ratios compare with the others.

    Returns:
        {"medians": {workload: {system: {metric: value}}}, "ratios": {workload: {system: {metric: ours over theirs}}}}.
        A ratio above 1 always means that we are better.
    """
    table: dict[tuple[str, str, str], dict[int, float]] = {}
    for entry in rounds:
        for metric, value in entry["metrics"].items():
            if value is not None:
                table.setdefault((entry["workload"], entry["system"], metric), {})[entry["round"]] = value
    medians: dict = {}
    ratios: dict = {}
    for (workload, system, metric), values in table.items():
        medians.setdefault(workload, {}).setdefault(system, {})[metric] = median(values.values())
        our_values = table.get((workload, ours, metric), {})
        paired = [our_values[number] / values[number] for number in values.keys() & our_values.keys()]
        if paired and system != ours:
            ratio = median(paired)
            better = 1 / ratio if metric in LOWER_IS_BETTER else ratio
            ratios.setdefault(workload, {}).setdefault(system, {})[metric] = better
    return {"medians": medians, "ratios": ratios}
