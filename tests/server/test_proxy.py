"""The proxy: hits never reach the server behind, everything else reaches it and comes back unchanged."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.server.app import create_app
from kvbuffer.server.instcache import InstCache
from kvbuffer.server.proxy import create_proxy
from tests.server.events import chunks
from tests.server.fake_engine import FakeEngine
from tests.server.test_instcache import chat, echoed, identity, put, rendered

OTHER = {"role": "user", "content": "other"}


@asynccontextmanager
async def proxied(path: Path, behind: Any, api_key: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    tokenizer: Any = FakeEngine().tokenizer
    cache = InstCache(path, identity, tokenizer, 4096)
    transport = behind if isinstance(behind, httpx.AsyncBaseTransport) else httpx.ASGITransport(behind)
    app = create_proxy("http://behind/v1", cache, tokenizer, "echo", api_key, transport)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client,
    ):
        yield client


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return put(tmp_path / "s", {"hello": echoed("hello")})


async def test_in_front_of_a_server(store: Path) -> None:
    engine = FakeEngine()
    behind = create_app(AsyncEngine(engine))  # type: ignore[arg-type]
    async with behind.router.lifespan_context(behind), proxied(store, behind) as client:
        hit = await chat(client)
        assert hit.headers["x-instcache"] == "hit"
        assert hit.json()["choices"][0]["message"]["content"] == rendered("hello")
        assert chunks((await chat(client, stream=True)).text)[-1]["choices"][0]["finish_reason"] == "stop"
        assert not engine.seen
        miss = await chat(client, OTHER)
        assert "x-instcache" not in miss.headers
        assert miss.json()["choices"][0]["message"]["content"] == rendered("other")
        events = chunks((await chat(client, OTHER, stream=True)).text)
        assert "".join(event["choices"][0]["delta"]["content"] for event in events) == rendered("other")
        assert len(engine.seen) == 2
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "echo"
        assert (await chat(client, model="unknown")).status_code == 404
        assert (await chat(client, unknown_field=1)).status_code == 400
        assert "kvbuffer:instcache_hits_total" in (await client.get("/instcache/metrics")).text
        assert "kvbuffer:generation_tokens_total" in (await client.get("/metrics")).text


async def test_requests_and_answers_pass_unchanged(store: Path) -> None:
    seen: list[tuple[str, str, bytes, dict[str, str]]] = []
    behind = FastAPI()

    @behind.api_route("/{path:path}", methods=["POST", "DELETE"])
    async def any_path(request: Request) -> Response:
        seen.append((request.method, str(request.url), await request.body(), dict(request.headers)))
        headers = {"X-Own": "1", "Set-Cookie": "a=b", "Date": "set by every server"}
        return Response(b"\x00 raw", status_code=418, media_type="application/x-odd", headers=headers)

    async with proxied(store, behind) as client:
        body = b'{"messages": "not for us", "odd": [1,  2]}'
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json", "Accept-Encoding": "br"}
        del client.headers["User-Agent"]
        for method, url in (("POST", "/v1/chat/completions?x=%20y"), ("DELETE", "/v1/files/a%2Fb")):
            answer = await client.request(method, url, content=body, headers=headers)
            assert (answer.status_code, answer.content) == (418, b"\x00 raw")
            assert (answer.headers["x-own"], answer.headers["set-cookie"]) == ("1", "a=b")
            assert answer.headers["content-type"] == "application/x-odd"
            assert "date" not in answer.headers
    assert [(method, sent) for method, _, sent, _ in seen] == [("POST", body), ("DELETE", body)]
    assert seen[0][1] == "http://behind/v1/chat/completions?x=%20y"
    assert all(headers["authorization"] == "Bearer k" for *_, headers in seen)
    assert all(headers["accept-encoding"] == "br" for *_, headers in seen)
    assert all("user-agent" not in headers for *_, headers in seen)  # none is made up


async def test_a_key_is_needed_for_hits_too(store: Path) -> None:
    async with proxied(store, FastAPI(), api_key="k") as client:
        assert (await chat(client)).status_code == 401
        client.headers["Authorization"] = "Bearer k"
        assert (await chat(client)).headers["x-instcache"] == "hit"


async def test_a_server_that_is_away_is_502(store: Path) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async with proxied(store, httpx.MockTransport(refuse)) as client:
        assert (await chat(client)).headers["x-instcache"] == "hit"
        answer = await chat(client, OTHER)
        assert answer.status_code == 502
        assert "cannot be reached" in json.loads(answer.content)["error"]["message"]
