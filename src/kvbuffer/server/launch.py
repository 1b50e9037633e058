"""Running the application under uvicorn, from binding the port to a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI

from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.errors import ConfigError

T = TypeVar("T")

# After the engine has ended the running requests, their last bytes and connections get this long.
_CLOSING_TIMEOUT_S = 5

# Longer than the idle time after which common load balancers and client pools drop a connection (60 s), so
# that it is they who close it: the other way round, a request can meet a connection that just closed.
_KEEP_ALIVE_S = 75


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet, so that a taken port is found before a model is loaded.

    Raises:
        ConfigError: the address cannot be bound.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        hint = " (is another server running?)" if in_use else ""
        raise ConfigError(f"Cannot listen on {host}:{port}: {error}{hint}") from error
    return listener


def uvicorn_config(app: FastAPI, log_level: str = "warning", **options: Any) -> uvicorn.Config:
    """Return how uvicorn is to run an application; ``options`` are more of its own."""
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        proxy_headers=False,
        lifespan="on",
        log_level=log_level,
        access_log=log_level in ("debug", "trace"),
        timeout_keep_alive=_KEEP_ALIVE_S,
        **options,
    )


class Server(uvicorn.Server):
    """uvicorn that lets running requests finish, ends the rest in an orderly way and exits with status 0.

    Args:
        app: the application around ``engine``.
        engine: where the running requests are.
        shutdown_timeout_s: how long they may go on after SIGINT or SIGTERM. A second SIGINT ends everything.
        log_level: uvicorn's.
        on_started: called once the server accepts connections.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: AsyncEngine,
        *,
        shutdown_timeout_s: float = 30.0,
        log_level: str = "warning",
        on_started: Callable[[], None] = lambda: None,
    ) -> None:
        graceful = int(shutdown_timeout_s) + _CLOSING_TIMEOUT_S
        super().__init__(uvicorn_config(app, log_level, timeout_graceful_shutdown=graceful))
        self._engine = engine
        self._shutdown_timeout_s = shutdown_timeout_s
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say so."""
        await super().startup(sockets)
        if self.started:
            # What has been loaded stays. To look at it in a full collection takes 0.1 s, in which no request goes on.
            gc.collect()
            gc.freeze()
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting connections and wind down the requests while uvicorn waits for theirs to close."""
        winding_down = asyncio.create_task(self._engine.shutdown(self._shutdown_timeout_s))
        await super().shutdown(sockets)
        if not self.force_exit:
            await winding_down

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests to stop; unlike uvicorn, do not raise them again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)


def call_in_thread(function: Callable[..., T], **options: Any) -> T:
    """Return ``function(**options)``, run in a thread that ends with it.

    OpenMP keeps a team of workers for every thread that ever ran a parallel loop. Once there are more of them than
    cores it puts workers to sleep between loops, and waking them costs a decode step about a fifth of its time. So the
    model is loaded in a thread that takes its team with it, and only the engine's thread has one.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function(**options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a daemon, so that Ctrl-C need not wait for it
    return future.result()


def raise_open_files_limit() -> None:
    """Allow as many open files, and so connections, as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # some systems refuse their own hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
