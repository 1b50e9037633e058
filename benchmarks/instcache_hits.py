"""Hit rates as they were planned and as they come out, beside caches that remember what was asked."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instcache_workloads import COLD_START, LMSYS_LIKE, SKEWED, Workload, fitted, log_of
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.instcache.entry import Codec, encode, train_dictionary
from kvbuffer.instcache.fill import Filler
from kvbuffer.instcache.identity import Identity
from kvbuffer.instcache.instructions import InstructionFile
from kvbuffer.instcache.plan import Walks, hit_rate
from kvbuffer.instcache.predictor import Predictor
from kvbuffer.instcache.store import Store
from kvbuffer.models.weights import resolve_model

#: Workload -> (conversations in the log that its predictor is fitted to, the five bounds).
SETTINGS: dict[Workload, tuple[int, tuple[float, ...]]] = {
    COLD_START: (16_000, (10.0, 11.0, 11.5, 12.0, 13.0)),
    SKEWED: (16_000, (4.0, 6.0, 8.0, 9.0, 10.0)),
    LMSYS_LIKE: (24_000, (8.0, 10.0, 12.0, 13.0, 14.0)),
}
ARRIVALS = (500, 2_000, 10_000, 50_000)
PLANNED, FRESH = 10_000, 20_000  # instructions that the plan is made with, and that the hit rate is measured on
TARGET = 2.3  # times the hits of any cache of history, as the paper has it
SIZED, ANSWER_TOKENS, KEY_BYTES = 300, 64, 16  # instructions whose entries are measured, and what is measured of them


def history_hits(log: Iterable[str], capacity: float) -> np.ndarray:
    """Which requests a cache hits that remembers, from empty, the last ``capacity`` different instructions (LRU)."""
    known: OrderedDict[str, None] = OrderedDict()
    hits = []
    for text in log:
        hits.append(text in known)
        known[text] = None
        known.move_to_end(text)
        if len(known) > capacity:
            known.popitem(last=False)
    return np.array(hits)


def entry_bytes(path: Path, *samples: Sequence[str]) -> list[float]:
    """Bytes per entry of instructions with the demo model's answers, of each sample, compressed as a store does."""
    folder = resolve_model("demo")
    engine = Engine.from_config(EngineConfig("demo", memory=1 << 29, max_queue_len=None))
    Filler(engine, Identity.of(folder, engine.tokenizer), "demo", max_tokens=ANSWER_TOKENS).fill(
        path, itertools.chain(*samples)
    )
    store = Store(path)
    answers = dict(store.answers())
    store.close()
    entries = [[encode(text.encode(), answers[text]) for text in sample] for sample in samples]
    codec = Codec(train_dictionary(list(itertools.chain(*entries))))
    return [KEY_BYTES + float(np.mean([len(codec.compress(entry)) for entry in part])) for part in entries]


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
    log, fresh, arriving = log_of(workload, log_size), workload.sample(FRESH, 13), workload.sample(ARRIVALS[-1], 12)
    rng = np.random.default_rng(0)
    asked = list(dict.fromkeys(arriving))
    samples = [rng.choice(texts, min(SIZED, len(texts)), replace=False).tolist() for texts in (list(found), asked)]
    of_store, of_history = entry_bytes(folder / "sized", *samples)
    rows = []
    for bound in bounds:
        held = {text for text, cost in found.items() if cost <= bound}
        equal = int(len(held) * of_store / of_history)
        rows.append({
            "sigma": bound, "entries": len(held), "entries_predicted": walks.entries(bound)._asdict(),
            "hit_rate": float(np.mean([text in held for text in fresh])),
            "hit_rate_predicted": hit_rate(planned, bound)._asdict(),
            "best_possible": workload.best_hit_rate(len(held)),
            "lru_entries": equal, "lru_of_equal_bytes": float(history_hits([*log, *fresh], equal)[-FRESH:].mean()),
        })  # fmt: skip
    ours = np.array([text in found for text in arriving])
    histories = {
        "history": history_hits(arriving, np.inf),
        "history_after_log": history_hits([*log, *arriving], np.inf)[len(log) :],
    }
    first = [
        {"requests": n, "different": len(set(arriving[:n])), "instcache": float(ours[:n].mean()),
         **{name: float(hits[:n].mean()) for name, hits in histories.items()}}
        for n in ARRIVALS
    ]  # fmt: skip
    return {
        "entropy_nats": workload.entropy, "instructions": workload.size, "log_size": log_size,
        "bytes_per_entry": {"store": of_store, "history": of_history}, "rows": rows, "first_requests": first,
        "times_history": [row["instcache"] / row["history"] for row in first],
        "target": TARGET, "requests_on_target": {name: _on_target(ours, hits) for name, hits in histories.items()},
        "worst_difference": max(abs(row["hit_rate"] - row["hit_rate_predicted"]["value"]) for row in rows),
        "build_seconds": seconds, "nodes": file.state.num_evaluated, "entries_per_second": len(found) / seconds,
    }  # fmt: skip


def _on_target(ours: np.ndarray, theirs: np.ndarray) -> int:
    """After how many requests, at the latest, ours had so many times as many hits."""
    return int(np.nonzero(np.cumsum(ours) >= TARGET * np.cumsum(theirs))[0].max(initial=-1)) + 1
