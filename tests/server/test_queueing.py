"""Priorities, clients, salts and times to live reach the engine; a full queue is a 429 that says when to come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from kvbuffer.engine.request import RequestOptions
from kvbuffer.errors import QueueFullError
from tests.server.fake_engine import FakeEngine

FIELDS: dict[str, Any] = {"priority": -3, "user": "team-a", "cache_salt": "s", "cache_ttl": 90}
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}
FULL = QueueFullError("the queue is full: 9 requests wait; retry in 7 s", "queue_full", 7)


@pytest.mark.parametrize("path", PROMPTS)
async def test_the_fields_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    response = await client.post(path, json=PROMPTS[path] | FIELDS | {"n": 2})
    assert response.status_code == 200
    assert engine.options == [RequestOptions(-3, "team-a", "s", 90.0)] * 2


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("fields", [{}, dict.fromkeys(FIELDS), {"user": "", "priority": 0, "cache_ttl": 0}])
async def test_without_them_requests_are_those_of_one_client(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, fields: dict[str, Any]
) -> None:
    assert (await client.post(path, json=PROMPTS[path] | fields)).status_code == 200
    assert engine.options == [RequestOptions(priority=0, client="", cache_salt=None, cache_ttl_s=0.0)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PROMPTS)
async def test_a_full_queue_is_429(client: httpx.AsyncClient, engine: FakeEngine, path: str, stream: bool) -> None:
    engine.queue_full = FULL
    response = await client.post(path, json=PROMPTS[path] | {"stream": stream})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "7"
    assert response.json() == {
        "error": {"message": str(FULL), "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
    }
    engine.queue_full = None
    assert (await client.post(path, json=PROMPTS[path])).status_code == 200


async def test_choices_are_queued_all_or_none(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.room = 2
    response = await client.post("/v1/completions", json={"prompt": "hello", "n": 3})
    assert response.status_code == 429
    assert not engine.requests
    assert engine.num_aborted == 2


def test_the_openai_client_sees_a_rate_limit(engine: FakeEngine, serve_engine: Callable[..., str]) -> None:
    engine.queue_full = FULL
    with (
        openai.OpenAI(base_url=f"{serve_engine(engine)}/v1", api_key="key", max_retries=0) as client,
        pytest.raises(openai.RateLimitError, match="the queue is full") as error,
    ):
        client.completions.create(model="echo", prompt="hello", user="a", extra_body={"priority": 1})
    assert error.value.response.headers["Retry-After"] == "7"


@pytest.mark.parametrize("path", PROMPTS)
async def test_usage_tells_cached_tokens(client: httpx.AsyncClient, engine: FakeEngine, path: str) -> None:
    engine.num_cached_tokens = 4
    usage = (await client.post(path, json=PROMPTS[path] | {"n": 2})).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}  # the prompt's, however many choices


async def test_usage_tells_what_became_of_drafts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.num_draft_tokens, engine.num_accepted_tokens = 7, 5
    usage = (await client.post("/v1/completions", json={"prompt": "hello", "n": 2})).json()["usage"]
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 10, "rejected_prediction_tokens": 4}
