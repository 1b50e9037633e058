"""Requests over time, as prefix caches see them: made from a seed, or read from published traces.

Tokens are numbers without meaning; what matters is which requests begin with the same ones, where they part, and when
they come. Lengths are log-normal, think times and arrivals exponential.
"""

from __future__ import annotations

import csv
import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

MOONCAKE_BLOCK = 512


class Request(NamedTuple):
    """One request: when it comes, its prompt, what is answered, and for how long its caller will be back for sure."""

    time: float
    prompt: list[int]
    output: list[int]
    ttl: float = 0.0


class Vocabulary:
    """Makes texts that nobody else has, with lengths around a median."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self._next = count()

    def text(self, median: float, spread: float = 0.6) -> list[int]:
        """Return a new text; its length is log-normal."""
        return self.exactly(max(1, round(self.rng.lognormvariate(math.log(median), spread))))

    def exactly(self, length: int) -> list[int]:
        """Return a new text of a given length."""
        return list(islice(self._next, length))

    def pause(self, mean: float) -> float:
        """Return an exponential waiting time in seconds."""
        return self.rng.expovariate(1 / mean)

    def popular(self, items: int) -> int:
        """Return one of so many items, the first the most popular (Zipf)."""
        return self.rng.choices(range(items), [1 / (rank + 1) for rank in range(items)])[0]


Session = Iterator[Request]


def _merged(vocabulary: Vocabulary, session: Callable[[float], Session], every: float) -> Session:
    """Start a session every so many seconds on average; go through all their requests in the order of time."""
    start, order = 0.0, count()
    waiting: list[tuple[float, int, Request, Session]] = []
    while True:
        start += vocabulary.pause(every)
        while waiting and waiting[0][0] < start:
            _, _, request, running = heapq.heappop(waiting)
            yield request
            if (following := next(running, None)) is not None:
                heapq.heappush(waiting, (following.time, next(order), following, running))
        starting = session(start)
        first = next(starting)
        heapq.heappush(waiting, (first.time, next(order), first, starting))


def chat(seed: int, *, reasoning: bool = False) -> Session:
    """Conversations of some turns. With ``reasoning``, earlier thoughts are left out of the next prompt.

    A prompt then ends in two tokens that open the thoughts and are not in the next prompt either, so that two prompts
    of a conversation part just before the end of the first.
    """
    vocabulary = Vocabulary(seed)
    system, turn_start, opening = vocabulary.text(60), vocabulary.exactly(5), vocabulary.exactly(2)

    def session(time: float) -> Session:
        history = system
        while True:
            prompt = history + vocabulary.text(60, 1.0) + turn_start
            thoughts = vocabulary.text(400, 0.8) if reasoning else []
            answer = vocabulary.text(250, 0.8)
            yield Request(time, prompt + (opening if reasoning else []), thoughts + answer)
            history = prompt + answer
            time += 10 + vocabulary.pause(60)
            if vocabulary.rng.random() < 1 / 6:
                return

    return _merged(vocabulary, session, every=20)


def reasoning_chat(seed: int) -> Session:
    """Conversations whose thoughts are left out of later prompts."""
    return chat(seed, reasoning=True)


def system_prompts(seed: int) -> Session:
    """Single questions under one of twelve long instructions, some far more popular than others."""
    vocabulary = Vocabulary(seed)
    instructions = [vocabulary.text(1500) for _ in range(12)]

    def session(time: float) -> Session:
        yield Request(time, instructions[vocabulary.popular(12)] + vocabulary.text(80, 1.0), vocabulary.text(200, 0.8))

    return _merged(vocabulary, session, every=5)


def few_shot(seed: int) -> Session:
    """Thirty tasks with up to eight worked examples; callers use the first few of them."""
    vocabulary = Vocabulary(seed)
    tasks = [[vocabulary.text(60), *(vocabulary.text(120, 0.4) for _ in range(8))] for _ in range(30)]

    def session(time: float) -> Session:
        parts = tasks[vocabulary.popular(30)][: 1 + vocabulary.rng.choice([3, 5, 8])]
        yield Request(time, [*chain.from_iterable(parts), *vocabulary.text(60)], vocabulary.text(20))

    return _merged(vocabulary, session, every=5)


def tree_of_thoughts(seed: int) -> Session:
    """Searches: four thoughts follow a problem, each is judged, the best two are gone on from, three levels deep."""
    vocabulary = Vocabulary(seed)
    instruction, judge = vocabulary.text(400), vocabulary.text(40)

    def session(time: float) -> Session:
        kept = [instruction + vocabulary.text(150)]
        for _ in range(3):
            thoughts = []
            for path in kept:
                for _ in range(4):
                    thoughts.append(path + (thought := vocabulary.text(100, 0.5)))
                    yield Request(time, path, thought)
                time += vocabulary.pause(2)
            for thought in thoughts:
                yield Request(time, thought + judge, vocabulary.exactly(4))
            time += vocabulary.pause(2)
            kept = vocabulary.rng.sample(thoughts, 2)

    return _merged(vocabulary, session, every=15)


def agents(seed: int) -> Session:
    """Agents of five kinds that call tools: long instructions, results of any length, pauses from a second to minutes.

    The time to live is the promise a caller can make with ``cache_ttl``.
    """
    vocabulary = Vocabulary(seed)
    instructions = [vocabulary.text(4000, 0.3) for _ in range(5)]

    def session(time: float) -> Session:
        prompt = instructions[vocabulary.popular(5)] + vocabulary.text(200)
        steps = 1 + round(vocabulary.pause(12))
        for step in range(steps):
            answer = vocabulary.text(120, 0.7)
            yield Request(time, prompt, answer, ttl=300.0 if step < steps - 1 else 0.0)
            prompt = prompt + answer + vocabulary.text(300, 1.2)
            time += 3 + vocabulary.rng.lognormvariate(math.log(8), 1.3)

    return _merged(vocabulary, session, every=60)


def unique(seed: int) -> Session:
    """Texts that have nothing in common."""
    vocabulary = Vocabulary(seed)

    def session(time: float) -> Session:
        yield Request(time, vocabulary.text(1000), vocabulary.text(200))

    return _merged(vocabulary, session, every=5)


GENERATORS: dict[str, Callable[[int], Session]] = {
    "chat": chat,
    "reasoning chat": reasoning_chat,
    "system prompts": system_prompts,
    "few-shot": few_shot,
    "tree of thoughts": tree_of_thoughts,
    "agents": agents,
    "no reuse": unique,
}


def read_mooncake(lines: Iterable[str]) -> Session:
    """Read Mooncake's traces: one JSON object a line, ``hash_ids`` naming blocks of 512 tokens.

    The tokens of block h are 512 h to 512 h + 511. Outputs are in no later prompt as far as the trace tells, so they
    are texts of their own.
    """
    fresh = count(1 << 40)
    for line in filter(str.strip, lines):
        entry = json.loads(line)
        tokens = [MOONCAKE_BLOCK * block + i for block in entry["hash_ids"] for i in range(MOONCAKE_BLOCK)]
        if len(tokens) < entry["input_length"]:
            raise ValueError(f"{entry['input_length']} tokens in {len(entry['hash_ids'])} blocks of {MOONCAKE_BLOCK}")
        output = list(islice(fresh, entry["output_length"]))
        yield Request(entry["timestamp"] / 1000, tokens[: entry["input_length"]], output)


def read_burstgpt(lines: Iterable[str]) -> Session:
    """Read BurstGPT's traces: CSV with ``Timestamp``, ``Request tokens``, ``Response tokens``.

    Requests with one ``Session ID``, where the file has them, go on from each other's text as far as their lengths
    allow. Without, they have nothing in common. Failed requests (no response tokens) are left out.
    """
    fresh = count()
    sessions: dict[str, list[int]] = {}
    for row in csv.DictReader(lines):
        num_prompt, num_output = int(row["Request tokens"]), int(row["Response tokens"])
        if not num_output:
            continue
        session = row.get("Session ID") or ""
        prompt = sessions.get(session, [])[:num_prompt]
        prompt = prompt + list(islice(fresh, num_prompt - len(prompt)))
        output = list(islice(fresh, num_output))
        if session:
            sessions[session] = prompt + output
        yield Request(float(row["Timestamp"]), prompt, output)


def read_trace(path: Path) -> Session:
    """Read a published trace: Mooncake's by the suffix .jsonl, BurstGPT's by .csv."""
    reader = {".jsonl": read_mooncake, ".csv": read_burstgpt}.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: .jsonl (Mooncake) and .csv (BurstGPT) are understood")
    with path.open() as lines:
        yield from reader(lines)
