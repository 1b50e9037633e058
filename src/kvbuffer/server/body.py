"""Parsing request bodies as JSON, more strictly than Python's ``json`` does by default."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute


class StrictJSONRequest(Request):
    """A request whose JSON holds neither ``NaN`` nor strings that are not Unicode."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            HTTPException: 400, the body is JSON but holds a lone surrogate.
            ValueError: the body is not JSON, or not UTF-8.
        """
        text = (await self.body()).decode()  # json.loads itself would let encoded surrogates through
        value = json.loads(text, parse_constant=_refuse_constant)
        if ("\\ud" in text or "\\uD" in text) and _has_lone_surrogate(value):
            raise HTTPException(400, "The request body holds a string with a lone surrogate, which is not Unicode.")
        return value


class StrictJSONRoute(APIRoute):
    """A route that parses bodies with ``StrictJSONRequest``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, given our kind of request."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(StrictJSONRequest(request.scope, request.receive))

        return handle


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _has_lone_surrogate(value: Any) -> bool:
    """Walk a JSON value; pairs of surrogates are already one character here."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if not item.isascii() and any("\ud800" <= char <= "\udfff" for char in item):
                return True
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
    return False
