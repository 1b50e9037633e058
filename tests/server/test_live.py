"""A real port: the unmodified openai client, clients that vanish, many requests at once, a clean end."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from kvbuffer.server.launch import raise_open_files_limit
from tests.server.fake_engine import FakeEngine

ServeEngine = Callable[..., str]
REQUEST_HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def openai_client(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{url}/v1", "api_key": "key", "max_retries": 0, **options})


def test_the_openai_client_chats(engine: FakeEngine, serve_engine: ServeEngine) -> None:
    with openai_client(serve_engine(engine)) as client:
        answer = client.chat.completions.create(model="echo", messages=HELLO, n=2, logprobs=True, top_logprobs=1)
        assert [choice.message.content for choice in answer.choices] == ["[user]hello[assistant]"] * 2
        assert answer.choices[1].logprobs is not None
        assert answer.choices[1].logprobs.content[0].top_logprobs[0].token == "["
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 * len("[user]hello[assistant]!")
        reply = answer.choices[0].message.model_dump()  # a client sends all of a reply's fields back
        again = client.chat.completions.create(model="echo", messages=[*HELLO, reply, *HELLO])
        assert again.choices[0].finish_reason == "stop"


def test_what_is_loaded_at_the_start_is_left_out_of_garbage_collections(
    engine: FakeEngine, serve_engine: ServeEngine
) -> None:
    gc.unfreeze()
    serve_engine(engine)
    assert gc.get_freeze_count() > 10_000


def test_the_openai_client_streams(engine: FakeEngine, serve_engine: ServeEngine) -> None:
    with openai_client(serve_engine(engine)) as client:
        events = list(
            client.chat.completions.create(
                model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        assert text == "[user]hello[assistant]"
        assert events[-1].usage is not None
        completion = client.completions.create(model="echo", prompt=["ab", "cd"], stream=True, n=1)
        assert "".join(event.choices[0].text for event in completion) in ("abcd", "acbd")
        assert [model.id for model in client.models.list()] == ["echo"]
        assert client.models.retrieve("echo").id == "echo"


def test_the_openai_client_raises_its_own_errors(engine: FakeEngine, serve_engine: ServeEngine) -> None:
    url = serve_engine(engine, api_key="secret")
    with openai_client(url, api_key="secret") as client:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="other", messages=HELLO)
        with pytest.raises(openai.BadRequestError, match="temperature") as error:
            client.chat.completions.create(model="echo", messages=HELLO, temperature=-1)
        assert error.value.param == "temperature"
        with openai_client(url, api_key="guess") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        engine.fail_at_step = engine.num_steps + 3
        with pytest.raises(openai.APIError, match="the engine broke"):
            list(client.chat.completions.create(model="echo", messages=HELLO, stream=True))
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="echo", messages=HELLO)


@pytest.mark.parametrize("stream", [True, False])
def test_a_vanished_clients_requests_are_aborted(engine: FakeEngine, serve_engine: ServeEngine, stream: bool) -> None:
    engine.step_delay_s = 0.002
    url = httpx.URL(serve_engine(engine))
    neighbour_prompt = "neighbour " * 10
    body = {"prompt": ["hello", "you"], "max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 2}
    payload = json.dumps(body).encode()
    with httpx.Client(base_url=url) as client, socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(REQUEST_HEAD % len(payload) + payload)
        wait_until(lambda: len(engine.requests) == 4)
        if stream:
            assert b"200 OK" in connection.recv(1000)
        connection.close()
        neighbour = client.post("/v1/completions", json={"prompt": neighbour_prompt, "max_tokens": 200})
        assert neighbour.json()["choices"][0]["text"] == neighbour_prompt
        wait_until(lambda: not engine.requests)
    assert engine.num_aborted == 4
    assert engine.num_steps < 2000


async def test_ten_thousand_requests_at_once(engine: FakeEngine, serve_engine: ServeEngine) -> None:
    """Most are one body's list of prompts; 400 come over connections of their own, half of them streamed."""
    engine.max_num_seqs = 256
    raise_open_files_limit()
    url = httpx.URL(serve_engine(engine))

    async def complete(body: dict[str, Any]) -> str:
        reader, writer = await asyncio.open_connection(url.host, url.port)
        payload = json.dumps(body).encode()
        writer.write(REQUEST_HEAD % len(payload) + payload)
        answer = await reader.read()
        writer.close()
        head, _, text = answer.decode().partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 200 OK")
        return text

    prompts = [f"{i}" for i in range(9_600)]
    whole = [complete({"prompt": f"{i}"}) for i in range(200)]
    streamed = [complete({"prompt": f"{i}", "stream": True}) for i in range(200)]
    many, *others = await asyncio.gather(complete({"prompt": prompts}), *whole, *streamed)
    assert [choice["text"] for choice in json.loads(many)["choices"]] == prompts
    assert [json.loads(text)["choices"][0]["text"] for text in others[:200]] == prompts[:200]
    assert all(text.rstrip("\r\n0").endswith("data: [DONE]") for text in others[200:])
    assert not engine.requests
    gc.collect()
    left = [item for item in gc.get_objects() if type(item).__name__ in ("DeltaStream", "EventStream")]
    assert not left


SERVER_PROGRAM = """
import sys
from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.server.app import create_app
from kvbuffer.server.launch import Server, bind
from tests.server.fake_engine import FakeEngine

engine = AsyncEngine(FakeEngine(step_delay_s=0.01))
listener = bind("127.0.0.1", 0)
server = Server(
    create_app(engine),
    engine,
    shutdown_timeout_s=float(sys.argv[1]),
    on_started=lambda: print(listener.getsockname()[1], flush=True),
)
server.run([listener])
print("clean end", flush=True)
"""


@pytest.mark.parametrize("stop_signal", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("in_time", [True, False])
def test_signals_end_the_server_gracefully(stop_signal: signal.Signals, in_time: bool) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER_PROGRAM, "10" if in_time else "0.2"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["src", *sys.path])},
    )
    try:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        body = {"prompt": "hello", "stream": True, "ignore_eos": True, "max_tokens": 50 if in_time else 4000}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(stop_signal)
            rest = "\n".join(lines)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert rest.endswith("data: [DONE]\n")
        assert ('"finish_reason": "length"' in rest) == in_time
        assert ("this request was stopped before it finished" in rest) != in_time
        assert process.wait(20) == 0
        assert "clean end" in process.stdout.read()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
