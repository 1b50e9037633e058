"""Which tokens of which requests are computed in the next step.

There are no phases. A request has computed some of its tokens and wants to reach all that are known; a token budget per
step shares that out: first one token for each request that decodes, then prompts, oldest first. A prompt that does not
fit is split at a multiple of the chunk length, which changes nothing in its result. Nothing starves: every request that
decodes gets its token, and however many they are, one chunk of a prompt is let in beside them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.engine.queue import WaitingQueue
from kvbuffer.engine.request import Request
from kvbuffer.ops.chunked import CHUNK


class ScheduledRequest(NamedTuple):
    """A request's share of a step: its next ``num_tokens`` uncomputed tokens."""

    request: Request
    num_tokens: int


class Scheduler:
    """Admits, shares out and preempts.

    Args:
        memory: where requests live.
        max_num_batched_tokens: token budget of a step, exceeded only so that nothing starves.
        max_queue_len: requests that may wait; None for any number.

    Attributes:
        waiting: requests without memory.
        running: requests with memory, oldest first.
        num_preemptions: requests sent back to the queue because attention pages ran out.
    """

    def __init__(self, memory: RequestMemory, max_num_batched_tokens: int, max_queue_len: int | None = None) -> None:
        self.memory = memory
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting = WaitingQueue(max_queue_len)
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a request; raise :class:`~kvbuffer.errors.QueueFullError` if too many wait."""
        self.waiting.push(request)

    def schedule(self) -> list[ScheduledRequest]:
        """Return the next step: requests that decode first, then those that prefill. Memory is taken for all of it."""
        self._make_room_for_decodes()
        batch = [ScheduledRequest(request, 1) for request in self.running if not request.is_prefilling]
        budget = max(CHUNK, self.max_num_batched_tokens - len(batch))
        for request in self._prefilling():
            remaining = len(request.token_ids) - request.num_computed_tokens
            # A part of a prompt ends at a chunk border.
            count = remaining if remaining <= budget else budget // CHUNK * CHUNK
            if count == 0:
                break
            if request.slot is None:
                self._admit(request)
            batch.append(ScheduledRequest(request, count))
            budget -= count
        return batch

    def finish(self, request: Request) -> None:
        """Forget a request and free its memory."""
        if request.slot is None:
            self.waiting.remove(request)
            return
        self.running.remove(request)
        self.memory.release(request.slot)
        request.slot = None

    def _prefilling(self) -> Iterator[Request]:
        """Yield running requests that prefill, then waiting ones for as long as the next one can be admitted."""
        yield from [request for request in self.running if request.is_prefilling]
        while (request := self.waiting.peek()) is not None:
            if not self.memory.can_admit(len(request.token_ids)):
                return
            yield request

    def _admit(self, request: Request) -> None:
        # Pages for all known tokens are taken at once, so that a prompt never stops half-way for want of memory.
        self.waiting.pop()
        if not request.scheduled_at:
            self.waiting.charge(request, prompt=request.num_prompt_tokens)
        request.slot = self.memory.admit(len(request.token_ids))
        request.num_prefill_tokens = len(request.token_ids)
        self.running.append(request)
        request.scheduled_at = request.scheduled_at or time.monotonic()

    def _make_room_for_decodes(self) -> None:
        """Give every decoding request, oldest first, a page for its next token; preempt the youngest if need be."""
        for request in list(self.running):
            if request.slot is None or request.is_prefilling:
                continue
            tokens = len(request.token_ids)
            while request.slot is not None and not self.memory.can_grow(request.slot, tokens):
                self._preempt(self.running[-1])
            if request.slot is not None:
                self.memory.grow(request.slot, tokens)

    def _preempt(self, request: Request) -> None:
        """Free a request's memory and queue it first; its tokens are kept and will be computed again."""
        assert request.slot is not None
        self.running.remove(request)
        self.memory.release(request.slot)
        request.slot = None
        request.num_computed_tokens = request.num_prefill_tokens = 0
        self.waiting.push_front(request)
        self.num_preemptions += 1
