"""What every request passes before it is parsed: the API key, the limit on the body's size.

Plain ASGI classes: Starlette's ``BaseHTTPMiddleware`` would put a queue and a task between every streamed
token and its client.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from kvbuffer.server.errors import APIError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Probes of load balancers carry no key.
OPEN_PATHS = frozenset({"/health", "/ping"})


class ApiKeyMiddleware:
    """Refuses requests that do not carry ``Authorization: Bearer <key>``."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                message = "Wrong API key." if given else "This server needs an API key: Authorization: Bearer KEY."
                headers = {"WWW-Authenticate": "Bearer"}
                error = APIError(401, message, code="invalid_api_key", headers=headers)
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimitMiddleware:
    """Refuses bodies larger than ``max_bytes`` with 413, announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what is received."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"The request body is larger than {self._max_bytes} bytes."
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_bytes:
            await APIError(413, message, headers={"Connection": "close"}).response()(scope, receive, send)
            return
        received = 0

        async def counted_receive() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, message, {"Connection": "close"})
            return part

        await self._app(scope, counted_receive, send)
