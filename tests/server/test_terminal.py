"""Chatting from the terminal with a running server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator

import pytest
from typer.testing import CliRunner

from kvbuffer import cli, terminal
from kvbuffer.errors import InvalidRequestError, KVBufferError
from tests.server.fake_engine import FakeEngine

ServeEngine = Callable[..., str]


def test_chat_with_a_server(engine: FakeEngine, serve_engine: ServeEngine) -> None:
    url = serve_engine(engine, api_key="secret")
    arguments = ["chat", "echo", "--url", url, "--api-key", "secret", "--max-tokens", "12"]
    result = CliRunner().invoke(cli.app, arguments, input="hello\n")
    assert result.exit_code == 0, result.output
    assert "[user]hello[" in result.output


def test_a_servers_errors_are_told(engine: FakeEngine, serve_engine: ServeEngine) -> None:
    url = serve_engine(engine)
    hello = [{"role": "user", "content": "hello"}]
    with pytest.raises(KVBufferError, match=r"404.*does not exist"):
        list(terminal.remote_replies(url, None, {"model": "other"})(hello))
    with pytest.raises(InvalidRequestError, match="temperature"):
        list(terminal.remote_replies(f"{url}/v1/", None, {"temperature": -1})(hello))
    with pytest.raises(KVBufferError, match=r"Cannot chat with http"):
        list(terminal.remote_replies("http://127.0.0.1:1", None, {})(hello))
    engine.fail_at_step = engine.num_steps + 3
    with pytest.raises(KVBufferError, match=r"stopped the reply.*the engine broke"):
        list(terminal.remote_replies(url, None, {})(hello))


def test_ctrl_c_stops_a_reply_and_the_chat_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = iter(["first", "second"])

    def read(*_: object) -> str:
        try:
            return next(inputs)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("rich.console.Console.input", read)
    handler = signal.getsignal(signal.SIGINT)
    seen: list[list[str]] = []

    def reply(messages: terminal.Messages) -> Generator[str, None, None]:
        seen.append([message["content"] for message in messages])
        with terminal.deferred_interrupt() as raise_if_interrupted:
            for piece in ("a", "b", "c"):
                yield piece
                if piece == "b" and len(seen) == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                raise_if_interrupted()

    terminal.converse(reply)
    assert seen == [["first"], ["first", "ab", "second"]]
    assert signal.getsignal(signal.SIGINT) is handler
