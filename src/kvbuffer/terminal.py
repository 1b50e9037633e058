"""A conversation in the terminal, with a model in this process or behind a server."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
from rich.console import Console

from kvbuffer.errors import InvalidRequestError, KVBufferError

Messages = list[dict[str, str]]

#: Yields the pieces of the next reply to a conversation; closing it stops the reply.
Reply = Callable[[Messages], Generator[str, None, None]]


def converse(reply: Reply, system: str | None = None) -> None:
    """Read messages and print replies as they come, until the end of input.

    Args:
        reply: gives the replies.
        system: the system message, or None.
    """
    console = Console(highlight=False)
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    console.print("[dim]Ctrl-C stops a reply, Ctrl-D ends the chat.[/dim]")
    while True:
        try:
            text = console.input("[bold green]> [/bold green]")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            with closing(reply(messages)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    console.print(piece, end="", markup=False, soft_wrap=True)
            console.print()
        except KeyboardInterrupt:
            console.print(" [dim](stopped)[/dim]")
        except InvalidRequestError as error:  # such as a conversation that has outgrown the context
            console.print(f"[red]{error}[/red]", markup=True)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": "".join(pieces)})


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Hold back Ctrl-C until the function given here is called: a step must not be cut in two."""
    interrupted = False

    def remember(*_: object) -> None:
        nonlocal interrupted
        interrupted = True

    def raise_if_interrupted() -> None:
        if interrupted:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


def remote_replies(url: str, api_key: str | None, options: dict[str, Any]) -> Reply:
    """Return a function that gets replies from the server at ``url``; None among ``options`` are left out."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    client = httpx.Client(base_url=url.removesuffix("/").removesuffix("/v1"), headers=headers, timeout=None)
    body = {name: value for name, value in options.items() if value is not None} | {"stream": True}

    def reply(messages: Messages) -> Generator[str, None, None]:
        try:
            with client.stream("POST", "/v1/chat/completions", json=body | {"messages": messages}) as response:
                if response.is_error:
                    response.read()
                    raise _server_error(response)
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        yield _content(json.loads(line.removeprefix("data: ")))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise KVBufferError(f"Cannot chat with {url}: {error}") from error

    return reply


def _content(chunk: dict[str, Any]) -> str:
    if "error" in chunk:
        raise KVBufferError(f"The server stopped the reply: {chunk['error']['message']}")
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _server_error(response: httpx.Response) -> KVBufferError:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    if response.status_code == httpx.codes.BAD_REQUEST:
        return InvalidRequestError(message)
    return KVBufferError(f"The server answered {response.status_code}: {message}")
