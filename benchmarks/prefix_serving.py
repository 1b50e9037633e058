"""What prefix caching saves when a real model is served: time to first token and hit rate on traces.

    python benchmarks/prefix_serving.py --out benchmarks/results/prefix_serving.json

Two engines are loaded from one checkpoint, one with prefix caching and one without. Each request of a trace is served
by both, alone, the order alternating, so that whatever else the machine does meets both alike. The prompts are those of
prefix_traces.py, with answers as the model really gives them: a number that stands for a token of an answer is replaced
by what was answered, and answers end after a few tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from accuracy import TIE_MARGIN
from checkpoints import KINDS, SPECIAL_TOKENS, VOCAB_SIZE, checkpoint
from kvbuffer import SamplingParams
from kvbuffer.bench import machine
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from prefix_traces import GENERATORS

TRACES = ("chat", "system prompts", "few-shot", "no reuse")
_SPREAD = 2654435761  # odd, so that numbers that follow each other become tokens all over the vocabulary
_console = Console(stderr=True)


class Served(NamedTuple):
    """One request as one engine served it; the time to the first token in seconds."""

    ttft: float
    token_ids: list[int]
    num_cached_tokens: int


class Replay:
    """A trace whose prompts hold the answers that were really given; its tokens are numbered from ``first``."""

    def __init__(self, trace: str, seed: int, requests: int, prompt_len: int, output_len: int, first: int = 0) -> None:
        self._requests = islice(GENERATORS[trace](seed), requests)
        self.prompt_len, self.output_len, self._first = prompt_len, output_len, first
        self._answers: dict[int, int | None] = {}

    def __iter__(self) -> Iterator[list[int]]:
        for request in self._requests:
            tokens = (self._answers.get(number, token_of(self._first + number)) for number in request.prompt)
            prompt = [token for token in tokens if token is not None][: self.prompt_len]
            self._numbers = request.output
            # Those that are not reached are no part of any later prompt.
            self._answers.update(dict.fromkeys(request.output))
            yield prompt

    def answer(self, token_ids: list[int]) -> None:
        """Note what the last request's answer was."""
        self._answers.update(zip(self._numbers, token_ids, strict=False))


def token_of(number: int) -> int:
    """Return the token that stands for a trace's number."""
    first = len(SPECIAL_TOKENS)
    return first + number * _SPREAD % (VOCAB_SIZE - first)


def main() -> None:
    args = _arguments()
    engines = {name: _engine(args, caching) for name, caching in (("cached", True), ("uncached", False))}
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {**vars(args), "out": None},
        "machine": machine.describe(),
        "traces": {},
    }
    for engine in engines.values():  # the first steps of an engine touch memory that the later ones find mapped
        for number in range(3):
            _serve(engine, [token_of(VOCAB_SIZE * 1000 + number * 1000 + i) for i in range(1000)], args.output_len)
        engine.reset_prefix_cache()
    for trace in args.traces:
        result["traces"][trace] = _replay(args, trace, engines)
        engines["cached"].reset_prefix_cache()
    _show(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        _console.print(f"wrote {args.out}")


def _engine(args: argparse.Namespace, caching: bool) -> Engine:
    return Engine.from_config(
        EngineConfig(
            str(checkpoint(args.model)),
            memory=args.memory << 20,
            max_model_len=args.prompt_len + args.output_len,
            max_num_seqs=8,
            enable_prefix_caching=caching,
            show_progress=False,
        )
    )


def _serve(engine: Engine, prompt: list[int], output_len: int, logprobs: int | None = None) -> Served:
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, logprobs=logprobs)
    start, ttft = time.perf_counter(), 0.0
    engine.add_request("request", prompt, params)
    token_ids: list[int] = []
    while engine.has_work():
        for delta in engine.step():
            ttft = ttft or time.perf_counter() - start
            token_ids += delta.token_ids
            cached = delta.num_cached_tokens
    return Served(ttft, token_ids, cached)


def _replay(args: argparse.Namespace, trace: str, engines: dict[str, Engine]) -> dict:
    replay = Replay(trace, args.seed, args.requests, args.prompt_len, args.output_len)
    served: dict[str, list[Served]] = {name: [] for name in engines}
    prompts: list[list[int]] = []
    foreign: list[float] = []
    for prompt in track(replay, trace, args.requests, console=_console):
        with machine.ForeignLoad() as load:
            for name in list(engines)[:: 1 if len(prompts) % 2 else -1]:
                served[name].append(_serve(engines[name], prompt, args.output_len))
        foreign.append(load.fraction)
        replay.answer(served["cached"][-1].token_ids)
        prompts.append(prompt)
    ttft = {name: [one.ttft for one in results] for name, results in served.items()}
    return {
        "requests": len(prompts),
        "foreign_load": {"mean": mean(foreign), "max": max(foreign)},
        "prompt_tokens": sum(map(len, prompts)),
        "hit_tokens": sum(one.num_cached_tokens for one in served["cached"]),
        "token_hit_rate": sum(one.num_cached_tokens for one in served["cached"]) / sum(map(len, prompts)),
        "ttft": {
            name: {"mean": mean(times), "median": median(times), "p99": float(np.percentile(times, 99))}
            for name, times in ttft.items()
        },
        # Pairs were served one right after the other: their ratio knows little of what else the machine did.
        "median_ratio": median(one / other for one, other in zip(ttft["cached"], ttft["uncached"], strict=True)),
        "accuracy": _accuracy(args, engines["uncached"], prompts, served),
    }


def _accuracy(
    args: argparse.Namespace, referee: Engine, prompts: list[list[int]], served: dict[str, list[Served]]
) -> dict:
    """Compare the greedy tokens up to the first that differs: a tie if the best two were close there, else wrong."""
    same = ties = wrong = 0
    for prompt, one, other in zip(prompts, served["cached"], served["uncached"], strict=True):
        pairs = list(zip(one.token_ids, other.token_ids, strict=True))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        same += len(pairs) if at is None else at
        if at is not None:
            close = _margin(referee, prompt + other.token_ids[:at], pairs[at]) < TIE_MARGIN
            ties, wrong = ties + close, wrong + (not close)
    return {"same": same, "ties": ties, "wrong": wrong, "green": wrong <= 0.005 * (same + ties + wrong)}


def _margin(referee: Engine, prompt: list[int], tokens: tuple[int, int]) -> float:
    """Return by how much two next tokens differ in log-probability; infinity if one is not among the likeliest."""
    referee.add_request("referee", prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, logprobs=20))
    top: dict[int, float] = {}
    while referee.has_work():
        for delta in referee.step():
            for entry in delta.logprobs or ():
                top.update(entry.top)
    return abs(top.get(tokens[0], -np.inf) - top.get(tokens[1], -np.inf)) if set(tokens) <= top.keys() else np.inf


def _show(result: dict) -> None:
    columns = "trace", "hit rate", "mean ms, cached", "uncached", "p99 ms, cached", "uncached", "median ratio", "tokens"
    loaded = max(one["foreign_load"]["max"] for one in result["traces"].values())
    if loaded > 0.05:
        _console.print(f"[yellow]Other processes took up to {100 * loaded:.0f} % of the cores during a request.[/]")
    table = Table(*columns, title=f"Time to first token, {result['settings']['model']}, commit {result['commit']}")
    for trace, one in result["traces"].items():
        cached, uncached, accuracy = one["ttft"]["cached"], one["ttft"]["uncached"], one["accuracy"]
        times = (cached["mean"], uncached["mean"], cached["p99"], uncached["p99"])
        verdict = "{same} same, {ties} ties, {wrong} wrong".format(**accuracy)
        table.add_row(
            trace, f"{100 * one['token_hit_rate']:.1f} %", *(f"{1e3 * value:.0f}" for value in times),
            f"{one['median_ratio']:.3f}", ("" if accuracy["green"] else "RED ") + verdict,
        )  # fmt: skip
    Console(width=140).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=KINDS, default="dense")
    add("--traces", type=lambda text: text.split(","), default=list(TRACES), help="comma-separated")
    add("--requests", type=int, default=30, help="per trace")
    add("--prompt-len", type=int, default=2048, help="longer prompts are cut")
    add("--output-len", type=int, default=16)
    add("--memory", type=int, default=512, help="MiB of caches per engine")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    unknown = set(args.traces) - GENERATORS.keys()
    if unknown:
        parser.error(f"no trace {', '.join(sorted(unknown))}: there are {', '.join(GENERATORS)}")
    return args


if __name__ == "__main__":
    main()
