"""The gate beside the speed: are the tokens that were written fast also the right ones?

Every system decodes the same prompts greedily in bfloat16. Two sequences that differ in one token have nothing in
common afterwards, so comparing them position by position says little. Instead a float32 model reads each system's own
output and says, for each token, how far below the best choice it was (its regret, in nats). That judges every token of
every system by the same standard, whatever came before it, and a broken state shows in the first few tokens.
"""

from __future__ import annotations

from statistics import mean, median

from peers import OURS

TIE_MARGIN = 0.02
"""Nats between float32's best two tokens below which bfloat16 cannot be asked to tell them apart (its spacing at a
logit of 2 to 4 is 0.016): choosing the other one is a tie."""

_SLACK = 1.5
_WRONG_FLOOR, _REGRET_FLOOR = 0.005, 0.001


def judge(outputs: list[list[int]], expected: list[list[int]], scores: dict) -> dict[str, float | None]:
    """How good one system's greedy tokens are.

    Args:
        outputs: the tokens that it wrote, per prompt.
        expected: what float32 writes when it runs freely.
        scores: float32's `regret` and `margin` for each token of `outputs`.

    Returns:
        agreement: share of tokens that are float32's best choice. ties: share that differ within the tie margin.
        wrong: share that differ beyond it. regret: mean nats lost per token. first_divergence: median position
        of the first token that differs from `expected`, the output's length where none does.
    """
    regrets = [value for row in scores["regret"] for value in row]
    margins = [value for row in scores["margin"] for value in row]
    differs = [regret > 0 for regret in regrets]
    ties = [different and margin < TIE_MARGIN for different, margin in zip(differs, margins, strict=True)]
    return {
        "agreement": 1 - mean(differs),
        "ties": mean(ties),
        "wrong": mean(differs) - mean(ties),
        "regret": mean(regrets),
        "first_divergence": median(
            next((at for at, (a, b) in enumerate(zip(output, right, strict=True)) if a != b), len(right))
            for output, right in zip(outputs, expected, strict=True)
        ),
    }


def gate(judged: dict[str, dict], ours: str = OURS) -> tuple[bool | None, str]:
    """Whether our speed may be reported: (green, red or None where there is nothing to compare with; the reason).

    Red means clearly more wrong tokens, or clearly more regret, than the worst of the other systems, which decode in
    the same precision.
    """
    others = {name: result for name, result in judged.items() if name != ours}
    if ours not in judged or not others:
        return None, "no gate: needs kvbuffer and another system in the same run"
    reasons = []
    for quantity, floor in (("wrong", _WRONG_FLOOR), ("regret", _REGRET_FLOOR)):
        limit = _SLACK * max(result[quantity] for result in others.values()) + floor
        value = judged[ours][quantity]
        reasons.append((value <= limit, f"{quantity} {value:.4f} (limit {limit:.4f})"))
    green = all(passed for passed, _ in reasons)
    return green, ("green: " if green else "RED: ") + ", ".join(text for _, text in reasons)
