"""Prompt lookup against llama.cpp's own n-gram speculation, on the same checkpoint, through the servers' API.

Nothing is laid down here: the random weights say what they say. A bias leaves them one token to choose from, so that
nearly every draft is right, or eight, so that most are wrong. Each server runs as it does in serve.py, with and without
speculation, one request at a time, all of them in turn.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from peers import KVBuffer, LlamaCpp, System
from speculative_texts import Script

MAX_TOKENS, NUM_DRAFTS = 96, 8
#: As far as prompt lookup looks back here, too; llama.cpp's default of 12 finds less.
_NGRAM = 4
#: So many tokens there are to choose from.
CHOICES = (1, 8)


class KVBufferLookup(KVBuffer):
    """This project's server with prompt lookup."""

    def command(self) -> list[str]:
        config = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS}
        return [*super().command(), "--speculative-config", json.dumps(config)]


class LlamaCppLookup(LlamaCpp):
    """llama.cpp's server with ngram-simple. Where states cannot be rolled back it needs checkpoints of them."""

    def command(self) -> list[str]:
        sizes = ("--spec-ngram-simple-size-n", str(_NGRAM), "--spec-ngram-simple-size-m", str(NUM_DRAFTS))
        return [*super().command(), "--ctx-checkpoints", "32", "--spec-type", "ngram-simple", *sizes]


def measure(texts: Sequence[Script], rounds: int) -> list[dict]:
    """Return a row per server and number of choices: tokens per second, and over those without speculation.

    Args:
        texts: whose prompts are continued.
        rounds: of all servers in turn, after one that does not count.
    """
    kinds = {"kvbuffer": KVBuffer, "kvbuffer-lookup": KVBufferLookup, "llama.cpp": LlamaCpp}
    kinds["llama.cpp-lookup"] = LlamaCppLookup
    servers = [kind(name, "dense", 1) for name, kind in kinds.items()]
    speeds: dict[tuple[str, int], list[float]] = {}
    try:
        for server in servers:
            server.start()
            server.pause()
        for round_ in range(rounds + 1):
            for server in servers:
                server.resume()
                for choices in CHOICES:
                    server.extra_fields = type(server).extra_fields | {"logit_bias": _bias(choices)}
                    speed = _speed(server, texts)
                    if round_:
                        speeds.setdefault((server.name, choices), []).append(speed)
                server.pause()
    finally:
        for server in servers:
            server.stop()
    rows = []
    for server in servers:
        for choices in CHOICES:
            own, plain = speeds[server.name, choices], speeds[server.name.removesuffix("-lookup"), choices]
            ratios = [round(fast / slow, 3) for fast, slow in zip(own, plain, strict=True)]
            rows.append({
                "server": server.name, "version": server.version(), "choices": choices,
                "tokens_per_second": round(statistics.median(own), 1),
                "ratio": statistics.median(ratios), "ratios": ratios,
            })  # fmt: skip
    return rows


def _bias(choices: int) -> dict[str, int]:
    return {str(token): 100 for token in range(1000, 1000 + choices)}


def _speed(server: System, texts: Sequence[Script]) -> float:
    tokens, seconds = 0, 0.0
    for prompt, _ in texts:
        (completion,) = server.generate([prompt], MAX_TOKENS)
        tokens += completion.num_output_tokens - 1
        seconds += completion.end - completion.first
    return tokens / seconds
