"""Whether a server that has just been started is as fast as one that has been through its memory.

    python benchmarks/fresh_server.py --out benchmarks/results/fresh_server.json

The first time that memory is written, the system has to find it. Prefix caching, which leaves the states of every
request in memory, goes through all of its budget before it uses any of it again. Here servers with and without it are
started in turn, and each gets the same batches of requests, one after the other; the first is compared with the last
ones of the same server, by which time everything has been used.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from checkpoints import KINDS
from kvbuffer.bench import machine
from metrics import decode_metrics
from peers import KVBuffer
from serve import make_prompts

_LAST = 3  # batches that stand for a server that is warm


class Fresh(KVBuffer):
    """This project with a given cache budget, with prefix caching or without."""

    def __init__(self, model: str, max_concurrency: int, memory: str, caching: bool) -> None:
        super().__init__("fresh", model, max_concurrency)
        self._options = ["--memory", memory, *([] if caching else ["--no-enable-prefix-caching"])]

    def command(self):
        return [part for part in super().command() if part != "--no-enable-prefix-caching"] + self._options


def batches(args: argparse.Namespace, caching: bool, start: int) -> list[dict]:
    """Output tokens per second of each batch that a fresh server gets."""
    system, measured = Fresh(args.model, args.requests, args.memory, caching), []
    try:
        system.start()
        time.sleep(args.idle)
        for number in range(args.batches):
            prompts = make_prompts(f"{start} {number}", args.requests, args.prompt_len)
            with machine.ForeignLoad(system.process.pid) as load:
                metrics = decode_metrics(system.generate(prompts, args.output_len))
            measured.append({**metrics, "foreign_load": load.fraction})
    finally:
        system.stop()
    return measured


def summarise(starts: list[list[dict]]) -> dict:
    """Each batch's throughput over that of the last ones of the same server: medians over the starts."""
    ratios = []
    for measured in starts:
        speeds = [batch["output_tps"] for batch in measured]
        ratios.append([speed / median(speeds[-_LAST:]) for speed in speeds])
    return {
        "warm_output_tps": round(median(median(b["output_tps"] for b in m[-_LAST:]) for m in starts), 1),
        "batch_over_warm": [round(median(one), 3) for one in zip(*ratios, strict=True)],
    }


def main() -> None:
    args = _arguments()
    starts: dict[str, list[list[dict]]] = {"caching": [], "no caching": []}
    for start in range(args.starts):
        for name in list(starts)[:: -1 if start % 2 else 1]:
            starts[name].append(batches(args, name == "caching", start))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": machine.describe(),
        "summary": {name: summarise(measured) for name, measured in starts.items()},
        "starts": starts,
    }
    print(json.dumps(result["summary"], indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=KINDS, default="dense")
    add("--memory", default="3GiB", help="budget of the caches")
    add("--starts", type=int, default=3, help="of each server")
    add("--batches", type=int, default=10)
    add("--requests", type=int, default=32, help="in a batch")
    add("--prompt-len", type=int, default=64)
    add("--output-len", type=int, default=64)
    add("--idle", type=float, default=0.0, help="seconds between a server's start and its first batch")
    add("--out", type=Path, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
