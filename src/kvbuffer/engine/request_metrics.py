"""Times and tokens of the requests served, kept cheaply enough to be updated for every token."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from kvbuffer.engine.request import CompletionDelta

# Bucket bounds in seconds: from a fast CPU decode step to a long queue.
_TOKEN_BOUNDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)
_REQUEST_BOUNDS = (
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
    200.0,
    500.0,
    1000.0,
)


class Histogram:
    """Counts per bucket, updated from one thread (prometheus_client's histogram locks on every update)."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``, in the unit of the bounds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


@dataclass(slots=True)
class RequestTimes:
    """Moments in one request's life, in seconds of ``time.monotonic``."""

    arrival: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    last_token: float = 0.0


class RequestMetrics:
    """Totals over all requests since the start; read by ``/metrics``."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_REQUEST_BOUNDS)
        self.inter_token_latency = Histogram(_TOKEN_BOUNDS)
        self.e2e_latency = Histogram(_REQUEST_BOUNDS)
        self.queue_time = Histogram(_REQUEST_BOUNDS)
        self.prefill_time = Histogram(_REQUEST_BOUNDS)
        self.decode_time = Histogram(_REQUEST_BOUNDS)
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()

    @property
    def seconds_per_token(self) -> float:
        """From arrival to the end, per output token, over all requests that have ended; 0 before the first."""
        return self.e2e_latency.sum / max(1, self.generation_tokens)

    def observe(self, times: RequestTimes, delta: CompletionDelta, now: float) -> None:
        """Account for one delta that reached the event loop at ``now``; advances ``times``."""
        if delta.token_ids:
            self.generation_tokens += len(delta.token_ids)
            if times.first_token:
                self.inter_token_latency.observe(now - times.last_token)
            else:
                times.first_token = now
                self.prompt_tokens += delta.num_prompt_tokens
                self.time_to_first_token.observe(now - times.arrival)
            times.last_token = now
        if delta.finish_reason is not None:
            self.finished[delta.finish_reason.value] += 1
            self.e2e_latency.observe(now - times.arrival)
            if times.first_token:
                self.decode_time.observe(times.last_token - times.first_token)
                self.queue_time.observe(delta.scheduled_at - times.arrival)
                self.prefill_time.observe(times.first_token - delta.scheduled_at)
