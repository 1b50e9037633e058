"""An application around the fake engine, in this process or behind a real port."""

from __future__ import annotations

import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest

from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.server.app import create_app
from kvbuffer.server.launch import Server, bind
from tests.server.fake_engine import FakeEngine

ClientFactory = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_client() -> ClientFactory:
    """Start the application around an engine and talk to it without a network."""

    @asynccontextmanager
    async def make(engine: FakeEngine, **app_options: Any) -> AsyncIterator[httpx.AsyncClient]:
        app = create_app(AsyncEngine(engine), **app_options)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
        ):
            yield client

    return make


@pytest.fixture
async def client(engine: FakeEngine, make_client: ClientFactory) -> AsyncIterator[httpx.AsyncClient]:
    async with make_client(engine) as client:
        yield client


@pytest.fixture
def serve_engine() -> Iterator[Callable[..., str]]:
    """Start a server on a free port and return its URL. It must stop at the end of the test."""
    running: list[tuple[Server, threading.Thread]] = []

    def serve(engine: FakeEngine, *, shutdown_timeout_s: float = 5.0, **app_options: Any) -> str:
        async_engine = AsyncEngine(engine)
        started = threading.Event()
        listener = bind("127.0.0.1", 0)
        server = Server(
            create_app(async_engine, **app_options),
            async_engine,
            shutdown_timeout_s=shutdown_timeout_s,
            on_started=started.set,
        )
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        running.append((server, thread))
        assert started.wait(10)
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield serve
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
    gc.unfreeze()
