"""InstCache by itself: a proxy that answers what a store holds, and passes everything else to another server.

The server behind may be any with OpenAI's API. What it is sent, and what it answers, streams included, goes through
unchanged.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import ValidationError

from kvbuffer import __version__
from kvbuffer.errors import InvalidRequestError
from kvbuffer.server.app import MAX_BODY_BYTES
from kvbuffer.server.chat_protocol import ChatCompletionRequest
from kvbuffer.server.chat_reply import ChatReply
from kvbuffer.server.errors import APIError, install_error_handlers
from kvbuffer.server.instcache import InstCache, stored_response
from kvbuffer.server.instcache_metrics import InstCacheCollector
from kvbuffer.server.middleware import ApiKeyMiddleware, BodyLimitMiddleware
from kvbuffer.server.serving import chat_sampling_params, reply_options, request_id
from kvbuffer.tokenizer import Tokenizer

_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
# Belong to one connection, not to the message (RFC 9110, 7.6.1), or are set anew.
_HOP_BY_HOP = frozenset(
    {"connection", "host", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "content-length", "date"}
)


class MeanSeconds:
    """What the server behind takes for an answer, on average."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, seconds: float) -> None:
        """Count an answer."""
        self._sum += seconds
        self._count += 1

    def __call__(self, num_tokens: int) -> float:
        """Return the mean, whatever the length: what is passed on is not looked into."""
        return self._sum / max(1, self._count)


def create_proxy(
    upstream: str,
    instcache: InstCache,
    tokenizer: Tokenizer,
    model_name: str,
    api_key: str | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> FastAPI:
    """Return the ASGI application.

    Args:
        upstream: address of the server behind, with or without ``/v1``.
        instcache: the store; what it saved is counted by what the server behind takes for other answers.
        tokenizer: of the store's model.
        model_name: requests for other models are passed on.
        api_key: what clients must send as ``Authorization: Bearer``; it is passed on. None leaves that to the server
            behind, but answers from the store to everyone.
        transport: how to reach the server behind; over the network by default.
    """
    client = httpx.AsyncClient(
        base_url=upstream.rstrip("/").removesuffix("/v1"), timeout=None, transport=transport, limits=httpx.Limits()
    )
    client.headers.clear()  # what httpx would add, such as encodings that our client may not accept
    token_text = cache(lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False))
    instcache.seconds = seconds = MeanSeconds()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()
        instcache.close()

    app = FastAPI(title="kvbuffer instcache proxy", version=__version__, lifespan=lifespan)
    install_error_handlers(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=MAX_BODY_BYTES)
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    registry = CollectorRegistry()
    registry.register(InstCacheCollector(instcache, model_name))

    async def pass_on(request: Request, done: MeanSeconds | None = None) -> Response:
        headers = [(name, value) for name, value in request.headers.raw if name.decode() not in _HOP_BY_HOP]
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        outgoing = client.build_request(request.method, url, headers=headers, content=await request.body())
        began = time.perf_counter()
        try:
            answer = await client.send(outgoing, stream=True)
        except httpx.HTTPError as error:
            raise APIError(502, f"The server at {upstream} cannot be reached: {error}", code="bad_gateway") from None

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
                if done is not None and answer.is_success:
                    done.add(time.perf_counter() - began)
            finally:
                await answer.aclose()

        response = StreamingResponse(body(), status_code=answer.status_code)
        kept = [(name.lower(), value) for name, value in answer.headers.raw if name.lower().decode() not in _HOP_BY_HOP]
        response.raw_headers = kept
        return response

    def stored(raw: bytes) -> Response | None:
        try:
            body = ChatCompletionRequest.model_validate_json(raw)
            params = chat_sampling_params(body, {})
        except (ValidationError, InvalidRequestError):
            return None  # the server behind may know what this is
        if body.model not in (None, model_name):
            return None
        reply = ChatReply(
            request_id("chatcmpl", body),
            model_name,
            num_prompts=1,
            choices_per_prompt=params.n,
            token_text=token_text,
            **reply_options(body),
        )
        delta = instcache.answer(body, params, f"{reply.request_id}-0")
        return None if delta is None else stored_response(delta, reply, bool(body.stream))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Answer from the store, or pass on."""
        return stored(await request.body()) or await pass_on(request, seconds)

    @app.get("/instcache/metrics")
    async def metrics() -> Response:
        """Return the store's counters for Prometheus; ``/metrics`` is the server behind's."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.api_route("/{path:path}", methods=_METHODS, include_in_schema=False)
    async def everything_else(request: Request) -> Any:
        """Pass on."""
        return await pass_on(request)

    return app
