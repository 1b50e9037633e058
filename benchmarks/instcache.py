"""InstCache: lookups, forks in the search, hit rates beside caches of history, a server with and without it.

    python benchmarks/instcache.py --parts lookup,forks --out benchmarks/results/instcache.json
    python benchmarks/instcache.py --parts hits --predictor "cold start=FOLDER" --out benchmarks/results/instcache.json

``hits`` needs a predictor per workload, trained by ``instcache_workloads.train_predictor``. Parts that are not run are
kept from the file that is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import OrderedDict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from instcache_forks import compare_forks
from instcache_workloads import COLD_START, SKEWED, Workload
from kvbuffer.bench import machine
from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.instcache.entry import Answer, Codec, encode, train_dictionary
from kvbuffer.instcache.fill import Filler
from kvbuffer.instcache.identity import Identity, Keys
from kvbuffer.instcache.instructions import InstructionFile
from kvbuffer.instcache.plan import Walks, hit_rate
from kvbuffer.instcache.predictor import Predictor
from kvbuffer.instcache.store import Store, write_store
from kvbuffer.models.weights import resolve_model
from kvbuffer.server.app import create_app
from kvbuffer.server.instcache import InstCache


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


def history_hits(log: list[str], capacity: float) -> float:
    """Hit rate of a cache that remembers, from empty, the last ``capacity`` different instructions (LRU)."""
    known: OrderedDict[str, None] = OrderedDict()
    hits = 0
    for text in log:
        hits += text in known
        known[text] = None
        known.move_to_end(text)
        if len(known) > capacity:
            known.popitem(last=False)
    return hits / len(log)


def hits(workload: Workload, model: str, folder: Path, sigma: float) -> dict[str, Any]:
    """Predict hit rates from one sample of a workload and measure them on another, at five bounds."""
    predictor = Predictor(model, max_tokens=32, num_bytes=1 << 28, show_progress=False)
    planned = predictor.costs(workload.sample(3000, 11))
    walks = Walks(predictor, sigma, 1024)
    began = time.perf_counter()
    predictor.build(folder / workload.name, sigma)
    seconds = time.perf_counter() - began
    file = InstructionFile(folder / workload.name)
    found = dict(file)
    arriving = workload.sample(500, 12)  # a server's first 500 requests
    rows = []
    for bound in np.linspace(sigma - 4, sigma, 5):
        held = {text for text, cost in found.items() if cost <= bound}
        fresh = workload.sample(20_000, 13)
        measured = sum(text in held for text in fresh) / len(fresh)
        first = sum(text in held for text in arriving) / len(arriving)
        rows.append({
            "sigma": float(bound), "entries": len(held), "entries_predicted": walks.entries(bound)._asdict(),
            "hit_rate": measured, "hit_rate_predicted": hit_rate(planned, bound)._asdict(),
            "best_possible": workload.best_hit_rate(len(held)), "first_requests": first,
            "lru_of_equal_size": history_hits(arriving, len(held)),
        })  # fmt: skip
    unbounded = history_hits(arriving, np.inf)
    return {
        "entropy_nats": workload.entropy, "different_in_first_requests": len(set(arriving)), "rows": rows,
        "unbounded_history": unbounded, "ratio_to_history": rows[-1]["first_requests"] / unbounded,
        "build_seconds": seconds, "nodes": file.state.num_evaluated, "entries_per_second": len(found) / seconds,
    }  # fmt: skip


async def drive(client: httpx.AsyncClient, texts: list[str], max_tokens: int) -> dict[str, float]:
    """Send requests, eight at a time, and time them."""
    waiting, seconds, tokens = iter(texts), [], 0

    async def worker() -> None:
        nonlocal tokens
        for text in waiting:
            body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": max_tokens}
            began = time.perf_counter()
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            seconds.append(time.perf_counter() - began)
            tokens += answer["usage"]["completion_tokens"]

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(8)))
    elapsed = time.perf_counter() - began
    return {"seconds": elapsed, "tokens": tokens, "tokens_per_second": tokens / elapsed,
            "ms_per_token": 1000 * sum(seconds) / tokens}  # fmt: skip


def serve(folder: Path, requests: int = 160, max_tokens: int = 24) -> dict[str, Any]:
    """The demo model behind the API, with a store of about half of what is asked and without, in turns."""
    engine = Engine.from_config(EngineConfig("demo", memory=1 << 29, max_queue_len=None, enable_prefix_caching=False))
    texts = list(dict.fromkeys(SKEWED.sample(6000, 5)))[:requests]
    identity = partial(Identity.of, resolve_model("demo"), engine.tokenizer)
    Filler(engine, identity(), "demo", max_tokens=max_tokens).fill(folder / "served", texts[: requests // 2])

    async def run() -> list[dict[str, Any]]:
        cache = InstCache(folder / "served", identity, engine.tokenizer, engine.max_model_len)
        shared, rounds = AsyncEngine(engine), []
        apps = {"without": create_app(shared), "with": create_app(shared, instcache=cache)}
        shared.start()
        rng = np.random.default_rng(0)
        for number in range(4):
            name = ("without", "with")[number % 2]
            transport = httpx.ASGITransport(apps[name])
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
                if not number:
                    await drive(client, texts[:16], max_tokens)
                rounds.append({"system": name, **await drive(client, rng.permutation(texts).tolist(), max_tokens)})
        await shared.shutdown()
        cache.close()
        return rounds

    rounds = asyncio.run(run())
    speed = {name: np.median([r["seconds"] for r in rounds if r["system"] == name]) for name in ("without", "with")}
    return {"rounds": rounds, "hit_rate": 0.5, "speed_up": float(speed["without"] / speed["with"]), "ideal": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="lookup,forks,serve")
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--predictor", action="append", default=[], help="WORKLOAD=FOLDER")
    parser.add_argument("--sigma", type=float, default=8.0)
    parser.add_argument("--work", type=Path, help="Folder for what is made on the way; default: a temporary one.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
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
            models = dict(pair.split("=", 1) for pair in options.predictor)
            made["hits"] = {
                w.name: hits(w, models[w.name], folder, options.sigma) for w in (COLD_START, SKEWED) if w.name in models
            }
        if "serve" in parts:
            made["serve"] = serve(folder)
    date, threads = datetime.now(UTC).isoformat(timespec="seconds"), torch.get_num_threads()
    about = {"date": date, "commit": machine.commit(), "threads": threads}
    for part, result in made.items():
        results[part] = {**about, **result}
    results["machine"] = machine.describe()
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
