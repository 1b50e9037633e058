"""The application: which path leads where."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kvbuffer import __version__
from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.server.body import StrictJSONRoute
from kvbuffer.server.chat_protocol import ChatCompletionRequest, TokenizeRequest
from kvbuffer.server.errors import APIError, install_error_handlers
from kvbuffer.server.instcache import InstCache
from kvbuffer.server.instcache_metrics import InstCacheCollector
from kvbuffer.server.metrics import make_registry
from kvbuffer.server.middleware import ApiKeyMiddleware, BodyLimitMiddleware
from kvbuffer.server.prompts import PromptEncoder
from kvbuffer.server.protocol import CompletionRequest, DetokenizeRequest, TokenizeTextRequest
from kvbuffer.server.serving import Serving
from kvbuffer.server.tools import CallStyle

#: Far above any prompt, far below what parsing could not bear.
MAX_BODY_BYTES = 32 * 2**20


def create_app(
    engine: AsyncEngine,
    *,
    api_key: str | None = None,
    chat_template: str | None = None,
    call_style: CallStyle | None = None,
    tells_thoughts: bool = True,
    instcache: InstCache | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """Return the ASGI application; its lifespan starts and stops ``engine``.

    Args:
        engine: serves the requests; not yet started.
        api_key: what clients must send as ``Authorization: Bearer``; None lets everyone in.
        chat_template: Jinja source that replaces the model's own chat template.
        call_style: how the model writes calls of tools; None: as the chat template says.
        tells_thoughts: whether a model's thoughts are told from its answer.
        instcache: answers first turns that were predicted.
        max_body_bytes: larger bodies are answered with 413.
    """
    prompts = PromptEncoder(engine.engine.tokenizer, chat_template, call_style, tells_thoughts)
    serving = Serving(engine, prompts, instcache)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.shutdown()
        serving.prompts.close()
        if instcache is not None:
            instcache.close()

    app = FastAPI(title="kvbuffer", version=__version__, lifespan=lifespan)
    app.router.route_class = StrictJSONRoute
    install_error_handlers(app)
    app.add_middleware(BodyLimitMiddleware, max_bytes=max_body_bytes)
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    _add_openai_routes(app, serving)
    _add_token_routes(app, serving)
    _add_operations_routes(app, serving)
    return app


def _add_openai_routes(app: FastAPI, serving: Serving) -> None:
    created = int(time.time())

    def model_card() -> dict[str, Any]:
        return {
            "id": serving.model_name,
            "object": "model",
            "created": created,
            "owned_by": "kvbuffer",
            "root": serving.engine.engine.config.model,
            "parent": None,
            "max_model_len": serving.engine.engine.max_model_len,
        }

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Continue a conversation."""
        return await serving.chat(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids."""
        return await serving.complete(body, request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """Return the one model served."""
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        """Return the model served, if that is its name."""
        serving.check_model(name)
        return model_card()


def _add_token_routes(app: FastAPI, serving: Serving) -> None:
    tokenizer = serving.engine.engine.tokenizer

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Return the token ids of a text (``prompt``) or of a conversation (``messages``)."""
        serving.check_model(body.model)
        if isinstance(body, TokenizeTextRequest):
            [tokens] = await serving.prompts.encode([body.prompt], body.add_special_tokens)
        else:
            tokens = await serving.prompts.render(body)
        return {
            "count": len(tokens),
            "max_model_len": serving.engine.engine.max_model_len,
            "tokens": tokens,
            "token_strs": [serving.token_text(token) for token in tokens] if body.return_token_strs else None,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """Return the text of token ids, special tokens included."""
        serving.check_model(body.model)
        serving.check_token_ids(body.tokens, "tokens")
        return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _add_operations_routes(app: FastAPI, serving: Serving) -> None:
    registry = make_registry(serving.engine, serving.model_name)
    if serving.instcache is not None:
        registry.register(InstCacheCollector(serving.instcache, serving.model_name))

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        """Answer 200 while requests can be served, 503 after the engine has failed."""
        if serving.engine.failed:
            raise APIError(503, "The engine has failed; restart the server.", code="service_unavailable")
        return Response()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of this package."""
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return counters, gauges and histograms for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
