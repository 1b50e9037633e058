"""How the deltas of one HTTP request become its answer, whole or as server-sent events."""

from __future__ import annotations

import dataclasses
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring_ascii as json_string
from typing import Any

from kvbuffer.engine.request import CompletionDelta, FinishReason, TokenLogprob
from kvbuffer.errors import KVBufferError
from kvbuffer.server.errors import APIError
from kvbuffer.server.logprobs import TokenText, chat_logprobs, prompt_logprobs, text_logprobs
from kvbuffer.server.tools import Call, CallReader, Toolbox

END_OF_STREAM = b"data: [DONE]\n\n"


def error_event(error: APIError) -> bytes:
    """Return the event that tells a streaming client what went wrong."""
    return b"data: " + error.body() + b"\n\n"


class Reply(ABC):
    """The answer to one HTTP request: one engine request per choice of each prompt.

    A streamed chunk is cut from strings made once per reply; only the delta's text is encoded for each token.

    Attributes:
        request_id: id of the answer; the engine's request of choice ``i`` is ``f"{request_id}-{i}"``.
        instcache_hit: whether the answer comes from the predictive cache; its usage says so.
    """

    object_name: str
    chunk_object_name: str

    def __init__(
        self,
        request_id: str,
        model: str,
        *,
        num_prompts: int,
        choices_per_prompt: int,
        token_text: TokenText,
        include_usage: bool = False,
        continuous_usage: bool = False,
        return_token_ids: bool = False,
        return_prompt_logprobs: bool = False,
    ) -> None:
        self.request_id = request_id
        self.instcache_hit = False
        self._model = model
        self._created = int(time.time())
        num_choices = num_prompts * choices_per_prompt
        self._choices_per_prompt = choices_per_prompt
        self._token_text = token_text
        self._include_usage = include_usage
        self._continuous_usage = include_usage and continuous_usage
        self._return_token_ids = return_token_ids
        self._return_prompt_logprobs = return_prompt_logprobs
        self._index = {f"{request_id}-{i}": i for i in range(num_choices)}
        self._last: list[CompletionDelta | None] = [None] * num_choices
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]
        self._token_ids: list[list[int]] = [[] for _ in range(num_choices)]
        self._prompt_logprobs: list[list[TokenLogprob] | None] = [None] * num_choices
        head = json.dumps({"id": request_id, "object": self.chunk_object_name} | self._common_fields())
        self._chunk_head = f'data: {head[:-1]}, "choices": ['
        self._chunk_tail = '], "usage": null}\n\n' if include_usage else "]}\n\n"

    @abstractmethod
    def choice_chunk(self, index: int, delta: CompletionDelta) -> str:
        """Return the JSON of choice ``index`` in a streamed chunk."""

    @abstractmethod
    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """Return the JSON fields of choice ``index`` in a whole answer, but for why it ended."""

    def events(self, deltas: Iterable[CompletionDelta]) -> bytes:
        """Return the server-sent events for ``deltas``; empty when they hold nothing to show yet.

        Raises:
            KVBufferError: the engine gave one of the requests up.
        """
        events = []
        for delta in deltas:
            index = self._account(delta)
            delta = self._shown(index, delta)
            if self._has_news(index, delta):
                tail = self._chunk_tail
                if self._continuous_usage:
                    tail = f'], "usage": {json.dumps(self.usage())}}}\n\n'
                events.append(f"{self._chunk_head}{self.choice_chunk(index, delta)}{tail}")
        return "".join(events).encode("ascii")

    def _shown(self, index: int, delta: CompletionDelta) -> CompletionDelta:
        """Return the delta with the text that is shown as such."""
        return delta

    def _has_news(self, index: int, delta: CompletionDelta) -> bool:
        new_ids = self._return_token_ids and delta.token_ids
        return bool(delta.text or delta.logprobs or new_ids or delta.finish_reason is not None)

    def last_events(self) -> bytes:
        """Return what ends a stream: the usage if it was asked for, and the end marker."""
        if not self._include_usage:
            return END_OF_STREAM
        return f'{self._chunk_head}], "usage": {json.dumps(self.usage())}}}\n\n'.encode("ascii") + END_OF_STREAM

    def add(self, deltas: Iterable[CompletionDelta]) -> None:
        """Collect ``deltas`` for a whole answer.

        Raises:
            KVBufferError: the engine gave one of the requests up.
        """
        for delta in deltas:
            index = self._account(delta)
            self._texts[index].append(delta.text)
            self._logprobs[index].extend(delta.logprobs or ())
            if delta.prompt_logprobs is not None:
                self._prompt_logprobs[index] = delta.prompt_logprobs
            if self._return_token_ids:
                self._token_ids[index].extend(delta.token_ids)

    def body(self, with_logprobs: bool) -> bytes:
        """Return the whole answer as JSON."""
        choices = []
        for index, last in enumerate(self._last):
            logprobs = self._logprobs[index] if with_logprobs else None
            choice = self.choice(index, "".join(self._texts[index]), logprobs)
            if last is not None:
                choice["finish_reason"] = self._finish_reason(index, last.finish_reason)
                choice["stop_reason"] = last.stop_reason
            if self._return_token_ids:
                choice["token_ids"] = self._token_ids[index]
            choices.append(choice)
        fields = {"id": self.request_id, "object": self.object_name} | self._common_fields()
        fields |= {"choices": choices, "usage": self.usage()} | self._last_fields()
        return json.dumps(fields).encode("ascii")

    def _last_fields(self) -> dict[str, Any]:
        """Return fields that only one kind of whole answer has."""
        return {}

    def usage(self) -> dict[str, Any]:
        """Return the tokens so far; a prompt counts once, however many choices it has."""
        prompts = [last for last in self._last[:: self._choices_per_prompt] if last is not None]
        prompt_tokens = sum(last.num_prompt_tokens for last in prompts)
        choices = [last for last in self._last if last is not None]
        completion_tokens = sum(last.num_output_tokens for last in choices)
        accepted = sum(last.num_accepted_tokens for last in choices)
        details: dict[str, Any] = {"cached_tokens": sum(last.num_cached_tokens for last in prompts)}
        if self.instcache_hit:
            details["instcache_hit"] = True
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": details,
        }
        if drafted := sum(last.num_draft_tokens for last in choices):
            usage["completion_tokens_details"] = {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": drafted - accepted,
            }
        return usage

    def _account(self, delta: CompletionDelta) -> int:
        """Remember the delta as its choice's last one and return the choice's index.

        Raises:
            KVBufferError: the engine gave the request up.
        """
        if delta.finish_reason is FinishReason.ABORT:
            raise KVBufferError(f"The request was stopped: {delta.stop_reason}.")
        index = self._index[delta.request_id]
        self._last[index] = delta
        return index

    def _prompt_entries(self, index: int) -> list[Any]:
        return prompt_logprobs(self._prompt_logprobs[index] or (), self._token_text)

    def _common_fields(self) -> dict[str, Any]:
        return {"created": self._created, "model": self._model}

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        return reason

    def _ending(self, index: int, delta: CompletionDelta) -> str:
        """Return the fields that end a streamed choice."""
        token_ids = f', "token_ids": {delta.token_ids}' if self._return_token_ids else ""
        if delta.finish_reason is None:
            return f'"finish_reason": null{token_ids}}}'
        stop_reason = json.dumps(delta.stop_reason)
        reason = self._finish_reason(index, delta.finish_reason)
        return f'"finish_reason": "{reason}", "stop_reason": {stop_reason}{token_ids}}}'


class ChatReply(Reply):
    """Answers ``/v1/chat/completions``; calls of ``tools`` are told from the text."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, *args: Any, tools: Toolbox | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._started = [False] * len(self._index)
        self._readers = None if tools is None else [CallReader(tools) for _ in self._index]
        self._new_calls: list[list[Call]] = [[] for _ in self._index]

    def _shown(self, index: int, delta: CompletionDelta) -> CompletionDelta:
        if self._readers is None:
            return delta
        text, self._new_calls[index] = self._readers[index].read(delta.text, delta.finish_reason is not None)
        return dataclasses.replace(delta, text=text)

    def _has_news(self, index: int, delta: CompletionDelta) -> bool:
        return bool(self._new_calls[index]) or super()._has_news(index, delta)

    def _finish_reason(self, index: int, reason: FinishReason | None) -> str | None:
        called = self._readers is not None and self._readers[index].num_calls > 0
        return "tool_calls" if called and reason is FinishReason.STOP else reason

    def choice_chunk(self, index: int, delta: CompletionDelta) -> str:
        """Return a chunk's choice; the first one of a choice carries the role."""
        role = ""
        if not self._started[index]:
            self._started[index] = True
            role = '"role": "assistant", '
        logprobs = "null" if delta.logprobs is None else json.dumps(chat_logprobs(delta.logprobs, self._token_text))
        tool_calls, calls = "", self._new_calls[index]
        if calls and self._readers is not None:
            first = self._readers[index].num_calls - len(calls)
            tool_calls = (
                f', "tool_calls": {json.dumps([{"index": i} | c.fields() for i, c in enumerate(calls, first)])}'
            )
        return (
            f'{{"index": {index}, "delta": {{{role}"content": {json_string(delta.text)}{tool_calls}}}, '
            f'"logprobs": {logprobs}, {self._ending(index, delta)}'
        )

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """Return the choice with its message."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._readers is not None:
            text, calls = self._readers[index].read(text, last=True)
            message["content"] = text or None
            if calls:
                message["tool_calls"] = [call.fields() for call in calls]
        return {
            "index": index,
            "message": message,
            "logprobs": None if logprobs is None else chat_logprobs(logprobs, self._token_text),
        }

    def _last_fields(self) -> dict[str, Any]:
        return {"prompt_logprobs": self._prompt_entries(0)} if self._return_prompt_logprobs else {}


class CompletionReply(Reply):
    """Answers ``/v1/completions``.

    Args:
        prompts: their tokens.
        echoes: the text of each prompt that is to be repeated, or "".
        echo_logprobs: whether log-probabilities are repeated, too.
    """

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(
        self,
        *args: Any,
        prompts: list[list[int]],
        echoes: list[str],
        echo_logprobs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, num_prompts=len(prompts), **kwargs)
        self._prompts = prompts
        self._echo_logprobs = echo_logprobs
        self._echoes = [echo for echo in echoes for _ in range(self._choices_per_prompt)]
        self._text_offsets = [0] * len(self._index)

    def choice_chunk(self, index: int, delta: CompletionDelta) -> str:
        """Return a chunk's choice; the first one of a choice repeats the prompt if that was asked for."""
        echo, self._echoes[index] = self._echoes[index], ""
        logprobs = "null"
        if delta.logprobs is not None:
            logprobs = json.dumps(self._text_logprobs(index, delta.prompt_logprobs, delta.logprobs))
        return (
            f'{{"index": {index}, "text": {json_string(echo + delta.text)}, '
            f'"logprobs": {logprobs}, {self._ending(index, delta)}'
        )

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """Return the choice with its text."""
        choice = {
            "index": index,
            "text": self._echoes[index] + text,
            "logprobs": None,
        }
        if logprobs is not None:
            choice["logprobs"] = self._text_logprobs(index, self._prompt_logprobs[index], logprobs)
        if self._return_token_ids:
            choice["prompt_token_ids"] = self._prompt(index)
        if self._return_prompt_logprobs:
            choice["prompt_logprobs"] = self._prompt_entries(index)
        return choice

    def _prompt(self, index: int) -> list[int]:
        return self._prompts[index // self._choices_per_prompt]

    def _text_logprobs(
        self, index: int, of_prompt: Sequence[TokenLogprob] | None, of_output: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        first, shown = None, of_output
        if self._echo_logprobs and of_prompt is not None:
            first, shown = self._prompt(index)[0], [*of_prompt, *of_output]
        fields = text_logprobs(shown, self._token_text, self._text_offsets[index], first)
        self._text_offsets[index] += sum(map(len, fields["tokens"]))
        return fields
