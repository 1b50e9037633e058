"""Workloads of instructions with known probabilities, and predictors fitted to logs of them.

    python benchmarks/instcache_workloads.py --workload skewed --count 5000 log.jsonl

An instruction is of some kind, and each of its parts is drawn by Zipf's law. So the probability of every instruction is
known, and with it the entropy and the best hit rate that any table of N entries has.

All of them are synthetic. In ``SKEWED`` few instructions are most of what is asked. In ``COLD_START``, whose parts are
nearly as likely as one another, most of what is asked has not been asked before. ``LMSYS_LIKE`` has the shape that is
told of public chat logs (short greetings that many send, requests from templates with a long tail, and long texts that
nobody can foresee), in proportions that are guessed: nothing that is measured on it is a measurement on LMSys-Chat-1M.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvbuffer.instcache.fit import prepare
from kvbuffer.instcache.training import FitOptions, train_predictor

OPENINGS = ("What is", "How do I use", "Explain", "Show an example of", "Tell me about", "Compare others with")
SUBJECTS = tuple(
    f"{kind} {name}"
    for kind in ("the", "a nested", "an empty")
    for name in ("list", "dictionary", "set", "tuple", "string", "generator", "class", "loop", "function", "file")
)
MANNERS = ("", "briefly", "in detail", "with code")
ENDINGS = ("", "?", " please")

GREETINGS = (
    "hi", "hello", "hey", "who are you?", "how are you?", "what can you do?", "test", "tell me a joke", "hello!",
    "hola", "good morning", "write a poem", "what is your name?", "help", "thanks", "tell me a story", "are you there?",
    "ping", "say something", "what day is it?", "which model are you?", "good evening", "sing a song", "bye",
)  # fmt: skip
REQUESTS = (
    "Write a story about", "Write an article about", "Explain", "Give me a list of facts about", "Write code for",
    "Summarize what is known about", "Translate into French:", "Write a poem about", "Draft an email about",
    "Compare and rank", "Invent a name for", "Plan a lesson about",
)  # fmt: skip
QUALITIES = (
    "modern", "old", "cheap", "famous", "small", "digital", "local", "green", "quiet", "fast", "public", "secret",
    "simple", "urban", "French", "wild", "broken", "royal", "hidden", "early", "open", "heavy", "solar", "blue",
)  # fmt: skip
TOPICS = (
    "cities", "dogs", "computers", "jobs", "music", "chemistry", "cars", "books", "games", "robots", "schools",
    "movies", "trees", "banks", "rivers", "food", "planets", "phones", "taxes", "history", "poems", "trains",
    "markets", "birds", "clocks", "islands", "engines", "painters", "bridges", "cells", "castles", "storms", "wines",
    "lamps", "maps", "farms", "shoes", "drums", "ships", "glaciers",
)  # fmt: skip
LENGTHS = (
    "", "in 100 words", "in detail", "for beginners", "step by step", "for a child", "in 2000 words", "as a table",
)  # fmt: skip
CLOSINGS = ("", ".", " please", " thanks")


def zipf(count: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, count + 1) ** -exponent
    return weights / weights.sum()


@dataclass(frozen=True)
class Kind:
    """Instructions of the same parts, the last of which follows without a space.

    Attributes:
        share: of all instructions.
        parts: what each part may be, the likeliest first.
        exponents: of Zipf's law, for each part; 0 is uniform.
    """

    share: float
    parts: tuple[Sequence[str], ...]
    exponents: tuple[float, ...]

    def shares(self) -> list[np.ndarray]:
        return [zipf(len(part), exponent) for part, exponent in zip(self.parts, self.exponents, strict=True)]

    def sample(self, count: int, rng: np.random.Generator) -> list[str]:
        drawn = [rng.choice(part, count, p=p).tolist() for part, p in zip(self.parts, self.shares(), strict=True)]
        return [" ".join(filter(None, parts)) + ending for *parts, ending in zip(*drawn, strict=True)]


@dataclass(frozen=True)
class Workload:
    """A distribution of instructions.

    Attributes:
        name: what it is called in the results.
        kinds: what it mixes.
    """

    name: str
    kinds: tuple[Kind, ...]

    def sample(self, count: int, seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        counts = rng.multinomial(count, [kind.share for kind in self.kinds])
        texts = itertools.chain(*(kind.sample(n, rng) for kind, n in zip(self.kinds, counts, strict=True)))
        return rng.permutation(list(texts)).tolist()

    @property
    def size(self) -> int:
        """Different instructions."""
        return sum(math.prod(map(len, kind.parts)) for kind in self.kinds)

    @property
    def entropy(self) -> float:
        """In nats."""
        inner = (kind.share * -sum((p * np.log(p)).sum() for p in kind.shares()) for kind in self.kinds)
        mix = np.array([kind.share for kind in self.kinds])
        return float(sum(inner) - (mix * np.log(mix)).sum())

    def best_hit_rate(self, entries: int) -> float:
        """What a table of the likeliest ``entries`` instructions would hit."""
        probabilities = []
        for kind in self.kinds:
            if math.prod(map(len, kind.parts)) < 1e7:  # others have none that is likely enough
                each = np.full(1, kind.share)
                for share in kind.shares():
                    each = np.outer(each, share).ravel()
                probabilities.append(each)
        return float(np.sort(np.concatenate(probabilities))[::-1][:entries].sum())


COLD_START = Workload("cold start", (Kind(1.0, (REQUESTS, QUALITIES, TOPICS, MANNERS, ENDINGS), (0.5,) * 5),))
SKEWED = Workload("skewed", (Kind(1.0, (OPENINGS, SUBJECTS, MANNERS, ENDINGS), (1.3,) * 4),))
LMSYS_LIKE = Workload(
    "LMSys-like",
    (
        Kind(0.12, (GREETINGS, ("",)), (1.0, 0.0)),
        Kind(0.58, (REQUESTS, QUALITIES, TOPICS, LENGTHS, CLOSINGS), (1.2, 1.0, 1.0, 1.2, 1.2)),
        Kind(0.30, (("Continue:",), *[QUALITIES + TOPICS] * 8, ("",)), (0.0,) * 10),
    ),
)
WORKLOADS = (COLD_START, SKEWED, LMSYS_LIKE)

#: A decoder of one linear and one full attention layer, as small as these workloads allow.
PREDICTOR = {
    "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "tie_word_embeddings": True,
}  # fmt: skip


def fitted(workload: Workload, folder: Path, log_size: int, options: FitOptions | None = None) -> Path:
    """Fit a predictor to a log of a workload, as ``kvbuffer instcache fit`` does, unless ``folder`` holds one."""
    if (model := folder / "run" / "model").exists():
        return model
    folder.mkdir(parents=True, exist_ok=True)
    write_log(log_of(workload, log_size), folder / "log.jsonl")
    prepare(folder / "log.jsonl", folder)
    if options is None:
        config = folder / "predictor.json"
        config.write_text(json.dumps(PREDICTOR))
        options = FitOptions(str(config), vocab_size=512, epochs=1.0)
    return train_predictor(folder, options)


def log_of(workload: Workload, count: int) -> list[str]:
    """Return what the log that a predictor is fitted to asks."""
    return workload.sample(count, 0)


def write_log(texts: Sequence[str], path: Path) -> None:
    """Write a log in the shape of LMSys-Chat-1M's records."""
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "..."}]
            file.write(json.dumps({"conversation_id": f"c{number}", "conversation": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a log of a synthetic workload.")
    parser.add_argument("--workload", choices=[workload.name for workload in WORKLOADS], default=SKEWED.name)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    [workload] = [workload for workload in WORKLOADS if workload.name == options.workload]
    write_log(workload.sample(options.count, options.seed), options.out)


if __name__ == "__main__":
    main()
