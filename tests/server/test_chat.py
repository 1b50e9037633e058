"""Chat completions: the answer's shape, whole and streamed, and how a conversation becomes a prompt."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import ClientFactory
from tests.server.events import chunks
from tests.server.fake_engine import EOS, FakeEngine

HELLO = [{"role": "user", "content": "hé!"}]
ECHOED = "[user]hé![assistant]"


async def chat(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": HELLO, **body})


async def test_the_whole_answer_has_openais_shape(client: httpx.AsyncClient) -> None:
    answer = (await chat(client, model="echo")).json()
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1_700_000_000
    num_tokens = len(ECHOED.encode())
    assert answer == {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ECHOED, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_tokens,
            "completion_tokens": num_tokens + 1,
            "total_tokens": 2 * num_tokens + 1,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_the_stream_adds_up_to_the_whole_answer(client: httpx.AsyncClient) -> None:
    response = await chat(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = chunks(response.text)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    choices = [event["choices"][0] for event in events]
    assert [choice["delta"].get("role") for choice in choices] == ["assistant"] + [None] * (len(choices) - 1)
    assert "".join(choice["delta"]["content"] for choice in choices) == ECHOED
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert all("usage" not in event for event in events)


async def test_usage_comes_in_the_streams_last_chunk_when_asked_for(client: httpx.AsyncClient) -> None:
    *events, last = chunks((await chat(client, stream=True, stream_options={"include_usage": True})).text)
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(ECHOED.encode()) + 1


async def test_continuous_usage_counts_up(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = chunks((await chat(client, stream=True, stream_options=options, max_tokens=3)).text)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_come_beside_the_text(client: httpx.AsyncClient, stream: bool) -> None:
    response = await chat(client, return_token_ids=True, stream=stream)
    events = chunks(response.text) if stream else [response.json()]
    token_ids = [token for event in events for token in event["choices"][0]["token_ids"]]
    assert token_ids == [*ECHOED.encode(), EOS]


@pytest.mark.parametrize("stream", [False, True])
async def test_n_choices_get_their_own_seeds(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    response = await chat(client, n=3, seed=40, stream=stream)
    assert [params.seed for _, params in engine.seen] == [40, 41, 42]
    if stream:
        choices = [event["choices"][0] for event in chunks(response.text)]
        texts = ["".join(c["delta"]["content"] for c in choices if c["index"] == i) for i in range(3)]
    else:
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
        assert response.json()["usage"]["prompt_tokens"] == len(ECHOED.encode())
    assert texts == [ECHOED] * 3


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: httpx.AsyncClient, stream: bool) -> None:
    response = await chat(client, logprobs=True, top_logprobs=2, max_tokens=2, stream=stream)
    if stream:
        entries = [e for event in chunks(response.text) for e in event["choices"][0]["logprobs"]["content"]]
    else:
        entries = response.json()["choices"][0]["logprobs"]["content"]
    assert entries[0] == {
        "token": "[",
        "logprob": -0.5,
        "bytes": [91],
        "top_logprobs": [
            {"token": "[", "logprob": -0.5, "bytes": [91]},
            {"token": "\\", "logprob": -1.5, "bytes": [92]},
        ],
    }
    assert [entry["token"] for entry in entries] == ["[", "u"]


async def test_prompt_logprobs(client: httpx.AsyncClient) -> None:
    answer = (await chat(client, prompt_logprobs=0, max_tokens=1)).json()
    first, second, *rest = answer["prompt_logprobs"]
    assert (first, len(rest)) == (None, answer["usage"]["prompt_tokens"] - 2)
    assert [list(entry) for entry in second.values()] == [["logprob", "rank", "decoded_token"]]


async def test_logprobs_without_alternatives(client: httpx.AsyncClient) -> None:
    answer = (await chat(client, logprobs=True, max_tokens=1)).json()
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_sampling_fields_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "skip_special_tokens": False,
    }
    await chat(client, **fields, logit_bias={"12": 5}, stop="zz", max_completion_tokens=9, max_tokens=4)
    [(_, params)] = engine.seen
    expected = fields | {"logit_bias": {12: 5.0}, "stop": ("zz",), "stop_token_ids": (3,), "max_tokens": 9}
    assert {name: getattr(params, name) for name in expected} == expected


async def test_the_models_own_defaults_apply_unless_the_request_says_otherwise(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.generation_defaults = {"temperature": 0.7, "top_k": 20}
    await chat(client, top_k=5, temperature=None)
    [(_, params)] = engine.seen
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 5, 1.0)
    assert params.max_tokens is None


async def test_a_stop_string_across_tokens_is_cut(client: httpx.AsyncClient) -> None:
    choice = (await chat(client, stop=["é!["])).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
        "[user]h",
        "stop",
        "é![",
    )


async def prompt_of(client: httpx.AsyncClient, engine: FakeEngine, **body: Any) -> str:
    response = await chat(client, max_tokens=1, **body)
    assert response.status_code == 200, response.text
    return bytes(engine.seen[-1][0]).decode()


async def test_conversations_become_prompts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "user", "content": "", "name": "eve"},
    ]
    prompt = await prompt_of(client, engine, messages=messages)
    assert prompt == "[system]be brief[user]a\nb[assistant][tool]42[user][assistant]"


async def test_template_options(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert await prompt_of(client, engine, add_generation_prompt=False) == "[user]hé!"
    prompt = await prompt_of(client, engine, chat_template_kwargs={"enable_thinking": False})
    assert prompt == "[user]hé!(enable_thinking=False)[assistant]"
    messages = [*HELLO, {"role": "assistant", "content": "well"}]
    prompt = await prompt_of(
        client, engine, messages=messages, continue_final_message=True, add_generation_prompt=False
    )
    assert prompt == "[user]hé![assistant]well"


async def test_a_servers_own_chat_template_replaces_the_models(engine: FakeEngine, make_client: ClientFactory) -> None:
    async with make_client(engine, chat_template="<mine>") as client:
        assert await prompt_of(client, engine) == "<mine>[user]hé![assistant]"


async def test_long_conversations_are_tokenized_too(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    text = "long " * 800
    assert await prompt_of(client, engine, messages=[{"role": "user", "content": text}]) == (f"[user]{text}[assistant]")


async def test_fields_at_their_neutral_values_are_accepted(client: httpx.AsyncClient) -> None:
    neutral = {
        "audio": None,
        "best_of": 1,
        "metadata": {"run": "7"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "prompt_logprobs": None,
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "store": False,
        "structured_outputs": None,
        "tool_choice": "none",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "use_beam_search": False,
        "user": "someone",
    }
    response = await chat(client, **neutral)
    assert response.status_code == 200, response.text
