"""Calls of tools: read from the text however it is cut, written by the grammar, and answered in OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from kvbuffer import SamplingParams
from kvbuffer.engine.engine import Engine
from kvbuffer.server.chat_protocol import Tool, ToolChoice
from kvbuffer.server.tools import CallReader, CallStyle, Toolbox, call_style
from tests.server.conftest import ClientFactory
from tests.server.events import chunks
from tests.server.fake_engine import FakeEngine
from tests.support.checkpoints import make_checkpoint
from tests.support.plans import drain, sized_engine

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
TOOLS: list[Any] = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
JSON_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}\n</tool_call>'
TAGS_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
ARGUMENTS = {"city": "Oslo", "days": 3}


def toolbox(style: CallStyle = "json") -> Toolbox:
    return Toolbox(style, [Tool.model_validate(tool) for tool in TOOLS])


def read(text: str, size: int, style: CallStyle = "json") -> tuple[str, list[tuple[str, Any]]]:
    """Read a text that comes in pieces of ``size`` characters."""
    reader, shown, calls = CallReader(toolbox(style)), "", []
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    for i, piece in enumerate(pieces):
        more, new = reader.read(piece, last=i == len(pieces) - 1)
        shown += more
        calls += [(call.name, json.loads(call.arguments)) for call in new]
    assert reader.num_calls == len(calls)
    return shown, calls


class TestReading:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 11, 1000])
    @pytest.mark.parametrize(("style", "call"), [("json", JSON_CALL), ("tags", TAGS_CALL)])
    def test_a_call_is_told_from_the_text_around_it(self, style: CallStyle, call: str, size: int) -> None:
        assert read(f"I <tool look. {call}", size, style) == ("I <tool look. ", [("get_weather", ARGUMENTS)])
        assert read(f"{call}\n{call}", size, style) == ("", [("get_weather", ARGUMENTS)] * 2)

    @pytest.mark.parametrize("size", [1, 5, 1000])
    @pytest.mark.parametrize(
        "text",
        [
            "a < b <tool_cal",
            "<tool_call>\nno JSON\n</tool_call>",
            '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
            '<tool_call>\n{"name": "now", "arguments": [1]}\n</tool_call>',
            '<tool_call>\n["now"]\n</tool_call>',
            '<tool_call>\n{"name": "now", "argu',
            "</tool_call> und <tool_call",
        ],
    )
    def test_what_is_no_call_stays_text(self, text: str, size: int) -> None:
        assert read(text, size) == (text, [])

    def test_text_is_held_back_no_longer_than_it_may_begin_a_call(self) -> None:
        reader = CallReader(toolbox())
        assert reader.read("see <tool", last=False) == ("see ", [])
        assert reader.read("box> <", last=False) == ("<toolbox> ", [])
        assert reader.read("", last=True) == ("<", [])

    def test_arguments_in_tags_have_the_types_of_the_schema(self) -> None:
        schema = {"properties": {"s": {"type": "string"}, "n": {"type": "number"}, "o": {"type": "object"}}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        values = [("s", "12"), ("n", "12"), ("o", '{"a": [1]}'), ("x", "free\ntext"), ("y", "true")]
        inner = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values)
        call = Toolbox("tags", [Tool.model_validate(tool)]).read(f"\n<function=f>\n{inner}</function>\n")
        assert call is not None
        assert json.loads(call.arguments) == {"s": "12", "n": 12, "o": {"a": [1]}, "x": "free\ntext", "y": True}

    @pytest.mark.parametrize(
        ("template", "style"),
        [
            ("{{ messages }}", None),
            ("{% if tools %}in words{% endif %}", None),
            ("{% if tools %}<tool_call>{% endif %}", "json"),
            ("{% if tools %}<tool_call><function=f>{% endif %}", "tags"),
        ],
    )
    def test_the_template_says_how_calls_are_written(self, template: str, style: str | None) -> None:
        assert call_style(template) == style


@pytest.fixture(scope="module")
def random_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    layers = ["linear_attention", "full_attention"]
    folder = make_checkpoint(tmp_path_factory.mktemp("m"), "qwen3_5", num_hidden_layers=2, layer_types=layers)
    return sized_engine(folder, max_model_len=512, pages=200)


class TestGrammar:
    """Random models, made to call: whatever they write is a valid call."""

    def answers(self, engine: Engine, structure: Any, max_tokens: int = 400) -> list[str]:
        # Space without end is what a random model likes to write.
        space = {i: -100.0 for i in range(engine.tokenizer.vocab_size) if not engine.tokenizer.decode([i]).strip(" ")}
        for i in range(6):
            params = SamplingParams(
                seed=i, max_tokens=max_tokens, structured_outputs=structure, skip_special_tokens=False, logit_bias=space
            )
            engine.add_request(str(i), list(range(5, 15 + i)), params)
        return list(drain(engine).text.values())

    @pytest.mark.parametrize("style", ["json", "tags"])
    def test_a_named_function_is_called_once(self, random_engine: Engine, style: CallStyle) -> None:
        tools = toolbox(style)
        choice = ToolChoice.model_validate({"type": "function", "function": {"name": "get_weather"}})
        for answer in self.answers(random_engine, tools.structure(choice, parallel=True)):
            text, [call] = CallReader(tools).read(answer.removesuffix("<|im_end|>"), last=True)
            arguments = json.loads(call.arguments)
            assert (text, call.name) == ("", "get_weather")
            # Around what stands in tags there may be space.
            assert arguments["city"].strip() in ("Oslo", "Rome")
            assert 1 <= arguments["days"] <= 9

    def test_where_a_call_is_required_the_answer_begins_with_one(self, random_engine: Engine) -> None:
        structure = toolbox().structure("required", parallel=False)
        answers = self.answers(random_engine, structure, max_tokens=40)
        assert all(answer.startswith('<tool_call>\n{"name": "') for answer in answers)

    def test_the_model_need_not_call(self, random_engine: Engine) -> None:
        answers = self.answers(random_engine, toolbox().structure("auto", parallel=True), max_tokens=20)
        assert not any(answer.startswith("<tool_call>") for answer in answers)


CONVERSATION = [{"role": "user", "content": JSON_CALL}]


class TestAnswers:
    """The fake engine repeats the prompt, and so writes the call that is in it."""

    async def ask(self, client: httpx.AsyncClient, **body: Any) -> httpx.Response:
        response = await client.post("/v1/chat/completions", json={"messages": CONVERSATION, "tools": TOOLS, **body})
        assert response.status_code == 200, response.text
        return response

    async def test_a_whole_answer_lists_its_calls(self, client: httpx.AsyncClient) -> None:
        choice = (await self.ask(client)).json()["choices"][0]
        [call] = choice["message"].pop("tool_calls")
        assert call.pop("id").startswith("call_")
        assert json.loads(call["function"].pop("arguments")) == ARGUMENTS
        assert call == {"type": "function", "function": {"name": "get_weather"}}
        assert choice["message"]["content"] == "[user]{get_weather}{now}[assistant]"
        assert choice["finish_reason"] == "tool_calls"

    async def test_a_stream_brings_each_call_whole(self, client: httpx.AsyncClient) -> None:
        choices = [event["choices"][0] for event in chunks((await self.ask(client, stream=True, n=2)).text)]
        for index in range(2):
            own = [choice for choice in choices if choice["index"] == index]
            [call] = [call for choice in own for call in choice["delta"].get("tool_calls", ())]
            assert (call["index"], call["function"]["name"]) == (0, "get_weather")
            assert json.loads(call["function"]["arguments"]) == ARGUMENTS
            assert "".join(choice["delta"]["content"] for choice in own) == "[user]{get_weather}{now}[assistant]"
            assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["tool_calls"]

    async def test_an_answer_without_a_call_is_text(self, client: httpx.AsyncClient) -> None:
        choice = (await self.ask(client, messages=[{"role": "user", "content": "hello"}])).json()["choices"][0]
        assert choice["message"]["content"] == "[user]hello{get_weather}{now}[assistant]"
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "stop"

    async def test_no_call_is_made_where_none_is_wanted(self, client: httpx.AsyncClient, engine: FakeEngine) -> None:
        choice = (await self.ask(client, tool_choice="none")).json()["choices"][0]
        assert choice["message"]["content"] == f"[user]{JSON_CALL}[assistant]"
        assert engine.seen[-1][1].structured_outputs is None

    async def test_the_result_of_a_call_goes_back_to_the_model(self, client: httpx.AsyncClient) -> None:
        message = (await self.ask(client)).json()["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
        answer = (await self.ask(client, messages=[*CONVERSATION, message, result])).json()
        assert "[tool]rain" in answer["choices"][0]["message"]["content"]

    async def test_models_without_tools_say_so(self, make_client: ClientFactory) -> None:
        async with make_client(FakeEngine(), chat_template="{{ messages }}") as client:
            response = await client.post("/v1/chat/completions", json={"messages": CONVERSATION, "tools": TOOLS})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tools"
        assert "knows no tools" in response.json()["error"]["message"]

    async def test_the_operator_may_say_how_calls_are_written(self, make_client: ClientFactory) -> None:
        conversation = [{"role": "user", "content": TAGS_CALL}]
        async with make_client(FakeEngine(), call_style="tags") as client:
            choice = (await self.ask(client, messages=conversation)).json()["choices"][0]
        assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS

    async def test_tokens_of_a_prompt_with_tools(self, client: httpx.AsyncClient) -> None:
        response = await client.post("/tokenize", json={"messages": CONVERSATION, "tools": TOOLS})
        assert response.json()["count"] == len(f"[user]{JSON_CALL}{{get_weather}}{{now}}[assistant]")
