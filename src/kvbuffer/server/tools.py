"""Calls of tools in chats: how a model writes them, the grammar that keeps it to that, and reading them back.

Qwen's models write ``<tool_call>``, a call, ``</tool_call>``; the call is JSON (Qwen3-Next) or nested tags (Qwen3.5 and
the Coder models). Which, the chat template says.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from kvbuffer.engine.structured_outputs import MAX_SPACE, StructuredOutputsParams
from kvbuffer.server.chat_protocol import Tool, ToolChoice

_BEGIN, _END = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)

#: ``json``: ``{"name": …, "arguments": {…}}``; ``tags``: ``<function=…><parameter=…>…``.
CallStyle = Literal["json", "tags"]


def call_style(chat_template: str) -> CallStyle | None:
    """Return how a chat template has calls written, None if it has no tools."""
    if "tools" not in chat_template or _BEGIN not in chat_template:
        return None
    return "tags" if "<function=" in chat_template else "json"


class Call(NamedTuple):
    """One call of a function.

    Attributes:
        name: of the function.
        arguments: JSON.
        call_id: for the message that brings the result.
    """

    name: str
    arguments: str
    call_id: str

    def fields(self) -> dict[str, Any]:
        """Return the call as OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class Toolbox:
    """The functions that a conversation offers.

    Args:
        style: how the model writes calls.
        tools: on offer.
    """

    def __init__(self, style: CallStyle, tools: Sequence[Tool]) -> None:
        self._style = style
        # Without a schema, arguments may be anything.
        self._schemas: dict[str, Any] = {
            tool.function.name: True if tool.function.parameters is None else tool.function.parameters for tool in tools
        }

    def structure(self, choice: str | ToolChoice | None, *, parallel: bool) -> StructuredOutputsParams:
        """Return the form of an answer: free text, but what begins like a call is a call, and its arguments are valid.

        Args:
            choice: ``required`` or a function: the answer begins with a call, perhaps of this one.
            parallel: whether several functions may be called.
        """
        named = [choice.function.name] if isinstance(choice, ToolChoice) else []
        tags = [
            {
                "type": "tag",
                "begin": self._opening(name),
                "content": {
                    "type": "json_schema",
                    "json_schema": self._schemas[name],
                    "style": "json" if self._style == "json" else "qwen_xml",
                    "max_whitespace_cnt": MAX_SPACE,
                },
                "end": f"}}\n{_END}" if self._style == "json" else f"\n</function>\n{_END}",
            }
            for name in named or self._schemas
        ]
        form = {
            "type": "triggered_tags",
            "triggers": [_BEGIN],
            "tags": tags,
            "at_least_one": bool(named) or choice == "required",
            "stop_after_first": bool(named) or not parallel,
        }
        return StructuredOutputsParams(structural_tag=json.dumps({"type": "structural_tag", "format": form}))

    def _opening(self, name: str) -> str:
        if self._style == "json":
            return f'{_BEGIN}\n{{"name": "{name}", "arguments": '
        return f"{_BEGIN}\n<function={name}>\n"

    def read(self, text: str) -> Call | None:
        """Return the call in what stands between the tags; None if it is none."""
        name, arguments = self._read_json(text) if self._style == "json" else self._read_tags(text)
        if name not in self._schemas or not isinstance(arguments, dict):
            return None
        return Call(name, json.dumps(arguments, ensure_ascii=False), f"call_{uuid.uuid4().hex[:24]}")

    def _read_json(self, text: str) -> tuple[Any, Any]:
        try:
            value = json.loads(text)
        except ValueError:
            return None, None
        return (value.get("name"), value.get("arguments")) if isinstance(value, dict) else (None, None)

    def _read_tags(self, text: str) -> tuple[Any, Any]:
        match = _FUNCTION.fullmatch(text)
        if match is None:
            return None, None
        schema = self._schemas.get(match[1])
        types = schema.get("properties", {}) if isinstance(schema, dict) else {}
        return match[1], {name: _value(text, types.get(name)) for name, text in _PARAMETER.findall(match[2])}


def _value(text: str, schema: object) -> Any:
    """Return an argument that is written as text: a string if that is what its schema says, else JSON if it is."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


class CallReader:
    """Tells the calls in an answer from its text, as it comes.

    Text that may turn out to be the beginning of a call is held back; what looks like a call and is none stays text.

    Args:
        tools: the functions on offer.

    Attributes:
        num_calls: calls so far.
    """

    def __init__(self, tools: Toolbox) -> None:
        self.num_calls = 0
        self._tools = tools
        self._pending = ""

    def read(self, text: str, last: bool) -> tuple[str, list[Call]]:
        """Return the text and the calls that more of the answer, perhaps its end, has brought."""
        self._pending += text
        shown, calls = [], []
        while (begin := self._pending.find(_BEGIN)) >= 0:
            shown.append(self._pending[:begin])
            self._pending = self._pending[begin:]
            end = self._pending.find(_END)
            if end < 0:
                break
            call = self._tools.read(self._pending[len(_BEGIN) : end])
            if call is None:
                shown.append(self._pending[: end + len(_END)])
            else:
                calls.append(call)
            self._pending = self._pending[end + len(_END) :]
        if last or begin < 0:
            kept = 0 if last else overlap(self._pending, _BEGIN)
            cut = len(self._pending) - kept
            shown.append(self._pending[:cut])
            self._pending = self._pending[cut:]
        self.num_calls += len(calls)
        visible = "".join(shown)
        # Calls are set apart by line breaks, which are not part of what the model has to say.
        return ("" if self.num_calls and not visible.strip() else visible), calls


def overlap(text: str, tag: str) -> int:
    """Return how many characters at the end of ``text`` may be the beginning of ``tag``."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)
