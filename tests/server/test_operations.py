"""Health, metrics, models, tokens, keys: what operators and tools ask a server for."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvbuffer import __version__
from kvbuffer.engine.speculative.speculator import SpeculativeStats
from kvbuffer.errors import QueueFullError
from tests.server.conftest import ClientFactory
from tests.server.events import chunks
from tests.server.fake_engine import FakeEngine


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert listed["object"] == "list"
    [card] = listed["data"]
    assert (card["id"], card["object"], card["root"], card["max_model_len"]) == (
        "echo",
        "model",
        "org/echo",
        4096,
    )
    assert (await client.get("/v1/models/echo")).json() == card
    assert (await client.get("/v1/models/org/other")).status_code == 404


async def test_the_model_is_called_by_its_path_without_a_served_name(
    engine: FakeEngine, make_client: ClientFactory
) -> None:
    engine.config.served_model_name = None
    async with make_client(engine) as client:
        assert (await client.get("/v1/models/org/echo")).json()["id"] == "org/echo"


async def test_tokenize_and_detokenize(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": "hé", "return_token_strs": True})).json()
    assert answer == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "�", "�"],
    }
    body = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
    answer = (await client.post("/tokenize", json=body)).json()
    assert (bytes(answer["tokens"]).decode(), answer["token_strs"]) == ("[user]x", None)
    answer = (await client.post("/detokenize", json={"tokens": [104, 195, 169, 256]})).json()
    assert answer == {"prompt": "hé<eos>"}


async def test_version_health_and_ping(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": __version__}
    for response in (await client.get("/health"), await client.get("/ping"), await client.post("/ping")):
        assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_engine_fails_its_requests_and_the_health_check(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    engine.fail_at_step = 3
    response = await client.post("/v1/completions", json={"prompt": "hello", "stream": stream})
    if stream:
        error = chunks(response.text)[-1]["error"]
    else:
        assert response.status_code == 503
        error = response.json()["error"]
    assert error["type"] == "server_error"
    assert "the engine broke" in error["message"]
    assert (await client.get("/health")).status_code == 503
    assert (await client.post("/v1/completions", json={"prompt": "hello"})).status_code == 503


async def test_metrics(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json={"prompt": "hello"})
    await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
    text = (await client.get("/metrics")).text
    samples = {
        (sample.name, sample.labels.get("finished_reason") or sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("model_name") == "echo"
    }
    assert samples["kvbuffer:prompt_tokens_total", None] == 10
    assert samples["kvbuffer:generation_tokens_total", None] == 8
    assert samples["kvbuffer:request_success_total", "stop"] == 1
    assert samples["kvbuffer:request_success_total", "length"] == 1
    assert samples["kvbuffer:num_requests_running", None] == 0
    assert samples["kvbuffer:state_slots", None] == 64
    assert samples["kvbuffer:folds_total", None] == 7
    assert samples["kvbuffer:kv_cache_usage_perc", None] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_decode_time"):
        assert samples[f"kvbuffer:{name}_seconds_count", None] == 2
        assert samples[f"kvbuffer:{name}_seconds_bucket", "+Inf"] == 2
    assert samples["kvbuffer:inter_token_latency_seconds_count", None] == 6
    assert "process_resident_memory_bytes" in text


async def test_metrics_of_speculation(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert "spec_decode" not in (await client.get("/metrics")).text
    engine.speculative = SpeculativeStats(5, 20, 9, [5, 3, 1, 0], 0.25, 1.5)
    samples = {
        (sample.name.removeprefix("kvbuffer:spec_decode_"), sample.labels.get("position")): sample.value
        for family in text_string_to_metric_families((await client.get("/metrics")).text)
        for sample in family.samples
        if "spec_decode" in sample.name
    }
    assert samples == {
        ("num_drafts_total", None): 5,
        ("num_draft_tokens_total", None): 20,
        ("num_accepted_tokens_total", None): 9,
        **{("num_accepted_tokens_per_pos_total", str(i)): count for i, count in enumerate([5, 3, 1, 0])},
        ("draft_seconds_total", None): 0.25,
        ("verify_seconds_total", None): 1.5,
    }


async def test_rejected_requests_are_counted_by_reason(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for reason, count in (("queue_full", 1), ("client_queue_full", 2)):
        engine.queue_full = QueueFullError("full", reason, 3)
        await client.post("/v1/completions", json={"prompt": "hello", "n": count})
    rejected = {
        sample.labels["reason"]: sample.value
        for family in text_string_to_metric_families((await client.get("/metrics")).text)
        for sample in family.samples
        if sample.name == "kvbuffer:request_rejected_total"
    }
    assert rejected == {"queue_full": 1, "client_queue_full": 2}


async def test_an_api_key_guards_everything_but_health(engine: FakeEngine, make_client: ClientFactory) -> None:
    async with make_client(engine, api_key="sésame") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sésame".encode()}):
            response = await client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/metrics", "/v1/nothing", "/docs"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/health")).status_code == 200
        right = {"Authorization": "Bearer sésame".encode()}
        assert (await client.get("/v1/models", headers=right)).status_code == 200


async def test_the_api_describes_itself(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/metrics"} <= paths.keys()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_the_engine_gives_up_is_an_error(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    engine.give_up_at_token = 3
    response = await client.post("/v1/completions", json={"prompt": "hello", "stream": stream})
    error = chunks(response.text)[-1]["error"] if stream else response.json()["error"]
    assert response.status_code == (200 if stream else 500)
    assert (error["type"], error["message"]) == ("server_error", "The request was stopped: not a number.")
