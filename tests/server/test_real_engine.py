"""``kvbuffer serve`` with a small random model: the whole way from the command line to the openai client and back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.support.checkpoints import VOCAB_SIZE, make_checkpoint

HELLO: list[Any] = [{"role": "user", "content": "the state of the buffer"}]
MAX_MODEL_LEN = 512


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_next")
    flags = f"--port 0 --served-model-name tiny --max-model-len {MAX_MODEL_LEN} --max-num-seqs 16 --memory 64MiB"
    process = subprocess.Popen(
        [sys.executable, "-c", "from kvbuffer.cli import main; main()", "serve", str(folder), *flags.split()],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        printed = ""
        while (match := re.search(r"Serving tiny on (http://127.0.0.1:\d+)", printed)) is None:
            line = process.stdout.readline()
            assert line, f"the server ended: {printed}"
            printed += line
        yield match[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def in_use(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics").text
    names = ("num_requests_running", "num_requests_waiting", "attention_pages_in_use", "record_pages_in_use")
    return {
        name: float(re.search(rf"^kvbuffer:{name}{{.*}} (.*)$", text, re.MULTILINE)[1])  # type: ignore[index]
        for name in (*names, "state_slots_in_use")
    }


def assert_everything_is_returned(url: str) -> None:
    deadline = time.monotonic() + 10
    while any((used := in_use(url)).values()):
        assert time.monotonic() < deadline, used
        time.sleep(0.02)


def test_the_stream_is_the_whole_answer(client: openai.OpenAI, url: str) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == whole.choices[0].message.content
    assert whole.choices[0].message.content
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 40
    assert_everything_is_returned(url)


def test_a_seed_fixes_each_of_n_choices(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "seed": 5, "max_tokens": 12, "temperature": 1.5}
    texts = [
        [choice.message.content for choice in client.chat.completions.create(**options, n=n).choices] for n in (3, 3, 1)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3
    assert texts[2] == texts[0][:1]


class Ticket(pydantic.BaseModel):
    """What the client wants to have."""

    urgent: bool
    kind: Literal["bug", "question"]


def test_an_answer_has_the_form_of_the_clients_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Ticket, seed=1, max_tokens=400)
    ticket = answer.choices[0].message.parsed
    assert isinstance(ticket, Ticket)
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_is_any_object(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, max_tokens=20)
    assert (answer.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_one_of_several(client: openai.OpenAI, stream: bool) -> None:
    choice = {"structured_outputs": {"choice": ["bug", "question"]}}
    answer: Any = client.completions.create(model="tiny", prompt="a", n=4, extra_body=choice, stream=stream)
    texts = dict.fromkeys(range(4), "")
    for chunk in answer if stream else [answer]:
        for part in chunk.choices:
            texts[part.index] += part.text
    assert set(texts.values()) <= {"bug", "question"}


def test_a_form_that_cannot_be_is_refused(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "bogus"}}}
    with pytest.raises(openai.BadRequestError, match='Unsupported type "bogus"') as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=form)
    assert caught.value.param == "response_format"


def test_an_evaluation_scores_prompts_without_output(client: openai.OpenAI) -> None:
    prompt = list(range(5, 90))
    ask = {"model": "tiny", "prompt": prompt, "temperature": 0, "logprobs": 1, "echo": True}
    alone, with_output = client.completions.create(**ask, max_tokens=0), client.completions.create(**ask, max_tokens=4)
    scores, more = alone.choices[0].logprobs, with_output.choices[0].logprobs
    assert scores is not None
    assert more is not None
    assert scores.token_logprobs is not None
    assert more.token_logprobs is not None
    assert scores.token_logprobs[0] is None
    assert (len(scores.token_logprobs), len(more.token_logprobs)) == (85, 89)
    assert scores.token_logprobs[1:] == pytest.approx(more.token_logprobs[1:85], abs=0.02)
    assert alone.usage is not None
    assert alone.usage.completion_tokens == 0


def test_prompts_as_token_ids_with_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=[[5, 6, 7], [8, 9]],
        max_tokens=6,
        temperature=0,
        logprobs=3,
        extra_body={"ignore_eos": True},
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs is not None
        assert len(logprobs.token_logprobs or ()) == 6
        for value, top in zip(logprobs.token_logprobs or (), logprobs.top_logprobs or (), strict=True):
            assert value == pytest.approx(max(top.values()))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ],
)
def test_bad_input_is_refused(url: str, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "the state", "temperature": 0} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert_everything_is_returned(url)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_wherever_tokens_are_divided(url: str, stream: bool) -> None:
    body = {"prompt": "the buffer", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
    whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    for begin in range(3, 6):
        stop = whole[begin : begin + 7]
        answer = httpx.post(f"{url}/v1/completions", json=body | {"stop": stop, "stream": stream}, timeout=60)
        if stream:
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        else:
            events = [answer.json()]
        choices = [event["choices"][0] for event in events]
        assert "".join(choice["text"] for choice in choices) == whole[: whole.index(stop)]
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)
    assert_everything_is_returned(url)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e300},
        {"temperature": 1e-300},
        {"top_k": 10**9},
        {"top_p": 1e-300},
        {"repetition_penalty": 1e300},
        {"min_p": 1.0},
    ],
    ids=str,
)
def test_extreme_values_that_mean_something_are_served(url: str, fields: dict[str, Any]) -> None:
    body = {"prompt": "the state", "temperature": 1, "max_tokens": 8, "ignore_eos": True} | fields
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert (response.status_code, response.json()["usage"]["completion_tokens"]) == (200, 8)
    assert_everything_is_returned(url)


def test_vanished_clients_do_not_disturb_their_neighbours(client: openai.OpenAI, url: str) -> None:
    body = {"prompt": ["key", "value"], "max_tokens": 400, "ignore_eos": True, "stream": True, "temperature": 0.7}

    def alone() -> str:
        return (
            client.completions.create(model="tiny", prompt="the buffer", temperature=0, max_tokens=60).choices[0].text
        )

    def vanish(_: int) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            assert "choices" in json.loads(next(response.iter_lines()).removeprefix("data: "))

    expected = alone()
    with ThreadPoolExecutor(13) as pool:
        vanishing = [pool.submit(vanish, i) for i in range(12)]
        assert pool.submit(alone).result() == expected
        for task in vanishing:
            task.result()
    assert_everything_is_returned(url)
