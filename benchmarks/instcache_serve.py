"""The demo model behind the API, with stores that answer a share of what is asked and without one, in turns."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from instcache_workloads import SKEWED
from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.instcache.fill import Filler
from kvbuffer.instcache.identity import Identity
from kvbuffer.models.weights import resolve_model
from kvbuffer.server.app import create_app
from kvbuffer.server.instcache import InstCache

HIT_RATES = (0.5, 0.8)
REQUESTS, MAX_TOKENS, CONCURRENCY, ROUNDS = 320, 24, 8, 3


async def drive(client: httpx.AsyncClient, texts: list[str]) -> dict[str, float]:
    """Send requests, eight at a time, and time them."""
    waiting, seconds, tokens, hits = iter(texts), [], 0, 0

    async def worker() -> None:
        nonlocal tokens, hits
        for text in waiting:
            body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": MAX_TOKENS}
            began = time.perf_counter()
            response = await client.post("/v1/chat/completions", json=body)
            seconds.append(time.perf_counter() - began)
            tokens += response.json()["usage"]["completion_tokens"]
            hits += "x-instcache" in response.headers

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(CONCURRENCY)))
    elapsed = time.perf_counter() - began
    return {"seconds": elapsed, "tokens": tokens, "hit_rate": hits / len(texts), "tokens_per_second": tokens / elapsed,
            "ms_per_token": 1000 * sum(seconds) / tokens}  # fmt: skip


def fill_stores(folder: Path) -> tuple[Engine, list[str], list[Path]]:
    """Return the engine, what will be asked, and a store for each hit rate."""
    engine = Engine.from_config(EngineConfig("demo", memory=1 << 29, max_queue_len=None, enable_prefix_caching=False))
    texts = list(dict.fromkeys(SKEWED.sample(20_000, 5)))[:REQUESTS]
    filler = Filler(engine, Identity.of(resolve_model("demo"), engine.tokenizer), "demo", max_tokens=MAX_TOKENS)
    stores = [folder / f"served-{rate:g}" for rate in HIT_RATES]
    for rate, store in zip(HIT_RATES, stores, strict=True):
        filler.fill(store, texts[: round(rate * REQUESTS)])
    return engine, texts, stores


def measure_serving(folder: Path) -> dict[str, Any]:
    engine, texts, stores = fill_stores(folder)
    identity = partial(Identity.of, resolve_model("demo"), engine.tokenizer)

    async def run() -> list[list[dict[str, float]]]:
        shared, rng = AsyncEngine(engine), np.random.default_rng(0)
        caches = [InstCache(store, identity, engine.tokenizer, engine.max_model_len) for store in stores]
        systems = [create_app(shared, instcache=cache) for cache in (None, *caches)]
        shared.start()
        rounds = []
        for number in range(ROUNDS + 1):
            order = rng.permutation(texts).tolist()[: 4 * CONCURRENCY if number == 0 else None]
            rounds.append([])
            for system in systems:
                transport = httpx.ASGITransport(system)
                async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
                    rounds[-1].append(await drive(client, order))
        await shared.shutdown()
        for cache in caches:
            cache.close()
        return rounds[1:]  # the first warms up

    rounds = asyncio.run(run())
    summary = []
    for i in range(1, len(rounds[0])):
        hit_rate = rounds[0][i]["hit_rate"]
        ratios = {
            name: float(np.median([r[0][name] / r[i][name] for r in rounds])) for name in ("seconds", "ms_per_token")
        }
        summary.append({"hit_rate": hit_rate, "ideal": 1 / (1 - hit_rate), "speed_up": ratios["seconds"],
                        "time_per_token": 1 / ratios["ms_per_token"]})  # fmt: skip
    return {"concurrency": CONCURRENCY, "rounds": rounds, "summary": summary}
