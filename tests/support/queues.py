"""Requests and queues of them, without a model."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.queue import WaitingQueue
from kvbuffer.engine.request import Request, RequestOptions
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState

PARAMS = SamplingParams()
QUANTUM, PATIENCE = 100, 1000


def request(name: str, client: str = "", priority: int = 0, cost: int = 10) -> Request:
    state, text = SamplingState(PARAMS, [], []), IncrementalDetokenizer(None, PARAMS)  # type: ignore[arg-type]
    return Request(name, PARAMS, [0] * cost, cost, cost + 8, state, text, RequestOptions(priority, client))


def queue(max_len: int | None = None, clock: Callable[[], float] = time.monotonic) -> WaitingQueue:
    return WaitingQueue(max_len, quantum=QUANTUM, patience=PATIENCE, clock=clock)


def take(q: WaitingQueue, locality: Callable[[Request], int] | None = None) -> Request:
    """Admit the next request and charge its prompt, as the scheduler does."""
    first = q.peek(locality)
    assert first is not None
    assert q.pop() is first
    q.charge(first, prompt=first.num_prompt_tokens)
    q.check_integrity()
    return first
