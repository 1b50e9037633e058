"""How the deltas of one HTTP request become its answer, whole or as server-sent events: what both endpoints share."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from kvbuffer.engine.request import CompletionDelta, FinishReason, TokenLogprob
from kvbuffer.errors import KVBufferError
from kvbuffer.server.errors import APIError
from kvbuffer.server.logprobs import TokenText, prompt_logprobs

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
