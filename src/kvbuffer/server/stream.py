"""Sending an answer while watching whether anyone still listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import Request, Response

from kvbuffer.engine.async_engine import DeltaStream
from kvbuffer.errors import KVBufferError
from kvbuffer.server.errors import from_kvbuffer_error
from kvbuffer.server.reply import END_OF_STREAM, Reply, error_event

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

# Nobody reads it: nginx's code for "client closed request", for the access log.
_CLIENT_CLOSED_REQUEST = 499


@asynccontextmanager
async def closed_on_disconnect(receive: Receive, deltas: DeltaStream) -> AsyncIterator[None]:
    """Close ``deltas``, and so abort its requests, when the client goes away or the block is left."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        deltas.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        deltas.close()


class EventStream(Response):
    """Server-sent events, written without a task or a queue in between: one send for all that is ready."""

    media_type = "text/event-stream"

    def __init__(self, deltas: DeltaStream, reply: Reply) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._deltas = deltas
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; end early, without a word, when the client has gone."""
        async with closed_on_disconnect(receive, self._deltas):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for deltas in self._deltas:
                    if events := self._reply.events(deltas):
                        await send({"type": "http.response.body", "body": events, "more_body": True})
                last = self._reply.last_events()
            except KVBufferError as error:
                last = error_event(from_kvbuffer_error(error)) + END_OF_STREAM
        if not self._deltas.aborted:
            await send({"type": "http.response.body", "body": last, "more_body": False})


async def whole_answer(request: Request, deltas: DeltaStream, reply: Reply, with_logprobs: bool) -> Response:
    """Wait for all of ``deltas`` and return the answer."""
    async with closed_on_disconnect(request.receive, deltas):
        async for batch in deltas:
            reply.add(batch)
    if deltas.aborted:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    return Response(reply.body(with_logprobs), media_type="application/json")
