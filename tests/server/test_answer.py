"""What a model thought is told from what it says and calls, however the answer is cut."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from kvbuffer.server.answer import AnswerReader
from tests.server.conftest import ClientFactory
from tests.server.events import chunks
from tests.server.fake_engine import FakeEngine
from tests.server.test_tools import JSON_CALL, toolbox

SIZES = [1, 2, 5, 8, 1000]


def read(text: str, size: int, *, is_thinking: bool = True) -> tuple[str, str, list[str]]:
    reader, reasoning, content, calls = AnswerReader(is_thinking, toolbox()), "", "", []
    for begin in range(0, len(text), size):
        piece = reader.read(text[begin : begin + size], last=begin + size >= len(text))
        reasoning += piece.reasoning
        content += piece.content
        calls += [call.name for call in piece.calls]
    assert reader.num_calls == len(calls)
    return reasoning, content, calls


@pytest.mark.parametrize("size", SIZES)
def test_thoughts_end_with_their_tag(size: int) -> None:
    assert read("2 < 3 </thin, so\n</think>\n\nYes.\n", size) == ("2 < 3 </thin, so\n", "Yes.\n", [])


@pytest.mark.parametrize("size", SIZES)
def test_calls_come_after_thoughts(size: int) -> None:
    answer = f"I call <tool_call> now.</think>\n\n{JSON_CALL}"
    assert read(answer, size) == ("I call <tool_call> now.", "", ["get_weather"])


@pytest.mark.parametrize("size", SIZES)
def test_thoughts_that_were_cut_short_are_thoughts(size: int) -> None:
    assert read("Let me see </thi", size) == ("Let me see </thi", "", [])


@pytest.mark.parametrize("size", SIZES)
def test_a_model_that_does_not_think_may_write_the_tag(size: int) -> None:
    assert read("\n</think> ends thoughts", size, is_thinking=False) == ("", "\n</think> ends thoughts", [])


# The fake engine repeats the prompt, and this one leaves it thinking.
CONVERSATION: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hm</think>\n\nso<think>"}],
    "add_generation_prompt": False,
}


async def ask(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    response = await client.post("/v1/chat/completions", json=CONVERSATION | body)
    assert response.status_code == 200, response.text
    return response


async def test_a_whole_answer_has_thoughts_of_its_own(client: httpx.AsyncClient) -> None:
    message = (await ask(client)).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "so<think>", "refusal": None, "reasoning_content": "[user]hm"}


async def test_a_stream_has_thoughts_of_its_own(client: httpx.AsyncClient) -> None:
    deltas = [event["choices"][0]["delta"] for event in chunks((await ask(client, stream=True)).text)]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "[user]hm"
    assert "".join(delta["content"] for delta in deltas) == "so<think>"


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_may_be_left_out(client: httpx.AsyncClient, stream: bool) -> None:
    text = (await ask(client, include_reasoning=False, stream=stream)).text
    assert "reasoning_content" not in text
    assert "hm" not in text


async def test_thoughts_without_an_answer(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, max_tokens=3)).json()["choices"][0]
    assert choice["message"]["reasoning_content"] == "[us"
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "length")


async def test_an_operator_may_leave_thoughts_in_the_text(make_client: ClientFactory) -> None:
    async with make_client(FakeEngine(), tells_thoughts=False) as client:
        message = (await ask(client)).json()["choices"][0]["message"]
    assert message["content"] == "[user]hm</think>\n\nso<think>"
    assert "reasoning_content" not in message
