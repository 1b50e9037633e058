"""The answers of ``/v1/chat/completions``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as json_string
from typing import Any

from kvbuffer.engine.request import CompletionDelta, FinishReason, TokenLogprob
from kvbuffer.server.answer import AnswerReader, Piece
from kvbuffer.server.logprobs import chat_logprobs
from kvbuffer.server.reply import Reply
from kvbuffer.server.tools import Toolbox

_NOTHING = Piece("", "", [])


class ChatReply(Reply):
    """Answers ``/v1/chat/completions``.

    Args:
        tools: functions whose calls are told from the text.
        include_reasoning: whether the answer has the model's thoughts, too.

    Attributes:
        is_thinking: whether the prompt has left the model thinking; set before the first delta.
    """

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, *args: Any, tools: Toolbox | None = None, include_reasoning: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_thinking = False
        self._tools = tools
        self._include_reasoning = include_reasoning
        self._started = [False] * len(self._index)
        self._readers: dict[int, AnswerReader] = {}
        self._pieces = [_NOTHING] * len(self._index)

    @property
    def _is_plain(self) -> bool:
        return self._tools is None and not self.is_thinking

    def _read(self, index: int, text: str, last: bool) -> Piece:
        if index not in self._readers:
            self._readers[index] = AnswerReader(self.is_thinking, self._tools)
        piece = self._readers[index].read(text, last)
        return piece if self._include_reasoning else piece._replace(reasoning="")

    def _shown(self, index: int, delta: CompletionDelta) -> CompletionDelta:
        if self._is_plain:
            return delta
        piece = self._pieces[index] = self._read(index, delta.text, delta.finish_reason is not None)
        return dataclasses.replace(delta, text=piece.content)

    def _has_news(self, index: int, delta: CompletionDelta) -> bool:
        piece = self._pieces[index]
        return bool(piece.calls or piece.reasoning) or super()._has_news(index, delta)

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        called = index in self._readers and self._readers[index].num_calls > 0
        return "tool_calls" if called and reason is FinishReason.STOP else reason

    def choice_chunk(self, index: int, delta: CompletionDelta) -> str:
        """Return a chunk's choice; the first one of a choice carries the role."""
        role = ""
        if not self._started[index]:
            self._started[index] = True
            role = '"role": "assistant", '
        logprobs = "null" if delta.logprobs is None else json.dumps(chat_logprobs(delta.logprobs, self._token_text))
        return (
            f'{{"index": {index}, "delta": {{{role}"content": {json_string(delta.text)}{self._parts(index)}}}, '
            f'"logprobs": {logprobs}, {self._ending(index, delta)}'
        )

    def _parts(self, index: int) -> str:
        """Return the fields of a chunk's delta beside its text."""
        piece, fields = self._pieces[index], ""
        if piece.reasoning:
            fields += f', "reasoning_content": {json_string(piece.reasoning)}'
        if piece.calls:
            first = self._readers[index].num_calls - len(piece.calls)
            calls = [{"index": i} | call.fields() for i, call in enumerate(piece.calls, first)]
            fields += f', "tool_calls": {json.dumps(calls)}'
        return fields

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """Return the choice with its message."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if not self._is_plain:
            piece = self._read(index, text, last=True)
            message["content"] = piece.content or None
            if piece.reasoning:
                message["reasoning_content"] = piece.reasoning
            if piece.calls:
                message["tool_calls"] = [call.fields() for call in piece.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else chat_logprobs(logprobs, self._token_text),
        }

    def _last_fields(self) -> dict[str, Any]:
        return {"prompt_logprobs": self._prompt_entries(0)} if self._return_prompt_logprobs else {}
