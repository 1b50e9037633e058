"""Hit rates as they were planned and as they come out, beside caches that remember what was asked."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from instcache_workloads import COLD_START, LMSYS_LIKE, SKEWED, Workload, fitted
from kvbuffer.instcache.instructions import InstructionFile
from kvbuffer.instcache.plan import Walks, hit_rate
from kvbuffer.instcache.predictor import Predictor

#: Workload -> (conversations in the log that its predictor is fitted to, the five bounds).
SETTINGS: dict[Workload, tuple[int, tuple[float, ...]]] = {
    COLD_START: (16_000, (6.0, 6.5, 7.0, 7.5, 8.0)),
    SKEWED: (16_000, (4.0, 5.0, 6.0, 7.0, 8.0)),
    LMSYS_LIKE: (24_000, (8.0, 10.0, 11.0, 12.0, 13.0)),
}
ARRIVALS = (500, 2_000, 10_000, 50_000)
PLANNED, FRESH = 10_000, 20_000  # instructions that the plan is made with, and that the hit rate is measured on


def history_hits(log: Iterable[str], capacity: float) -> list[bool]:
    """Which requests a cache hits that remembers, from empty, the last ``capacity`` different instructions (LRU)."""
    known: OrderedDict[str, None] = OrderedDict()
    hits = []
    for text in log:
        hits.append(text in known)
        known[text] = None
        known.move_to_end(text)
        if len(known) > capacity:
            known.popitem(last=False)
    return hits


def measure_hits(workload: Workload, folder: Path) -> dict[str, Any]:
    log_size, bounds = SETTINGS[workload]
    model = fitted(workload, folder, log_size)
    predictor = Predictor(str(model), max_tokens=32, num_bytes=1 << 28, show_progress=False)
    planned = predictor.costs(workload.sample(PLANNED, 11))
    walks = Walks(predictor, bounds[-1], 1024)
    began = time.perf_counter()
    predictor.build(folder / "found", bounds[-1])
    seconds = time.perf_counter() - began
    file = InstructionFile(folder / "found")
    found = dict(file)
    fresh, arriving = workload.sample(FRESH, 13), workload.sample(ARRIVALS[-1], 12)
    rows = []
    for bound in bounds:
        held = {text for text, cost in found.items() if cost <= bound}
        rows.append({
            "sigma": bound, "entries": len(held), "entries_predicted": walks.entries(bound)._asdict(),
            "hit_rate": float(np.mean([text in held for text in fresh])),
            "hit_rate_predicted": hit_rate(planned, bound)._asdict(),
            "best_possible": workload.best_hit_rate(len(held)),
        })  # fmt: skip
    caches = {
        "instcache": [text in found for text in arriving],
        "unbounded_history": history_hits(arriving, np.inf),
        "lru_of_equal_entries": history_hits(arriving, len(found)),
    }
    first = [
        {"requests": n, "different": len(set(arriving[:n])), **{c: float(np.mean(h[:n])) for c, h in caches.items()}}
        for n in ARRIVALS
    ]
    return {
        "entropy_nats": workload.entropy, "log_size": log_size, "rows": rows, "first_requests": first,
        "worst_difference": max(abs(row["hit_rate"] - row["hit_rate_predicted"]["value"]) for row in rows),
        "ratios_to_history": [row["instcache"] / row["unbounded_history"] for row in first],
        "build_seconds": seconds, "nodes": file.state.num_evaluated, "entries_per_second": len(found) / seconds,
    }  # fmt: skip
