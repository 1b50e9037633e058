"""Answers from an InstCache store, before the engine hears of the request.

Only what the store is sure to answer as the engine would is looked up: the first turn of a conversation, under the
store's own system prompt, decoded greedily. Everything else passes by.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import Response

from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.request import CompletionDelta, FinishReason
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.errors import StoreError
from kvbuffer.instcache.entry import Answer
from kvbuffer.instcache.identity import Identity
from kvbuffer.instcache.store import Store
from kvbuffer.server.chat_protocol import ChatCompletionRequest
from kvbuffer.server.reply import Reply
from kvbuffer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

#: Marks an answer from the store.
HIT_HEADER = {"X-InstCache": "hit"}
#: How often a lookup first sees whether the store has been replaced.
_SWAP_INTERVAL_S = 1.0


@dataclass
class InstCacheStats:
    """Totals since the start.

    Attributes:
        queries: requests that were looked up.
        hits: those that were answered.
        hit_tokens: output tokens of these.
        hit_bytes: bytes of text of these.
        seconds_saved: what the engine would have taken for them, by what it takes for the others.
        damaged: entries that could not be read.
        swaps: stores that took the place of another.
        bypassed: requests that were not looked up, by why.
    """

    queries: int = 0
    hits: int = 0
    hit_tokens: int = 0
    hit_bytes: int = 0
    seconds_saved: float = 0.0
    damaged: int = 0
    swaps: int = 0
    bypassed: Counter[str] = field(default_factory=Counter)


class InstCache:
    """A store in front of an engine or of another server.

    Args:
        path: the store; whenever another file takes its place, that one is used from then on.
        identity: what the answers must have been made under; the store's own system prompt is allowed.
        tokenizer: turns stored tokens into text.
        max_model_len: longest prompt with its answer that the server behind would accept.
        allow_sampled: answer requests that ask for sampling, too.
        seconds: what the server behind takes for an answer of so many tokens.

    Attributes:
        stats: totals since the start.

    Raises:
        StoreError: the store cannot be used.
    """

    def __init__(
        self,
        path: Path,
        identity: Callable[[str | None], Identity],
        tokenizer: Tokenizer,
        max_model_len: int,
        allow_sampled: bool = False,
        seconds: Callable[[int], float] = lambda num_tokens: 0.0,
    ) -> None:
        self.stats = InstCacheStats()
        self.seconds = seconds
        self._path, self._identity, self._tokenizer = path, identity, tokenizer
        self._max_model_len, self._allow_sampled = max_model_len, allow_sampled
        self._version = _version(path)
        self._store = self._open()
        self._looked_at = time.monotonic()

    @property
    def num_entries(self) -> int:
        """Answers in the store."""
        return self._store.header.num_entries

    @property
    def num_bytes(self) -> int:
        """Size of the store's file."""
        return self._store.num_bytes

    def close(self) -> None:
        """Unmap the store."""
        self._store.close()

    def _open(self) -> Store:
        store = Store(self._path)
        try:
            store.check_identity(self._identity(store.header.identity.system_prompt))
        except BaseException:
            store.close()
            raise
        return store

    def _swap_if_replaced(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _SWAP_INTERVAL_S:
            return
        self._looked_at = now
        version = _version(self._path)
        if version in (None, self._version):
            return
        self._version = version
        try:
            store = self._open()
        except StoreError as error:
            logger.warning("%s; going on with the store it was to replace", error)
            return
        self._store.close()  # a lookup is over when it returns: none is under way
        self._store = store
        self.stats.swaps += 1

    def answer(self, body: ChatCompletionRequest, params: SamplingParams, request_id: str) -> CompletionDelta | None:
        """Return the answer to a request as one delta, if the store has it.

        Args:
            body: the request.
            params: what it comes to with the model's defaults.
            request_id: name of the engine's request that the delta is to stand for.
        """
        self._swap_if_replaced()
        system_prompt = self._store.header.identity.system_prompt
        reason = self._why_not(body, params, system_prompt)
        if reason is not None:
            self.stats.bypassed[reason] += 1
            return None
        self.stats.queries += 1
        try:
            found = self._store.get(_text(body, -1))
        except StoreError as error:
            logger.warning("%s: %s", self._path, error)
            self.stats.damaged += 1
            return None
        delta = None if found is None else self._delta(found, params, request_id)
        if delta is not None:
            self.stats.hits += 1
            self.stats.hit_tokens += delta.num_output_tokens
            self.stats.hit_bytes += len(delta.text.encode())
            self.stats.seconds_saved += self.seconds(delta.num_output_tokens)
        return delta

    def _why_not(self, body: ChatCompletionRequest, params: SamplingParams, system_prompt: str | None) -> str | None:
        """Return why a request is not looked up; None if it is."""
        roles = [message.role for message in body.messages]
        plain = all(message.content and not (message.name or message.tool_calls) for message in body.messages)
        if roles not in (["user"], ["system", "user"], ["developer", "user"]) or not plain:
            return "not_a_first_turn"
        if (None if len(roles) == 1 else _text(body, 0)) != system_prompt or body.chat_template_kwargs:
            return "personalised"
        if body.tools:
            return "tools"
        if params.logprobs is not None or params.prompt_logprobs is not None:
            return "logprobs"
        if params.n > 1:
            return "several_choices"
        if not params.greedy and not self._allow_sampled:
            return "sampled"
        if not _is_neutral(params) or not body.add_generation_prompt:
            return "sampling_parameters"
        return None

    def _delta(self, answer: Answer, params: SamplingParams, request_id: str) -> CompletionDelta | None:
        """Return what the engine would have answered within the request's limits; None where the store cannot tell."""
        room = self._max_model_len - answer.num_prompt_tokens
        if room < 1 or (params.max_tokens or 1) > room:
            return None  # the server behind refuses it, and knows how to say so
        limit = min(room, params.max_tokens or room)
        ends = answer.ended and len(answer.token_ids) <= limit
        visible = answer.token_ids[:-1] if ends else answer.token_ids[:limit]
        stop = None
        if params.stop:
            detokenizer = IncrementalDetokenizer(self._tokenizer, params)
            text, stop = detokenizer.append(visible)
            text += detokenizer.flush()
        else:  # what the increments add up to, in a fraction of the time
            text = self._tokenizer.decode(visible, skip_special_tokens=params.skip_special_tokens)
        if stop is not None:
            num_tokens, finish = detokenizer.num_tokens, FinishReason.STOP
        elif ends:
            num_tokens, finish = len(answer.token_ids), FinishReason.STOP
        elif len(answer.token_ids) >= limit:
            num_tokens, finish = limit, FinishReason.LENGTH
        else:
            return None  # it was cut off when it was stored, and more is asked for
        prompt = answer.num_prompt_tokens
        ids = answer.token_ids[:num_tokens]
        return CompletionDelta(request_id, text, ids, None, finish, stop, prompt, num_tokens, prompt, time.monotonic())


def stored_response(delta: CompletionDelta, reply: Reply, stream: bool) -> Response:
    """Return a stored answer in the shape of any other, marked in its usage and by a header."""
    reply.instcache_hit = True
    if stream:
        events = reply.events([delta]) + reply.last_events()
        headers = {**HIT_HEADER, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return Response(events, media_type="text/event-stream", headers=headers)
    reply.add([delta])
    return Response(reply.body(with_logprobs=False), media_type="application/json", headers=HIT_HEADER)


def _text(body: ChatCompletionRequest, index: int) -> str:
    return "\n".join(part.text for part in body.messages[index].content or ())


def _is_neutral(params: SamplingParams) -> bool:
    """Return whether nothing changes which token is the likeliest, or adds to what ends the answer but stop strings."""
    return (
        params.repetition_penalty == 1.0
        and params.presence_penalty == params.frequency_penalty == 0.0
        and not params.logit_bias
        and not params.stop_token_ids
        and not params.ignore_eos
        and not params.min_tokens
        and params.structured_outputs is None
    )


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size
