"""The asynchronous engine delivers what its thread makes, and leaves nothing behind however it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from kvbuffer.engine.async_engine import AsyncEngine, EngineInput, EngineStoppedError
from kvbuffer.engine.request import CompletionDelta, FinishReason
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.errors import InvalidRequestError, KVBufferError
from tests.server.fake_engine import FakeEngine

ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def engine(fake: FakeEngine) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(fake)
    engine.start()
    yield engine
    await engine.shutdown()
    assert "kvbuffer-engine" not in {thread.name for thread in threading.enumerate()}


async def text_of(engine: AsyncEngine, request_id: str, prompt: str) -> str:
    params = SamplingParams(max_tokens=None)
    return "".join([delta.text async for delta in engine.generate(request_id, list(prompt.encode()), params)])


async def until_idle(fake: FakeEngine) -> None:
    async with asyncio.timeout(5):
        while fake.requests:
            await asyncio.sleep(0.001)


async def test_concurrent_requests_each_get_their_own_text(engine: AsyncEngine) -> None:
    prompts = [f"prompt number {i}, née" for i in range(40)]
    texts = await asyncio.gather(*(text_of(engine, str(i), prompt) for i, prompt in enumerate(prompts)))
    assert texts == prompts
    assert engine.num_unfinished_requests == 0


async def test_one_stream_carries_several_requests(engine: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=None)
    inputs = [EngineInput(name, list(name.encode()), params) for name in ("first", "second")]
    texts = {"first": "", "second": ""}
    async with await engine.submit(inputs) as stream:
        async for deltas in stream:
            for delta in deltas:
                texts[delta.request_id] += delta.text
    assert texts == {"first": "first", "second": "second"}
    assert not stream.aborted


async def test_a_slow_reader_gets_everything_that_arrived_at_once(engine: AsyncEngine, fake: FakeEngine) -> None:
    stream = await engine.submit([EngineInput("a", list(b"hello"), SamplingParams(max_tokens=None))])
    await until_idle(fake)
    await asyncio.sleep(0.01)
    deltas = await anext(stream)
    assert "".join(delta.text for delta in deltas) == "hello"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_leaving_the_iteration_aborts_the_request(engine: AsyncEngine, fake: FakeEngine) -> None:
    generation = engine.generate("a", list(b"hello"), ENDLESS)
    await anext(generation)
    await generation.aclose()
    await until_idle(fake)
    assert fake.num_aborted == 1
    assert engine.num_unfinished_requests == 0
    assert engine.metrics.finished["abort"] == 1


async def test_cancelling_the_task_aborts_the_request(engine: AsyncEngine, fake: FakeEngine) -> None:
    async def consume() -> None:
        async for _ in engine.generate("a", list(b"hello"), ENDLESS):
            pass

    task = asyncio.create_task(consume())
    while not fake.requests:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_idle(fake)


async def test_a_refused_request_raises_and_none_of_its_companions_run(engine: AsyncEngine, fake: FakeEngine) -> None:
    inputs = [EngineInput("good", [1], ENDLESS), EngineInput("bad", [], ENDLESS)]
    with pytest.raises(InvalidRequestError, match="empty"):
        await engine.submit(inputs)
    await until_idle(fake)
    assert engine.num_unfinished_requests == 0
    assert await text_of(engine, "good", "still alive") == "still alive"


async def test_a_bug_while_adding_fails_that_request_only(engine: AsyncEngine, fake: FakeEngine) -> None:
    fake.bug_in_add = True
    with pytest.raises(KVBufferError, match="internal error"):
        await text_of(engine, "a", "x")
    fake.bug_in_add = False
    assert await text_of(engine, "a", "x") == "x"


async def test_two_running_requests_may_not_share_an_id(engine: AsyncEngine) -> None:
    async with await engine.submit([EngineInput("a", [1], ENDLESS)]):
        with pytest.raises(InvalidRequestError, match="already running"):
            await engine.submit([EngineInput("a", [1], ENDLESS)])
    with pytest.raises(InvalidRequestError, match="already running"):
        await engine.submit([EngineInput("b", [1], ENDLESS), EngineInput("b", [1], ENDLESS)])


async def test_a_failing_step_fails_every_request_and_refuses_new_ones(engine: AsyncEngine, fake: FakeEngine) -> None:
    fake.step_delay_s, fake.fail_at_step = 0.01, 5
    results = await asyncio.gather(
        *(text_of(engine, str(i), "a long enough prompt") for i in range(3)), return_exceptions=True
    )
    assert all(isinstance(result, EngineStoppedError) and "engine broke" in str(result) for result in results)
    assert engine.failed
    with pytest.raises(EngineStoppedError, match="engine broke"):
        await text_of(engine, "later", "x")


async def test_an_idle_engine_sleeps_and_wakes_at_once(engine: AsyncEngine, fake: FakeEngine) -> None:
    await text_of(engine, "warm-up", "x")
    before = time.process_time()
    await asyncio.sleep(0.3)
    assert time.process_time() - before < 0.05
    started = time.perf_counter()
    await text_of(engine, "a", "x")
    assert time.perf_counter() - started < 0.1


async def test_shutdown_lets_running_requests_finish(engine: AsyncEngine, fake: FakeEngine) -> None:
    fake.step_delay_s = 0.01
    stream = await engine.submit([EngineInput("a", list(b"hello"), SamplingParams(max_tokens=None))])
    stopping = asyncio.create_task(engine.shutdown(drain_timeout_s=10))
    await asyncio.sleep(0)
    with pytest.raises(EngineStoppedError, match="shutting down"):
        await text_of(engine, "late", "x")
    last: CompletionDelta = [delta async for deltas in stream for delta in deltas][-1]
    assert last.finish_reason == FinishReason.STOP
    await stopping


async def test_shutdown_fails_what_does_not_finish_in_time(engine: AsyncEngine) -> None:
    stream = await engine.submit([EngineInput("a", list(b"hello"), ENDLESS)])
    await engine.shutdown(drain_timeout_s=0.05)
    with pytest.raises(EngineStoppedError, match="stopped before it finished"):
        async for _ in stream:
            pass
    assert engine.num_unfinished_requests == 0


async def test_ten_thousand_requests_at_once(engine: AsyncEngine, fake: FakeEngine) -> None:
    fake.max_num_seqs = 256
    texts = await asyncio.gather(*(text_of(engine, str(i), f"{i}") for i in range(10_000)))
    assert texts == [f"{i}" for i in range(10_000)]
    assert engine.num_unfinished_requests == 0
    assert not fake.requests


async def test_metrics_count_tokens_and_times(engine: AsyncEngine, fake: FakeEngine) -> None:
    fake.step_delay_s = 0.005
    await text_of(engine, "a", "hello")
    metrics = engine.metrics
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (5, 6)
    assert metrics.finished == {"stop": 1}
    assert sum(metrics.time_to_first_token.counts) == 1
    assert sum(metrics.inter_token_latency.counts) == 5
    assert 0.025 < metrics.inter_token_latency.sum <= metrics.e2e_latency.sum < 5
