"""Prefix caching as users meet it: kvbuffer, vLLM and llama.cpp serve the same traces over HTTP, each with its cache.

    python benchmarks/prefix_peers.py --out benchmarks/results/prefix_peers.json

Every system runs twice, with and without prefix caching. Each request of a trace is served by all six servers, alone,
one after the other; the prompts are those of prefix_serving.py, and hold what the same system, caching, has answered.
What is reported is the time to the first token, and the share of the prompts' tokens that a system says it found.
Caches have 1 GiB each, which no trace fills: this is about what a cache finds, not about what it keeps.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import mean, median

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from checkpoints import KINDS
from client import Completion
from kvbuffer.bench import machine
from peers import MAX_MODEL_LEN, VLLM, HttpSystem, KVBuffer, LlamaCpp
from prefix_serving import TRACES, Replay, token_of
from prefix_traces import GENERATORS

#: Where each prompt of the warm-up, and each trace, begins to number its tokens: caches are not emptied in between.
_NUMBERS = count(10**8, 10**7 + 1234)
_console = Console(stderr=True)


class CachingKVBuffer(KVBuffer):
    """As it is by default, with the memory that the others have."""

    caching = ("--memory", "1GiB")


class CachingVLLM(VLLM):
    """Its cache of aligned blocks, as it chooses it for this model."""

    caching = ("--enable-prefix-caching", "--enable-prompt-tokens-details")
    cache_gib = 1


class CachingLlamaCpp(LlamaCpp):
    """As it is by default, but for the memory: prompts in its slots and in RAM, with checkpoints of their states."""

    caching = ("--cache-ram", "1024")


SYSTEMS: dict[str, tuple[type[HttpSystem], type[HttpSystem]]] = {
    "kvbuffer": (CachingKVBuffer, KVBuffer),
    "vllm": (CachingVLLM, VLLM),
    "llama.cpp": (CachingLlamaCpp, LlamaCpp),
}


class Pair:
    """One system, with and without prefix caching."""

    def __init__(self, name: str, model: str) -> None:
        caching, plain = SYSTEMS[name]
        self.name = name
        self.servers: dict[str, HttpSystem] = {
            "cached": caching(f"{name}-caching", model, max_concurrency=4),
            "uncached": plain(name, model, max_concurrency=4),
        }

    @property
    def groups(self) -> list[int]:
        """The process groups of both."""
        return [server.process.pid for server in self.servers.values()]

    def serve(self, prompt: list[int], output_len: int, order: int) -> dict[str, Completion]:
        """Return how both served a prompt, one after the other."""
        served = {}
        for name in list(self.servers)[::order]:
            server = self.servers[name]
            server.resume()
            (served[name],) = server.generate([prompt], output_len, want_ids=True)
            server.pause()
        return served


def main() -> None:
    args = _arguments()
    pairs = [Pair(name, args.model) for name in args.systems]
    try:
        for pair in pairs:
            for server in pair.servers.values():
                _console.print(f"starting {server.name}")
                server.start()
                server.pause()
            for length in (50, 200, 1000, 50, 200, 2000):  # some compile, or ask for memory, at each length's first
                _warm_up(pair, min(length, args.prompt_len), args.output_len)
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "settings": {**vars(args), "out": None},
            "machine": machine.describe(),
            "systems": {pair.name: _described(pair) for pair in pairs},
            "traces": {trace: _replay(args, trace, pairs) for trace in args.traces},
        }
    finally:
        for pair in pairs:
            for server in pair.servers.values():
                server.stop()
    _show(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        _console.print(f"wrote {args.out}")


def _warm_up(pair: Pair, prompt_len: int, output_len: int) -> None:
    first = next(_NUMBERS)
    pair.serve([token_of(first + i) for i in range(prompt_len)], output_len, 1)


def _described(pair: Pair) -> dict:
    cached = pair.servers["cached"]
    return {"version": cached.version(), "caching": list(cached.caching)}


def _replay(args: argparse.Namespace, trace: str, pairs: list[Pair]) -> dict:
    first = next(_NUMBERS)
    replays = [Replay(trace, args.seed, args.requests, args.prompt_len, args.output_len, first) for _ in pairs]
    groups = [group for pair in pairs for group in pair.groups]
    served: dict[str, list[dict[str, Completion]]] = {pair.name: [] for pair in pairs}
    foreign = 0.0
    for number, prompts in enumerate(track(zip(*replays, strict=True), trace, args.requests, console=_console)):
        order = -1 if number % 2 else 1
        with machine.ForeignLoad(*groups) as load:
            for pair, replay, prompt in list(zip(pairs, replays, prompts, strict=True))[::order]:
                both = pair.serve(prompt, args.output_len, order)
                replay.answer(both["cached"].token_ids)
                served[pair.name].append(both)
        foreign = max(foreign, load.fraction)
    return {"foreign_load": foreign, **{name: _summary(requests) for name, requests in served.items()}}


def _summary(requests: list[dict[str, Completion]]) -> dict:
    times = {name: [both[name].first for both in requests] for name in ("cached", "uncached")}
    prompt_tokens = sum(both["cached"].num_prompt_tokens for both in requests)
    hit_tokens = sum(both["cached"].num_cached_tokens for both in requests)
    return {
        "prompt_tokens": prompt_tokens,
        "hit_tokens": hit_tokens,
        "token_hit_rate": hit_tokens / prompt_tokens,
        "ttft": {
            name: {"mean": mean(x), "median": median(x), "p99": float(np.percentile(x, 99))}
            for name, x in times.items()
        },
        "mean_ratio": mean(times["cached"]) / mean(times["uncached"]),
        # With bfloat16 weights near ties fall either way when a prompt is computed in other pieces.
        "same_first_token": mean(both["cached"].token_ids[:1] == both["uncached"].token_ids[:1] for both in requests),
    }


def _statistics(seconds: list[float]) -> dict[str, float]:
    return {"mean": mean(seconds), "median": median(seconds), "p99": float(np.percentile(seconds, 99))}


def _show(result: dict) -> None:
    columns = (
        "trace",
        "system",
        "hit rate",
        "mean ms, cached",
        "uncached",
        "ratio",
        "p99 ms, cached",
        "uncached",
        "same",
    )
    table = Table(*columns, title=f"Time to first token, {result['settings']['model']}, commit {result['commit']}")
    for trace, systems in result["traces"].items():
        for name in result["systems"]:
            one = systems[name]
            cached, uncached = one["ttft"]["cached"], one["ttft"]["uncached"]
            table.add_row(
                trace, name, f"{100 * one['token_hit_rate']:.1f} %", f"{1e3 * cached['mean']:.0f}",
                f"{1e3 * uncached['mean']:.0f}", f"{one['mean_ratio']:.2f}", f"{1e3 * cached['p99']:.0f}",
                f"{1e3 * uncached['p99']:.0f}", f"{100 * one['same_first_token']:.0f} %",
            )  # fmt: skip
    Console(width=140).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=KINDS, default="dense")
    add("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add("--traces", type=lambda text: text.split(","), default=list(TRACES), help="comma-separated")
    add("--requests", type=int, default=32, help="per trace")
    add("--output-len", type=int, default=8)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if unknown := set(args.traces) - GENERATORS.keys():
        parser.error(f"no trace {', '.join(sorted(unknown))}: there are {', '.join(GENERATORS)}")
    args.prompt_len = MAX_MODEL_LEN - args.output_len
    return args


if __name__ == "__main__":
    main()
