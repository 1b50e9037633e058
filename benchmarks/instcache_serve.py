"""Servers with stores that answer a share of what is asked, and without one: our own, and vLLM behind the proxy.

Every server is a process of its own, and so is the load generator; all share the cores. Requests are chats that stream,
so many at a time, the next as soon as one is answered.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import checkpoint
from client import complete
from instcache_workloads import SKEWED
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.instcache.fill import Filler
from kvbuffer.instcache.identity import Identity
from peers import VLLM, HttpSystem, KVBuffer

CONCURRENCY, ROUNDS, MAX_TOKENS = 8, 3, 64


class WithStore(KVBuffer):
    """This project, with a store in front of the engine."""

    def __init__(self, model: str, store: Path | None) -> None:
        super().__init__("kvbuffer" if store is None else store.name, model, CONCURRENCY)
        self._store = store

    def command(self) -> list[str]:
        store = [] if self._store is None else ["--instcache", str(self._store)]
        return [*super().command(), "--memory", "512MiB", *store]


class Proxy(HttpSystem):
    """A store in front of another server."""

    def __init__(self, behind: HttpSystem, store: Path) -> None:
        super().__init__(store.name, behind.model, CONCURRENCY)
        self._behind, self._store = behind, store

    def version(self) -> str:
        return self._behind.version()

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-c", "from kvbuffer.cli import main; main()", "instcache", "proxy"),
            *(str(checkpoint(self.model)), "--store", str(self._store), "--served-model-name", "bench"),
            *("--upstream", f"http://127.0.0.1:{self._behind.port}", "--port", str(self.port)),
        ]


def drive(server: HttpSystem, texts: Sequence[str]) -> dict[str, float]:
    """Ask a server, and time it."""
    fields = {"model": "bench", "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True}
    fields |= {"stream_options": {"include_usage": True}}
    bodies = [{"messages": [{"role": "user", "content": text}], **fields} for text in texts]
    done = complete(server.port, bodies, "/v1/chat/completions", concurrency=CONCURRENCY)
    seconds, tokens = max(one.end for one in done), sum(one.num_output_tokens for one in done)
    return {
        "seconds": seconds, "tokens": tokens, "hit_rate": float(np.mean([one.hit for one in done])),
        "tokens_per_second": tokens / seconds, "ms_per_token": 1000 * sum(one.end - one.start for one in done) / tokens,
    }  # fmt: skip


def fill_stores(
    model: str, folder: Path, num_requests: int, hit_rates: Sequence[float]
) -> tuple[list[str], list[Path]]:
    """Return what will be asked, and a store for each hit rate."""
    path = checkpoint(model)
    engine = Engine.from_config(EngineConfig(str(path), memory=1 << 29, max_queue_len=None))
    texts = list(dict.fromkeys(SKEWED.sample(20_000, 5)))[:num_requests]
    filler = Filler(engine, Identity.of(path, engine.tokenizer), model, max_tokens=MAX_TOKENS)
    stores = [folder / f"{model}-{rate:g}" for rate in hit_rates]
    for rate, store in zip(hit_rates, stores, strict=True):
        filler.fill(store, texts[: round(rate * num_requests)])
    return texts, stores


def compare(servers: Sequence[HttpSystem], texts: Sequence[str]) -> dict[str, Any]:
    """Compare servers with the first of them, which has no store."""
    rng, rounds = np.random.default_rng(0), []
    try:
        for server in servers:
            server.start()
        for number in range(ROUNDS + 1):
            asked = rng.permutation(texts).tolist()[: 4 * CONCURRENCY if number == 0 else None]
            rounds.append([drive(server, asked) for server in servers])
    finally:
        for server in servers[::-1]:
            server.stop()
    del rounds[0]  # it warmed up
    summary = []
    for i in range(1, len(servers)):
        hit_rate = rounds[0][i]["hit_rate"]
        speed_up, time = (
            float(np.median([r[0][name] / r[i][name] for r in rounds])) for name in ("seconds", "ms_per_token")
        )
        summary.append(
            {"hit_rate": hit_rate, "ideal": 1 / (1 - hit_rate), "speed_up": speed_up, "time_per_token": 1 / time}
        )
    return {"concurrency": CONCURRENCY, "max_tokens": MAX_TOKENS, "rounds": rounds, "summary": summary}


def measure_serving(folder: Path) -> dict[str, Any]:
    """Our own server, with a model that answers in no time, and with one that is 30 times as large."""
    results = {}
    for model, num_requests in (("demo", 960), ("dense", 80)):
        texts, stores = fill_stores(model, folder, num_requests, (0.5, 0.8))
        results[model] = compare([WithStore(model, store) for store in (None, *stores)], texts)
    return results


def measure_proxy(folder: Path) -> dict[str, Any]:
    """The proxy in front of vLLM, with a model of 200 million random weights."""
    texts, [store] = fill_stores("dense", folder, 64, (0.5,))
    behind = VLLM("vllm", "dense", CONCURRENCY)
    return {"vllm": behind.version(), **compare([behind, Proxy(behind, store)], texts)}
