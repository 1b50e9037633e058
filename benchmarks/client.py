"""A load generator that stays out of the way.

It shares the cores with the server under test, so while requests are in flight it does one thing: wait for bytes and
note when they came. One thread, one epoll, no event loop, no HTTP library; bodies are made before the clock starts and
responses are taken apart after it stops.
"""

from __future__ import annotations

import bisect
import itertools
import json
import selectors
import socket
import time
from dataclasses import dataclass, field

_READ_SIZE = 1 << 16


@dataclass
class Completion:
    """One finished request. Times are seconds since the batch was started."""

    num_prompt_tokens: int
    num_output_tokens: int
    event_times: list[float]
    """When each streamed piece arrived; a server may put several tokens, or a delayed one, into a piece."""
    end: float
    token_ids: list[int] = field(default_factory=list)
    """Empty where the server was not asked for ids."""
    start: float = 0.0
    """When it was sent."""
    hit: bool = False
    """Whether a predictive cache answered it."""
    num_cached_tokens: int = 0
    """Of its prompt, as the server says."""

    @property
    def first(self) -> float:
        return self.event_times[0]


@dataclass
class _Stream:
    socket: socket.socket
    sent: float = 0.0
    received: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class RequestFailed(RuntimeError):
    """The server answered with something other than a complete 200 stream."""


def complete(
    port: int, bodies: list[dict], path: str = "/v1/completions", timeout: float = 600, concurrency: int | None = None
) -> list[Completion]:
    """Sends `bodies`, each to be streamed on a connection of its own, and waits for the last answer to end.

    All are sent at once, or `concurrency` of them and then another one whenever an answer ends.
    """
    requests = [_encode(port, path, body) for body in bodies]
    start, streams = _exchange(port, requests, timeout, concurrency)
    return [_parse(stream, start) for stream in streams]


def _encode(port: int, path: str, body: dict) -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + payload


def _exchange(port: int, requests: list[bytes], timeout: float, concurrency: int | None) -> tuple[float, list[_Stream]]:
    clock = time.perf_counter
    streams = []
    with selectors.DefaultSelector() as selector:
        for _ in requests:
            stream = _Stream(socket.create_connection(("127.0.0.1", port), timeout))
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(stream.socket, selectors.EVENT_READ, stream)
            streams.append(stream)
        waiting = iter(zip(streams, requests, strict=True))

        def send(count: int | None) -> None:
            for stream, request in itertools.islice(waiting, count):
                stream.sent = clock()
                stream.socket.sendall(request)

        start = clock()
        send(concurrency)
        in_flight = len(streams)
        while in_flight:
            ready = selector.select(timeout)
            if not ready:
                raise RequestFailed(f"no answer within {timeout:.0f} s")
            for key, _ in ready:
                stream = key.data
                data = stream.socket.recv(_READ_SIZE)
                stream.times.append(clock())
                stream.received.append(data)
                # Some servers keep the connection open after the last chunk, so its end counts as the end.
                if not data or data.endswith(b"0\r\n\r\n"):
                    selector.unregister(stream.socket)
                    stream.socket.close()
                    in_flight -= 1
                    send(1)
    return start, streams


def _parse(stream: _Stream, start: float) -> Completion:
    raw = b"".join(stream.received)
    head, _, body = raw.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise RequestFailed(raw[:2000].decode(errors="replace"))
    chunked = b"transfer-encoding: chunked" in head.lower()
    ends, total = [], 0
    for data in stream.received:
        total += len(data)
        ends.append(total)

    def arrival(position: int) -> float:
        return stream.times[bisect.bisect_right(ends, position)] - start

    # Event positions are looked up in the raw bytes, where the arrival times are known; an event whose marker is
    # split over two HTTP chunks would be missed, and no server splits them.
    position, event_times = raw.find(b"data: {"), []
    while position >= 0:
        event_times.append(arrival(position))
        position = raw.find(b"data: {", position + 1)

    usage: dict = {}
    token_ids: list[int] = []
    num_pieces = 0
    for line in (_dechunk(body) if chunked else body).split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise RequestFailed(line.decode(errors="replace"))
        usage = event.get("usage") or usage
        choices = event.get("choices") or []
        num_pieces += bool(choices)
        for source in [*choices, event.get("__verbose", {})]:  # vLLM's place for token ids, and llama.cpp's
            token_ids += source.get("token_ids") or source.get("tokens") or []
    if not usage:
        raise RequestFailed("the stream ended without a usage chunk: " + raw[-500:].decode(errors="replace"))
    details = usage.get("prompt_tokens_details") or {}
    return Completion(
        num_prompt_tokens=usage["prompt_tokens"],
        num_output_tokens=usage["completion_tokens"],
        event_times=event_times[:num_pieces],  # the usage chunk comes last and carries no token
        end=stream.times[-1] - start,
        token_ids=token_ids,
        start=stream.sent - start,
        hit=bool(details.get("instcache_hit")),
        num_cached_tokens=details.get("cached_tokens") or 0,
    )


def _dechunk(body: bytes) -> bytes:
    parts, position = [], 0
    while position < len(body):
        newline = body.index(b"\r\n", position)
        size = int(body[position:newline].split(b";")[0], 16)
        parts.append(body[newline + 2 : newline + 2 + size])
        position = newline + 2 + size + 2
        if not size:
            break
    return b"".join(parts)
