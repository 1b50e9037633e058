"""Answers from a store in front of the engine: the engine's own, and only where the store can be sure of that."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.errors import StoreError
from kvbuffer.instcache.entry import Answer, Codec, encode
from kvbuffer.instcache.identity import Identity, Keys
from kvbuffer.instcache.store import write_store
from kvbuffer.server import instcache as instcache_module
from kvbuffer.server.app import create_app
from kvbuffer.server.instcache import InstCache
from tests.server.events import chunks
from tests.server.fake_engine import EOS, FakeEngine

SYSTEM = "be brief"
TOOL = {"type": "function", "function": {"name": "f"}}
HELLO = {"role": "user", "content": "hello"}


def identity(system_prompt: str | None) -> Identity:
    return Identity("echo", "template", system_prompt)


def put(path: Path, answers: dict[str, Answer], system_prompt: str | None = None) -> Path:
    keys = Keys(identity(system_prompt))
    entries = sorted((keys(text.encode()), encode(text.encode(), answer)) for text, answer in answers.items())
    write_store(path, identity(system_prompt), "echo", entries, Codec())
    return path


def rendered(text: str, system_prompt: str | None = None) -> str:
    return ("" if system_prompt is None else f"[system]{system_prompt}") + f"[user]{text}[assistant]"


def echoed(text: str, system_prompt: str | None = None, max_tokens: int | None = None) -> Answer:
    """What the fake engine answers, cut after ``max_tokens``."""
    prompt = list(rendered(text, system_prompt).encode())
    ids = [*prompt, EOS][:max_tokens]
    return Answer(ids, ids[-1] == EOS, len(prompt))


@asynccontextmanager
async def client_of(
    path: Path, engine: FakeEngine, **options: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, InstCache]]:
    cache = InstCache(path, identity, engine.tokenizer, engine.max_model_len, **options)  # type: ignore[arg-type]
    app = create_app(AsyncEngine(engine), instcache=cache)  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
    ):
        yield client, cache


async def chat(client: httpx.AsyncClient, *messages: dict[str, Any], **body: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": messages or [HELLO], "temperature": 0, **body})


def without_varying(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out what differs between any two answers, and the marks of a hit."""
    fields = {name: value for name, value in answer.items() if name not in ("id", "created")}
    if fields.get("usage"):
        fields["usage"] = {name: fields["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return fields


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_tokens": 5},
        {"max_completion_tokens": 24},
        {"max_tokens": 25, "return_token_ids": True},
        {"stop": ["ell"]},
        {"stop": ["ell"], "include_stop_str_in_output": True},
        {"stop": ["absent"]},
        {"stop": ["o["], "max_tokens": 11},
        {"skip_special_tokens": False},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"stream": True, "max_tokens": 7, "stop": "zzz"},
    ],
    ids=str,
)
async def test_a_stored_answer_is_the_engines(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its text, its tokens, why it ended; within every limit that a request may set."""
    path, engine = put(tmp_path / "s", {"hello": echoed("hello")}), FakeEngine()
    async with client_of(path, engine) as (client, _):
        hit = await chat(client, {"role": "user", "content": " hello "}, **options)
        assert not engine.seen
        miss = await chat(client, HELLO, {"role": "assistant", "content": ""}, HELLO)
        assert len(engine.seen) == 1
        assert "x-instcache" not in miss.headers
    async with client_of(put(tmp_path / "empty", {}), engine) as (client, _):
        computed = await chat(client, **options)
    assert hit.headers["x-instcache"] == "hit"
    assert hit.headers["content-type"] == computed.headers["content-type"]
    if not options.get("stream"):
        assert hit.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 22, "instcache_hit": True}
        assert without_varying(hit.json()) == without_varying(computed.json())
        return
    ours, theirs = ([without_varying(chunk) for chunk in chunks(r.text)] for r in (hit, computed))
    text = ["".join(c["choices"][0]["delta"].get("content", "") for c in s if c["choices"]) for s in (ours, theirs)]
    assert text[0] == text[1] != ""
    assert ours[0]["choices"][0]["delta"]["role"] == "assistant"
    with_choices = [[chunk for chunk in stream if chunk["choices"]] for stream in (ours, theirs)]
    assert with_choices[0][-1]["choices"][0]["finish_reason"] == with_choices[1][-1]["choices"][0]["finish_reason"]
    assert ours[-1].get("usage") == theirs[-1].get("usage")


async def test_an_answer_that_was_cut_serves_shorter_requests_only(tmp_path: Path) -> None:
    path, engine = put(tmp_path / "s", {"hello": echoed("hello", max_tokens=10)}), FakeEngine()
    async with client_of(path, engine) as (client, _):
        for max_tokens, is_hit in ((9, True), (10, True), (11, False), (None, False)):
            response = await chat(client, max_tokens=max_tokens)
            assert ("x-instcache" in response.headers) is is_hit
            assert response.json()["choices"][0]["finish_reason"] == ("stop" if max_tokens is None else "length")
            assert response.json()["choices"][0]["message"]["content"] == rendered("hello")[:max_tokens]


async def test_a_request_that_the_engine_refuses_is_refused(tmp_path: Path) -> None:
    path, engine = put(tmp_path / "s", {"hello": echoed("hello")}), FakeEngine(max_model_len=40)
    async with client_of(path, engine) as (client, _):
        assert (await chat(client, max_tokens=30)).status_code == 400
        assert (await chat(client, max_tokens=0)).status_code == 400
        assert (await chat(client, model="other")).status_code == 404


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ([HELLO, {"role": "assistant", "content": "hi"}, HELLO], {}, "not_a_first_turn"),
        ([{**HELLO, "name": "Ann"}], {}, "not_a_first_turn"),
        ([{"role": "system", "content": "be rude"}, HELLO], {}, "personalised"),
        ([HELLO], {}, "personalised"),
        ([None, HELLO], {"chat_template_kwargs": {"mood": "good"}}, "personalised"),
        ([None, HELLO], {"tools": [TOOL], "tool_choice": "none"}, "tools"),
        ([None, HELLO], {"logprobs": True}, "logprobs"),
        ([None, HELLO], {"prompt_logprobs": 0}, "logprobs"),
        ([None, HELLO], {"n": 2}, "several_choices"),
        ([None, HELLO], {"temperature": 0.5}, "sampled"),
        ([None, HELLO], {"temperature": None}, "sampled"),
        ([None, HELLO], {"repetition_penalty": 1.2}, "sampling_parameters"),
        ([None, HELLO], {"logit_bias": {"7": 1}}, "sampling_parameters"),
        ([None, HELLO], {"ignore_eos": True, "max_tokens": 3}, "sampling_parameters"),
        ([None, HELLO], {"min_tokens": 3}, "sampling_parameters"),
        ([None, HELLO], {"stop_token_ids": [7]}, "sampling_parameters"),
    ],
)
async def test_what_the_store_cannot_answer_bypasses_it(
    tmp_path: Path, messages: list[Any], options: dict[str, Any], reason: str
) -> None:
    path, engine = put(tmp_path / "s", {"hello": echoed("hello", SYSTEM)}, SYSTEM), FakeEngine()
    messages = [message or {"role": "system", "content": SYSTEM} for message in messages]
    async with client_of(path, engine) as (client, cache):
        response = await chat(client, *messages, **options)
        assert response.status_code == 200
        assert "x-instcache" not in response.headers
        assert engine.seen
        assert cache.stats.bypassed == {reason: 1}
        assert cache.stats.queries == 0


async def test_the_stores_own_system_prompt_and_allowed_sampling(tmp_path: Path) -> None:
    path = put(tmp_path / "s", {"hello": echoed("hello", SYSTEM)}, SYSTEM)
    async with client_of(path, FakeEngine(), allow_sampled=True) as (client, _):
        for role in ("system", "developer"):
            response = await chat(client, {"role": role, "content": SYSTEM}, HELLO, temperature=0.9, top_p=0.5)
            assert response.headers["x-instcache"] == "hit"


async def test_metrics_count_queries_hits_and_what_they_saved(tmp_path: Path) -> None:
    path = put(tmp_path / "s", {"hello": echoed("hello")})
    async with client_of(path, FakeEngine(), seconds=lambda num_tokens: 0.5 * num_tokens) as (client, _):
        await chat(client)
        await chat(client, {"role": "user", "content": "unheard of"})
        await chat(client, n=2)
        lines = (await client.get("/metrics")).text.splitlines()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("kvbuffer:instcache")}
    assert values == {
        "kvbuffer:instcache_queries_total": 2,
        "kvbuffer:instcache_hits_total": 1,
        "kvbuffer:instcache_hit_tokens_total": 23,
        "kvbuffer:instcache_hit_bytes_total": 22,
        "kvbuffer:instcache_seconds_saved_total": 11.5,
        "kvbuffer:instcache_damaged_total": 0,
        "kvbuffer:instcache_swaps_total": 0,
        "kvbuffer:instcache_bypassed_total": 1,
        "kvbuffer:instcache_entries": 1,
        "kvbuffer:instcache_bytes": path.stat().st_size,
    }


async def test_the_store_is_swapped_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instcache_module, "_SWAP_INTERVAL_S", 0.0)
    path, other = put(tmp_path / "s", {"hello": echoed("hello")}), {"role": "user", "content": "other"}

    async def hits(client: httpx.AsyncClient) -> list[bool]:
        return ["x-instcache" in (await chat(client, message)).headers for message in (HELLO, other)]

    async with client_of(path, FakeEngine()) as (client, cache):
        assert await hits(client) == [True, False]
        put(path, {"other": echoed("other")})
        assert await hits(client) == [False, True]
        put(path, {"hello": echoed("hello", SYSTEM)}, SYSTEM)
        assert await hits(client) == [False, False]  # bypassed: the system prompt is another now
        put(tmp_path / "torn", {"hello": echoed("hello")})
        (tmp_path / "torn").write_bytes((tmp_path / "torn").read_bytes()[:5000])
        put(tmp_path / "s2", {"hello": echoed("hello")})
        os.replace(tmp_path / "s2", path)
        assert await hits(client) == [True, False]
        os.replace(tmp_path / "torn", path)
        assert await hits(client) == [True, False]  # refused; the one before goes on
        path.unlink()
        assert await hits(client) == [True, False]
        assert cache.stats.swaps == 3


def test_a_store_of_another_model_is_refused_at_start(tmp_path: Path) -> None:
    path = put(tmp_path / "s", {"hello": echoed("hello")})
    with pytest.raises(StoreError, match="outdated: it was filled under another model"):
        InstCache(path, lambda prompt: Identity("m2", "template", prompt), FakeEngine().tokenizer, 100)  # type: ignore[arg-type]
