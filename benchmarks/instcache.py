"""InstCache: lookups, forks in the search, hit rates beside caches of history, exactness, servers with and without it.

    python benchmarks/instcache.py --parts lookup,forks --out benchmarks/results/instcache.json
    python benchmarks/instcache.py --parts hits --work FOLDER --out benchmarks/results/instcache.json

``hits`` fits a predictor to a log of each workload first, which takes some minutes; those in FOLDER are taken.
``proxy`` needs vLLM (benchmarks/setup_peers.sh vllm). What is not run is kept from the file that is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from instcache_exact import check_exactness
from instcache_forks import compare_forks
from instcache_hits import measure_hits
from instcache_serve import measure_proxy, measure_serving
from instcache_workloads import WORKLOADS
from kvbuffer.bench import machine
from kvbuffer.instcache.entry import Answer, Codec, encode, train_dictionary
from kvbuffer.instcache.identity import Identity, Keys
from kvbuffer.instcache.store import Store, write_store


def percentiles(seconds: list[int]) -> dict[str, float]:
    """Of nanoseconds, in microseconds."""
    return {f"p{p:g}": round(float(np.percentile(seconds, p)) / 1000, 2) for p in (50, 90, 99, 99.9)}


def lookup(folder: Path, entries: int, lookups: int = 200_000) -> dict[str, Any]:
    """Time lookups in a store of many answers with the token statistics of the demo model's documentation."""
    rng = np.random.default_rng(0)
    identity = Identity("m", "t")
    key = Keys(identity)
    words = [f"word{i}" for i in range(4000)]
    phrases = rng.integers(3, 4096, (3000, 12))  # answers share phrases, as texts do
    texts = [f"{words[i % 4000]} {words[i // 4000]} {words[(i * 7919) % 4000]}" for i in range(entries)]

    def entry(text: str, i: int) -> bytes:
        ids = phrases[rng.integers(0, 3000, 4)].ravel().tolist()
        return encode(text.encode(), Answer([*ids, 2], True, 20 + i % 10))

    path = folder / f"lookup-{entries}"
    if not path.exists():  # it may be written first, so that only lookups are timed on a quiet machine
        codec = Codec(train_dictionary([entry(text, i) for i, text in enumerate(texts[:5000])]))
        order = sorted((key(text.encode()), i) for i, text in enumerate(texts))
        write_store(path, identity, "m", ((k, entry(texts[i], i)) for k, i in order), codec)
    store = Store(path)
    hits, misses = [], []
    for i in rng.integers(0, entries, lookups).tolist():
        before = time.perf_counter_ns()
        found = store.get(texts[i])
        hits.append(time.perf_counter_ns() - before)
        assert found is not None
    for i in range(lookups // 4):
        text = f"{words[i % 4000]} nowhere {i}"
        before = time.perf_counter_ns()
        found = store.get(text)
        misses.append(time.perf_counter_ns() - before)
        assert found is None
    return {
        "entries": entries, "bytes": store.num_bytes, "bytes_per_entry": round(store.num_bytes / entries, 1),
        "tokens_per_answer": 49, "hit_us": percentiles(hits),
        "miss_us": percentiles(misses),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="lookup,forks,hits,exact,serve,proxy")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="Folder for what is made on the way; default: a temporary one.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    logging.set_verbosity_error()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    parts = options.parts.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = options.work or Path(name)
        made: dict[str, Any] = {}
        if "lookup" in parts:
            made["lookup"] = lookup(folder, options.entries)
        if "forks" in parts:
            made["forks"] = compare_forks(folder)
        if "hits" in parts:
            made["hits"] = {w.name: measure_hits(w, folder / w.name.replace(" ", "-")) for w in WORKLOADS}
        if "exact" in parts:
            made["exact"] = check_exactness(folder)
        if "serve" in parts:
            made["serve"] = measure_serving(folder)
        if "proxy" in parts:
            made["proxy"] = measure_proxy(folder)
    date, threads = datetime.now(UTC).isoformat(timespec="seconds"), torch.get_num_threads()
    about = {"date": date, "commit": machine.commit(), "threads": threads}
    for part, result in made.items():
        results[part] = {**about, **result}
    results["machine"] = machine.describe()
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
