"""Whether folding in turn evens out the time between tokens: requests that began together, with and without.

    python benchmarks/fold_turns.py --out benchmarks/results/fold_turns.json

In process, on the dense model; rounds with folds in turn and with every fold as soon as it is due alternate. With the
same buffer length both do the same work in all. Every round does the same at the same step, so the median over rounds,
taken for each step, leaves out what else the machine did; percentiles are given of these medians, and of all steps.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt

from checkpoints import checkpoint
from kvbuffer import SamplingParams
from kvbuffer.bench import machine
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine


def all_that_are_due(overdue: npt.NDArray[np.int32], num_filled: float) -> set[int]:
    """What :func:`kvbuffer.engine.forms.folds_due` would be without taking turns."""
    return set(np.flatnonzero(overdue >= 0).tolist())


def decode(engine: Engine, requests: int, tokens: int, seed: int) -> list[float]:
    """Return the seconds of each decode step of requests whose prompts are as long as each other."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for i in range(requests):
        engine.add_request(str(i), rng.integers(300, 20_000, 65).tolist(), params)
    while engine.stats.num_waiting or any(r.is_prefilling for r in engine._scheduler.running):
        engine.step()
    seconds = []
    while engine.has_work():
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def milliseconds(seconds: npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean and percentiles."""
    percentiles = {f"p{q}": np.percentile(seconds, q) for q in (50, 90, 95, 99)}
    return {name: round(1e3 * float(x), 2) for name, x in {"mean": np.mean(seconds), **percentiles}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--buffer-len", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = EngineConfig(
        str(checkpoint("dense")), max_model_len=512, buffer_len=args.buffer_len, max_num_seqs=args.requests,
        max_num_batched_tokens=4096, enable_prefix_caching=False, show_progress=False,
    )  # fmt: skip
    engine = Engine.from_config(config)
    decode(engine, args.requests, 8, 0)
    steps: dict[str, list[list[float]]] = {"in turn": [], "when due": []}
    for number in range(args.rounds):
        steps["in turn"].append(decode(engine, args.requests, args.tokens, number))
        with mock.patch("kvbuffer.engine.scheduler.folds_due", all_that_are_due):
            steps["when due"].append(decode(engine, args.requests, args.tokens, number))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": machine.describe(),
        "milliseconds": {name: milliseconds(np.array(seconds)) for name, seconds in steps.items()},
        "milliseconds_of_medians": {name: milliseconds(np.median(seconds, axis=0)) for name, seconds in steps.items()},
    }
    print(json.dumps({key: result[key] for key in ("milliseconds", "milliseconds_of_medians")}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
