"""The engine for asyncio: one thread steps it, the event loop submits requests and receives deltas.

The two sides meet in two places only. Commands (add, abort, stop) go to the engine's thread through one
queue; what a step produced comes back in one ``call_soon_threadsafe``, whatever the number of requests.
Everything else in this file belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from kvbuffer.engine.request import DEFAULT_OPTIONS, CompletionDelta, FinishReason, RequestOptions
from kvbuffer.engine.request_metrics import RequestMetrics, RequestTimes
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.errors import InvalidRequestError, KVBufferError, QueueFullError

if TYPE_CHECKING:
    from kvbuffer.engine.engine import Engine

logger = logging.getLogger(__name__)

# How long a thread may keep the interpreter lock while the other waits for it. The default of 5 ms is longer
# than a decode step of a small model: the engine would lose that much each time it comes back from a kernel
# while the event loop is writing to clients.
_SWITCH_INTERVAL_S = 0.0005

# A step cannot be interrupted; this is how long shutdown waits for the last one, and for the cache to be saved.
_LAST_STEP_TIMEOUT_S = 120.0


class EngineStoppedError(KVBufferError):
    """The engine takes no requests: it failed, is shutting down, or was never started."""


class EngineInput(NamedTuple):
    """One request to the engine."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    options: RequestOptions = DEFAULT_OPTIONS


class DeltaStream:
    """The deltas of one or more engine requests, in the order in which the engine produced them.

    Iterate to receive lists of deltas: all that arrived since the last one, so a slow reader catches up at
    once. The iteration ends when every request has finished or after ``close``, and raises the engine's error
    when it failed. Leaving the ``async with`` block aborts whatever is still running.

    Attributes:
        aborted: whether ``close`` came before the end.
    """

    def __init__(self, engine: AsyncEngine, request_ids: Iterable[str]) -> None:
        self._engine = engine
        self._unfinished = set(request_ids)
        self._ready: list[CompletionDelta] = []
        self._accepted = False
        self.aborted = False
        self._error: KVBufferError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def __aenter__(self) -> DeltaStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> list[CompletionDelta]:
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self._unfinished:
                raise StopAsyncIteration
            await self._wait()
        deltas, self._ready = self._ready, []
        return deltas

    def close(self) -> None:
        """Abort the requests that have not finished and end the iteration."""
        if self._unfinished:
            self.aborted = True
            self._engine._abort(self._unfinished)
            self._unfinished = set()
            self._wake()

    async def _until_accepted(self) -> None:
        while not self._accepted:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _accept(self) -> None:
        self._accepted = True
        self._wake()

    def _push(self, delta: CompletionDelta) -> None:
        self._ready.append(delta)
        if delta.finish_reason is not None:
            self._unfinished.discard(delta.request_id)
        self._wake()

    def _fail(self, error: KVBufferError) -> None:
        self._error = error
        self._unfinished = set()
        self._wake()


class _Tracked(NamedTuple):
    stream: DeltaStream
    times: RequestTimes


class AsyncEngine:
    """Runs an ``Engine`` in a thread of its own; all methods are for the event loop's thread.

    Attributes:
        engine: the engine; while the thread runs, only its constant attributes and counters may be read.
        metrics: totals over all requests.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.metrics = RequestMetrics()
        self._requests: dict[str, _Tracked] = {}
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._refusal: str | None = "The engine has not been started."
        self._failed = False
        # Used by the engine's thread only.
        self._running = True
        self._answers: list[tuple[DeltaStream, KVBufferError | None]] = []
        self._deltas: list[CompletionDelta] = []

    @property
    def failed(self) -> bool:
        """Whether a step raised; nothing can be served any more."""
        return self._failed

    @property
    def num_unfinished_requests(self) -> int:
        """Requests submitted and neither finished nor aborted."""
        return len(self._requests)

    def start(self) -> None:
        """Start the engine's thread; call it from the running event loop."""
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="kvbuffer-engine", daemon=True)
        self._refusal = None
        self._thread.start()

    async def submit(self, inputs: Sequence[EngineInput]) -> DeltaStream:
        """Hand requests to the engine and return their deltas once it has accepted all of them.

        Raises:
            InvalidRequestError: the engine refused one of them; none runs.
            QueueFullError: too many requests wait; none runs.
            EngineStoppedError: the engine takes no requests.
        """
        if self._refusal is not None:
            raise EngineStoppedError(self._refusal)
        stream = DeltaStream(self, (request.request_id for request in inputs))
        if len(stream._unfinished) < len(inputs) or not self._requests.keys().isdisjoint(stream._unfinished):
            raise InvalidRequestError("A request with this id is already running.", "request_id")
        for request in inputs:
            self._requests[request.request_id] = _Tracked(stream, RequestTimes())
        self._inbox.put(partial(self._add, stream, inputs))
        try:
            await stream._until_accepted()
        except BaseException:
            stream.close()
            raise
        return stream

    async def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[CompletionDelta]:
        """Yield one request's deltas; closing or cancelling the iteration aborts the request.

        Raises:
            InvalidRequestError: the engine refused the request.
            EngineStoppedError: the engine takes no requests, or stopped before this one finished.
        """
        async with await self.submit([EngineInput(request_id, prompt_token_ids, params)]) as stream:
            async for deltas in stream:
                for delta in deltas:
                    yield delta

    async def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        """Stop the thread: refuse new requests, give the running ones ``drain_timeout_s``, fail the rest."""
        self._refusal = self._refusal or "The server is shutting down."
        deadline = time.monotonic() + drain_timeout_s
        while self._requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._fail_all("The server is shutting down: this request was stopped before it finished.")
        self._inbox.put(self._stop)
        deadline = time.monotonic() + _LAST_STEP_TIMEOUT_S
        while self._thread is not None and self._thread.is_alive():
            if time.monotonic() > deadline:
                logger.error("The engine's last step did not end within %.0f s; leaving it.", _LAST_STEP_TIMEOUT_S)
                return
            await asyncio.sleep(0.005)

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            del self._requests[request_id]
            self.metrics.finished[FinishReason.ABORT.value] += 1
            self._inbox.put(partial(self.engine.abort_request, request_id))

    def _deliver(self, answers: list[tuple[DeltaStream, KVBufferError | None]], deltas: list[CompletionDelta]) -> None:
        now = time.monotonic()
        for stream, error in answers:
            if error is None:
                stream._accept()
            else:
                if isinstance(error, QueueFullError):
                    self.metrics.rejected[error.reason] += len(stream._unfinished)
                for request_id in stream._unfinished:
                    del self._requests[request_id]
                stream._fail(error)
        for delta in deltas:
            tracked = self._requests.get(delta.request_id)
            if tracked is None:  # aborted after the step that made this delta began
                continue
            self.metrics.observe(tracked.times, delta, now)
            if delta.finish_reason is not None:
                del self._requests[delta.request_id]
            tracked.stream._push(delta)

    def _fail_all(self, message: str) -> None:
        tracked, self._requests = self._requests, {}
        self.metrics.finished[FinishReason.ABORT.value] += len(tracked)
        for stream in {entry.stream for entry in tracked.values()}:
            stream._fail(EngineStoppedError(message))

    def _on_failure(self, error: BaseException) -> None:
        self._failed = True
        self._refusal = f"The engine stopped because of an internal error ({type(error).__name__}: {error})."
        self._fail_all(self._refusal)

    # What follows runs in the engine's thread.

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        # What a step gave is posted when the next one is about to be computed. The event loop then has the interpreter
        # to itself; earlier, it would take turns with the scheduling of that step and delay it.
        post = partial(self._post, loop)
        try:
            while self._running:
                if not self.engine.has_work():
                    post()
                    while self._inbox.empty() and self.engine.prepare():
                        pass
                    self._inbox.get()()  # sleeps until there is something to do
                while not self._inbox.empty():
                    self._inbox.get()()
                if self._running and self.engine.has_work():
                    self._deltas = self.engine.step(before_computing=post)
            post()
            self.engine.close()
        except BaseException as error:
            logger.exception("The engine failed; every running request fails with it.")
            post()
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._on_failure, error)

    def _post(self, loop: asyncio.AbstractEventLoop) -> None:
        if (self._answers or self._deltas) and not loop.is_closed():
            loop.call_soon_threadsafe(self._deliver, self._answers, self._deltas)
            self._answers, self._deltas = [], []

    def _add(self, stream: DeltaStream, inputs: Sequence[EngineInput]) -> None:
        added = []
        try:
            for request in inputs:
                self.engine.add_request(*request)
                added.append(request.request_id)
        except Exception as error:
            for request_id in added:
                self.engine.abort_request(request_id)
            if not isinstance(error, KVBufferError):
                logger.exception("The engine could not add request %s.", inputs[len(added)].request_id)
                error = KVBufferError("The request failed with an internal error; the server's log has the details.")
            self._answers.append((stream, error))
        else:
            self._answers.append((stream, None))

    def _stop(self) -> None:
        self._running = False
