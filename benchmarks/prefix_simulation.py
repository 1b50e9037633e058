"""Token hit rates of prefix caches on traces of requests, with the true sizes of Qwen3-Next-80B and without the model.

The engine's own prefix cache and policy against blocks of 528 tokens as vLLM's hybrid mode has them, against the final
state of each request only, and against an oracle that finds every prefix ever computed. Budgets are parts of what a
cache without bounds is left with: the attention pages of all texts, and the final state of each request. One more
budget is a tenth of the least that the oracle's hits could be had with, if it were known beforehand which snapshots
those take. Requests come one after the other and are served at once; nothing is timed.

    python benchmarks/prefix_simulation.py [--traces chat agents trace.jsonl] [--requests 2000] [--out prefix.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from kvbuffer.bench import machine
from prefix_systems import Bytes, Oracle, hit_tokens, longest_text, num_tokens, systems, true_bytes
from prefix_traces import GENERATORS, Request, read_trace

PARTS = (2, 4, 10)
_GIB = 2**30


def simulate(requests: Sequence[Request], sizes: Bytes) -> dict[str, Any]:
    """Return what every system finds of a trace under every budget."""
    prompts, longest = sum(len(request.prompt) for request in requests), longest_text(requests)
    oracle = Oracle(sizes, num_tokens(requests))
    best = hit_tokens(oracle, requests)
    budgets = {f"1/{part}": oracle.unbounded_bytes // part for part in PARTS}
    budgets["1/10 of the least"] = oracle.least_bytes // 10
    rates = {}
    for name, budget in budgets.items():
        found = {system: hit_tokens(cache, requests) for system, cache in systems(budget, sizes).items()}
        rates[name] = {
            "bytes": budget,
            "hit_rate": {system: tokens / prompts for system, tokens in found.items()},
            "of_oracle": {system: tokens / best if best else None for system, tokens in found.items()},
        }
    return {
        "requests": len(requests),
        "seconds": requests[-1].time - requests[0].time,
        "prompt_tokens": prompts,
        "longest": longest,
        "oracle": {
            "hit_rate": best / prompts,
            "unbounded_bytes": oracle.unbounded_bytes,
            "least_bytes": oracle.least_bytes,
        },
        "budgets": rates,
    }


def markdown(traces: dict[str, Any]) -> str:
    """Return the hit rates as a table; in brackets, the part of what the oracle finds."""
    names = list(next(iter(next(iter(traces.values()))["budgets"].values()))["hit_rate"])
    lines = [f"| trace | budget | GiB | oracle | {' | '.join(names)} |", "|---|---|" + "---:|" * (len(names) + 2)]
    for trace, result in traces.items():
        for budget, entry in result["budgets"].items():
            cells = [
                f"{entry['hit_rate'][name]:.3f}" + ("" if part is None else f" ({part:.1%})")
                for name, part in entry["of_oracle"].items()
            ]
            size, oracle = f"{entry['bytes'] / _GIB:.1f}", f"{result['oracle']['hit_rate']:.3f}"
            lines.append(f"| {' | '.join([trace, budget, size, oracle, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    args = _arguments()
    sizes = true_bytes()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {"traces": args.traces, "requests": args.requests, "seed": args.seed},
        # Hit rates do not depend on speed.
        "machine": {key: x for key, x in machine.describe().items() if not key.endswith(("_bandwidth", "_peak"))},
        "versions": machine.versions("torch"),
        "bytes": sizes._asdict(),
        "traces": {},
    }
    for name in args.traces:
        trace = GENERATORS[name](args.seed) if name in GENERATORS else read_trace(Path(name))
        result["traces"][Path(name).name] = simulate(list(islice(trace, args.requests)), sizes)
        print(f"{name} done", flush=True)
    print(markdown(result["traces"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result["traces"]) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", nargs="+", default=list(GENERATORS), help="names, or files of published traces")
    parser.add_argument("--requests", type=int, default=2000, help="the first so many of each trace")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
