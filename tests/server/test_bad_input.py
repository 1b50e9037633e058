"""Every bad input gets a 4xx in OpenAI's shape that names the fault; the next request is served as usual."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.conftest import ClientFactory
from tests.server.fake_engine import FakeEngine

USER = [{"role": "user", "content": "x"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
ASSISTANT_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}


async def assert_refused(
    client: httpx.AsyncClient, response: httpx.Response, param: str | None, message: str, status: int = 400
) -> None:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]
    alive = await client.post("/v1/completions", json={"prompt": "alive"})
    assert alive.json()["choices"][0]["text"] == "alive"


COMPLETION_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "must be a string"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "empty"),
    ({"prompt": 3}, "prompt", "must be a string"),
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": [1, True]}, "prompt", "must be a string"),
    ({"prompt": [1, 2.5]}, "prompt", "must be a string"),
    ({"prompt": [1, -1]}, "prompt", "outside the vocabulary"),
    ({"prompt": [10**12]}, "prompt", "outside the vocabulary"),
    ({"prompt": [10**12], "echo": True}, "prompt", "outside the vocabulary"),
    ({"prompt": "x" * 5000}, "max_tokens", "4096"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens", "4096"),
    ({"max_tokens": 10**30}, "max_tokens", "max_tokens"),
    ({"max_tokens": "7"}, "max_tokens", "integer"),
    ({"max_tokens": 7.5}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"min_tokens": 20}, "min_tokens", "min_tokens"),
    ({"temperature": -0.1}, "temperature", "temperature"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "top_p"),
    ({"top_p": 1.5}, "top_p", "top_p"),
    ({"top_k": -7}, "top_k", "top_k"),
    ({"top_k": 2.5}, "top_k", "integer"),
    ({"min_p": -1}, "min_p", "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty", "presence_penalty"),
    ({"frequency_penalty": -1e300}, "frequency_penalty", "frequency_penalty"),
    ({"seed": 2**70}, "seed", "seed"),
    ({"n": 0}, "n", "n must"),
    ({"n": 10**6}, "n", "n must"),
    ({"best_of": 4}, "best_of", "not supported"),
    ({"logprobs": -1}, "logprobs", "logprobs"),
    ({"logprobs": 10**4}, "logprobs", "logprobs"),
    ({"logprobs": 21, "echo": True}, "logprobs", "logprobs must"),
    ({"suffix": "!"}, "suffix", "not supported"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "prompt_logprobs must"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
    ({"use_beam_search": True}, "use_beam_search", "not supported"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"5": 1000}}, "logit_bias", "logit_bias"),
    ({"logit_bias": {"5000": 1}}, "logit_bias", "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias", "dictionary"),
    ({"stop": 3}, "stop", "string"),
    ({"stop": [""]}, "stop", "stop"),
    ({"stop": ["a"] * 1000}, "stop", "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids", "stop_token_ids"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only when stream is true"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "Unknown field"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs", "parenthesis"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "regex and choice"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "Unknown field"),
    ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "min_tokens", "structured outputs"),
    ({"guided_json": {}}, "guided_json", "use structured_outputs"),
    ({"tempreature": 1}, "tempreature", "Unknown field: 'tempreature'"),
    ({"model": 5}, "model", "string"),
    ({"metadata": {"a": 1}}, "metadata.a", "string"),
    ({"priority": "high"}, "priority", "integer"),
    ({"priority": 1.5}, "priority", "integer"),
    ({"priority": True}, "priority", "integer"),
    ({"priority": 10**12}, "priority", "priority must be an integer from"),
    ({"cache_salt": ""}, "cache_salt", "non-empty"),
    ({"cache_salt": 7}, "cache_salt", "string"),
    ({"cache_salt": "x" * 257}, "cache_salt", "at most 256"),
    ({"cache_ttl": -0.5}, "cache_ttl", "from 0 to 3600"),
    ({"cache_ttl": 1e9}, "cache_ttl", "from 0 to 3600"),
    ({"cache_ttl": "1h"}, "cache_ttl", "number"),
    ({"user": 7}, "user", "string"),
    ({"user": "x" * 257}, "user", "at most 256"),
]


@pytest.mark.parametrize(("fields", "param", "message"), COMPLETION_FAULTS)
async def test_completions(client: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str) -> None:
    response = await client.post("/v1/completions", json={"prompt": "hello", **fields})
    await assert_refused(client, response, param, message)


TOOL = {"type": "function", "function": {"name": "f"}}
CHAT_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "x"}, "messages", "list"),
    ({"messages": [{"role": "user"}]}, "messages", "content"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "required"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string or a list"),
    (
        {"messages": [{"role": "user", "content": IMAGE}]},
        "messages[0].content",
        "'image_url' are not supported",
    ),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood", "Unknown field"),
    ({"messages": [ASSISTANT_CALL]}, "messages", "not JSON"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs is true"),
    ({"logprobs": True, "top_logprobs": 1000}, "top_logprobs", "less than"),
    ({"logprobs": 3}, "logprobs", "boolean"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "required"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
    ({"tools": [TOOL, TOOL]}, "tools", "same name"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "no tool 'g'"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "tools", "leave out one"),
    ({"tools": [TOOL], "min_tokens": 2}, "min_tokens", "structured outputs"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "needs it"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "",
    ),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "response_format",
        "leave out one",
    ),
    ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
    (
        {"continue_final_message": True, "add_generation_prompt": False},
        "continue_final_message",
        "last message",
    ),
    ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "tokenize"),
    ({"chat_template_kwargs": {"fail": True}}, "messages", "the template says no"),
    ({"max_completion_tokens": 0}, "max_tokens", "max_tokens"),
    ({"priority": -(10**12)}, "priority", "priority must be an integer from"),
    ({"cache_salt": ""}, "cache_salt", "non-empty"),
    ({"cache_ttl": -1}, "cache_ttl", "from 0 to 3600"),
]


@pytest.mark.parametrize(("fields", "param", "message"), CHAT_FAULTS)
async def test_chat(client: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": USER, **fields})
    await assert_refused(client, response, param, message)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "no body"),
        (b"[]", None, "must be a JSON object"),
        (b"null", None, "must be a JSON object"),
        (b"7", None, "must be a JSON object"),
        (b'{"prompt": "x"', None, "not valid JSON"),
        (b"prompt=x", None, "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', None, "not valid JSON"),
        (b'{"prompt": "\xed\xa0\x80"}', None, "not valid JSON"),
        (b'{"prompt": "\\ud800"}', None, "lone surrogate"),
        (b'{"prompt": "a\\uDC00b"}', None, "lone surrogate"),
        (b'{"prompt": "x", "\\ud800": 1}', None, "lone surrogate"),
        (b'{"prompt": "x", "stop": ["\\ude00\\ud83d"]}', None, "lone surrogate"),
        (b'{"prompt": "x", "temperature": NaN}', None, "NaN is not allowed"),
        (b'{"prompt": "x", "top_p": -Infinity}', None, "Infinity is not allowed"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature", "finite"),
        (b'{"prompt": ' + b"[" * 100_000, None, "not valid JSON"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
        (b"{}", "prompt", "required"),
    ],
)
async def test_bodies(client: httpx.AsyncClient, body: bytes, param: str | None, message: str) -> None:
    response = await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    await assert_refused(client, response, param, message)


async def test_pairs_of_surrogates_are_characters(client: httpx.AsyncClient) -> None:
    body = json.dumps({"prompt": "😀"})
    assert "\\ud83d" in body
    response = await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.json()["choices"][0]["text"] == "😀"


async def test_a_body_that_is_not_json_by_its_header(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", content=b'{"prompt": "x"}')
    await assert_refused(client, response, None, "Content-Type: application/json")


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    await assert_refused(client, await client.get("/v2/models"), None, "/v2/models", 404)
    response = await client.get("/v1/completions")
    await assert_refused(client, response, None, "GET is not allowed", 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_other_models(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"prompt": "x", "model": "gpt-9"})
    await assert_refused(client, response, "model", "'gpt-9' does not exist", 404)
    assert response.json()["error"]["code"] == "model_not_found"


async def test_token_routes(client: httpx.AsyncClient) -> None:
    await assert_refused(client, await client.post("/tokenize", json={"prompt": 3}), "prompt", "string")
    await assert_refused(client, await client.post("/tokenize", json={"messages": []}), "messages", "at least 1")
    for tokens in ([-1], [10**12]):
        response = await client.post("/detokenize", json={"tokens": tokens})
        await assert_refused(client, response, "tokens", "outside the vocabulary")


@pytest.mark.parametrize("announced", [True, False])
async def test_large_bodies(engine: FakeEngine, make_client: ClientFactory, announced: bool) -> None:
    body = json.dumps({"prompt": "x" * 2000}).encode()

    async def in_pieces() -> Any:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    async with make_client(engine, max_body_bytes=1000) as client:
        response = await client.post(
            "/v1/completions",
            content=body if announced else in_pieces(),
            headers={"Content-Type": "application/json"},
        )
        await assert_refused(client, response, None, "larger than 1000 bytes", 413)


async def test_a_bug_is_a_500_in_the_same_shape(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.bug_in_add = True
    response = await client.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "a bug" not in response.text
