"""Completions: every form of prompt, echo, logprobs, streaming."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.events import chunks
from tests.server.fake_engine import EOS, FakeEngine


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response


async def test_the_whole_answer_has_openais_shape(client: httpx.AsyncClient) -> None:
    answer = (await complete(client, prompt="héllo", model="echo")).json()
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "text_completion",
        "model": "echo",
        "choices": [{"index": 0, "text": "héllo", "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 7,
            "total_tokens": 13,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([97, 98], ["ab"]),
        ([[97, 98], [99]], ["ab", "c"]),
        (["ab", [99]], ["ab", "c"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_every_form_of_prompt(client: httpx.AsyncClient, prompt: Any, texts: list[str], stream: bool) -> None:
    response = await complete(client, prompt=prompt, stream=stream, n=2)
    expected = [text for text in texts for _ in range(2)]
    if stream:
        choices = [event["choices"][0] for event in chunks(response.text)]
        assert ["".join(c["text"] for c in choices if c["index"] == i) for i in range(len(expected))] == expected
    else:
        assert [choice["text"] for choice in response.json()["choices"]] == expected
        assert response.json()["usage"]["prompt_tokens"] == sum(map(len, texts))


async def test_sixteen_tokens_unless_the_request_says_otherwise(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, prompt="x" * 100)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("x" * 16, "length")


@pytest.mark.parametrize("prompt", ["héllo", list("héllo".encode())])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo_repeats_the_prompt(client: httpx.AsyncClient, prompt: Any, stream: bool) -> None:
    response = await complete(client, prompt=prompt, echo=True, max_tokens=2, stream=stream)
    if stream:
        text = "".join(event["choices"][0]["text"] for event in chunks(response.text))
    else:
        text = response.json()["choices"][0]["text"]
    assert text == "hélloh�"  # two bytes of the reply: the second is half a character


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: httpx.AsyncClient, stream: bool) -> None:
    response = await complete(client, prompt="abc", logprobs=1, max_tokens=2, stream=stream)
    if stream:
        parts = [event["choices"][0]["logprobs"] for event in chunks(response.text)]
        logprobs = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    else:
        logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5}, {"b": -0.5}],
        "text_offset": [0, 1],
    }


async def test_streams_skip_deltas_without_text(client: httpx.AsyncClient) -> None:
    events = chunks((await complete(client, prompt="é", stream=True)).text)
    assert [event["choices"][0]["text"] for event in events] == ["é", ""]


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_come_beside_the_text(client: httpx.AsyncClient, stream: bool) -> None:
    prompts = [[97, 98], [99]]
    response = await complete(client, prompt=prompts, n=2, return_token_ids=True, stream=stream)
    expected = [[97, 98, EOS], [97, 98, EOS], [99, EOS], [99, EOS]]
    if stream:
        choices = [event["choices"][0] for event in chunks(response.text)]
        ids = [[token for c in choices if c["index"] == i for token in c["token_ids"]] for i in range(4)]
    else:
        choices = response.json()["choices"]
        ids = [choice["token_ids"] for choice in choices]
        assert [choice["prompt_token_ids"] for choice in choices] == [[97, 98], [97, 98], [99], [99]]
    assert ids == expected


async def test_streams_with_token_ids_skip_no_token(client: httpx.AsyncClient) -> None:
    events = chunks((await complete(client, prompt="é", stream=True, return_token_ids=True)).text)
    choices = [event["choices"][0] for event in events]
    assert [(c["text"], c["token_ids"]) for c in choices] == [("", [0xC3]), ("é", [0xA9]), ("", [EOS])]


@pytest.mark.parametrize("value", [None, False])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_token_ids_unless_asked_for(client: httpx.AsyncClient, value: bool | None, stream: bool) -> None:
    assert "token_ids" not in (await complete(client, prompt="é", return_token_ids=value, stream=stream)).text


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_repeats_logprobs_too(client: httpx.AsyncClient, stream: bool) -> None:
    response = await complete(client, prompt="abc", echo=True, logprobs=1, max_tokens=1, stream=stream)
    event = chunks(response.text)[0] if stream else response.json()
    assert event["choices"][0]["text"] == "abca"
    assert event["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c", "a"],
        "token_logprobs": [None, -0.25, -0.25, -0.5],
        "top_logprobs": [None, {"b": -0.25}, {"c": -0.25}, {"a": -0.5}],
        "text_offset": [0, 1, 2, 3],
    }


async def test_prompt_logprobs_have_vllms_shape(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, prompt="abc", prompt_logprobs=1, max_tokens=1)).json()["choices"][0]
    assert choice["text"] == "a"
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {"98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}},
        {"99": {"logprob": -0.25, "rank": 1, "decoded_token": "c"}},
    ]


async def test_no_output_may_be_asked_for_with_echo_only(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await complete(client, prompt="abc", echo=True, max_tokens=0)
    (_, params), *_ = engine.seen
    assert (params.max_tokens, params.prompt_logprobs) == (0, 0)
    refused = await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")


async def test_a_request_may_name_itself(client: httpx.AsyncClient) -> None:
    assert (await complete(client, prompt="a", request_id="mine")).json()["id"] == "cmpl-mine"


async def test_ignore_eos_runs_to_max_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = (await complete(client, prompt="ab", ignore_eos=True, max_tokens=5)).json()
    assert answer["choices"][0]["text"] == "ababa"
    assert not engine.requests
