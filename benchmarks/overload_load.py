"""The load of benchmarks/overload.py: requests of several clients, sent on time whether or not the server keeps up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

_FIRST_TOKEN_ID = 3  # the ids below it are special tokens
_LATE_S = 120  # without a single byte for so long, a request counts as hung


@dataclass(frozen=True)
class Prompt:
    """What is asked for."""

    token_ids: list[int]
    max_tokens: int

    @property
    def cost(self) -> int:
        """Tokens as the server's fair shares count them, with nothing cached."""
        return len(self.token_ids) + 2 * self.max_tokens


@dataclass
class Outcome:
    """How one request went."""

    client: str
    prompt: int
    sent: float
    """Seconds of `time.monotonic`, as are `first` and `end`."""
    status: int = 0
    """HTTP status; 0 when the connection failed."""
    first: float | None = None
    end: float = 0.0
    cancelled: bool = False
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    error: dict | str | None = None
    retry_after: str | None = None


def make_prompts(seed: str, count: int, vocab_size: int) -> list[Prompt]:
    """Short questions, longer texts and a few long documents; half of them begin with one of three system prompts."""
    generator = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [generator.randrange(_FIRST_TOKEN_ID, vocab_size) for _ in range(length)]

    systems = [ids(length) for length in (96, 200, 333)]
    prompts = []
    for number in range(count):
        low, high = ((8, 64), (8, 64), (8, 64), (100, 400), (100, 400), (600, 1500))[number % 6]
        start = generator.choice(systems) if generator.random() < 0.5 else []
        prompts.append(Prompt(start + ids(generator.randint(low, high)), generator.choice((8, 16, 32, 64, 128))))
    return prompts


async def ask(port: int, prompt: Prompt, outcome: Outcome, cancel_after: float | None = None) -> Outcome:
    """Stream one greedy completion into `outcome`; hang up after `cancel_after` seconds."""
    fields = {"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True, "user": outcome.client}
    body = {"prompt": prompt.token_ids, "max_tokens": prompt.max_tokens, **fields}
    body |= {"stream_options": {"include_usage": True}}
    try:
        async with asyncio.timeout(cancel_after):
            await _exchange(port, json.dumps(body).encode(), outcome)
    except TimeoutError:
        outcome.cancelled = cancel_after is not None
        if not outcome.cancelled:
            outcome.error = f"no byte for {_LATE_S} s"
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.end = time.monotonic()
    return outcome


async def _exchange(port: int, body: bytes, outcome: Outcome) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        async with asyncio.timeout(_LATE_S):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status = int(head.split(" ", 2)[1])
        headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
        if status != 200:
            outcome.retry_after = headers.get("retry-after")
            outcome.error = json.loads(await reader.read())["error"]
        else:
            async for event in _events(reader):
                _account(outcome, event)
        outcome.status = status
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict]:
    """Yield the server-sent events of a chunked answer, of which each fills whole lines."""
    while True:
        async with asyncio.timeout(_LATE_S):
            line = await reader.readline()
        if not line:
            raise ValueError("the stream broke off")
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def _account(outcome: Outcome, event: dict) -> None:
    if "error" in event:
        raise ValueError(f"the stream ended with {event['error']}")
    for choice in event["choices"]:
        outcome.token_ids += choice.get("token_ids") or []
        outcome.first = outcome.first or time.monotonic()
    if event.get("usage"):
        outcome.cached_tokens = event["usage"]["prompt_tokens_details"]["cached_tokens"]


async def closed_loop(port: int, prompts: list[Prompt], concurrency: int, seconds: float) -> list[Outcome]:
    """Keep `concurrency` requests running for so long: what the server can do when nobody has to queue for long."""
    end = time.monotonic() + seconds
    numbers = iter(range(10**9))
    outcomes = []

    async def one() -> None:
        while time.monotonic() < end:
            number = next(numbers) % len(prompts)
            outcomes.append(await ask(port, prompts[number], Outcome(f"client {number % 8}", number, time.monotonic())))

    await asyncio.gather(*(one() for _ in range(concurrency)))
    return outcomes


async def open_loop(
    port: int,
    prompts: list[Prompt],
    rates: dict[str, float],
    seconds: float,
    cancel_share: float,
    seed: str,
    on_sent: Callable[[int], None],
) -> list[Outcome]:
    """Send each client's requests at its rate per second (Poisson), wait for all, and return how they went."""
    generator = random.Random(seed)
    tasks: list[asyncio.Task[Outcome]] = []
    start = now = time.monotonic()
    total = sum(rates.values())
    while True:
        now += generator.expovariate(total)
        if now > start + seconds:
            break
        await asyncio.sleep(max(0.0, now - time.monotonic()))
        [client] = generator.choices(list(rates), list(rates.values()))
        number = generator.randrange(len(prompts))
        cancel_after = generator.expovariate(0.5) if generator.random() < cancel_share else None
        outcome = Outcome(client, number, time.monotonic())
        tasks.append(asyncio.create_task(ask(port, prompts[number], outcome, cancel_after)))
        on_sent(len(tasks))
    return await asyncio.gather(*tasks)
