"""The waiting queue: who is served next when more is asked for than can be computed.

Lower priority values go first. Within a priority, clients share by deficit longest-prefix-match (Cao et al.,
"Locality-aware Fair Scheduling in LLM Serving", arXiv 2501.14312). Service comes in rounds. In a round every client may
use a quantum of tokens; what it uses beyond that, it owes to the next rounds. As long as a client has tokens left, its
requests compete, and the one with the longest cached prefix goes first. When no client that waits has any left, the
next round begins. Credit is not saved up: a client that leaves a whole quantum unused is forgotten.

Nothing starves. Within a round everyone's tokens run out. A client's oldest request is passed over in favour of cached
ones, and a priority in favour of more urgent ones, for so many tokens at most, and then gets a turn. It is one turn per
as many tokens, so that under overload, when everything is old, priorities and shares still hold. Ages are counted in
tokens served: the order depends on the requests alone, never on the clock.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from itertools import islice

from kvbuffer.engine.request import Request
from kvbuffer.errors import QueueFullError

#: Tokens that a client may use in a round.
QUANTUM = 1024

#: What an output token costs in prompt tokens; VTC and DLPM charge as much.
OUTPUT_WEIGHT = 2

#: Tokens for which a client's oldest request, or a priority, may be passed over.
PATIENCE = 16 * QUANTUM

# Prefix lookups to choose one request; each walks a tree as deep as the prompt is long.
_MAX_LOOKUPS = 16

# Retry-After: the time in which this share of the queue is served, within bounds, at the rate of the last admissions.
_RETRY_SHARE = 1 / 8
_RETRY_BOUNDS_S = (1, 60)
_RATE_WINDOW = 64


class _Client:
    """One client's requests of one priority.

    Attributes:
        requests: those that wait, next first, with their places in line: negative for preempted ones, which come first.
        used: tokens used, on the scale of the level's ``horizon``.
        used_at_head: ``used`` when the first request became the first.
    """

    __slots__ = ("requests", "used", "used_at_head")

    def __init__(self, used: int) -> None:
        self.requests: OrderedDict[Request, int] = OrderedDict()
        self.used = self.used_at_head = used

    @property
    def head(self) -> Request:
        return next(iter(self.requests))

    @property
    def place(self) -> int:
        return next(iter(self.requests.values()))


class _Level:
    """The clients of one priority, from the arrival of its first request to the departure of its last.

    Attributes:
        clients: all that wait, and those whose use is still remembered.
        ready: those that wait and have tokens left in this round, next first.
        horizon: how many tokens a client may have used by the end of this round.
        num_waiting: requests of all clients.
        last_turn: tokens served by the whole queue when a request of this level was last taken.
    """

    def __init__(self, quantum: int, now: int) -> None:
        self._quantum = quantum
        self.clients: dict[str, _Client] = {}
        self.ready: OrderedDict[str, _Client] = OrderedDict()
        self.horizon = 0
        self.num_waiting = 0
        self.last_turn = now

    def client(self, name: str) -> _Client:
        """Return a client; a new one gets its tokens when the next round begins."""
        return self.clients.setdefault(name, _Client(self.horizon))

    def update(self, name: str) -> None:
        """Note whether a client is still, or again, ready."""
        client = self.clients[name]
        if client.requests and client.used < self.horizon:
            self.ready.setdefault(name, client)
        else:
            self.ready.pop(name, None)
        if not client.requests and client.used == self.horizon:  # there is nothing to remember
            del self.clients[name]

    def begin_round(self) -> None:
        """Give every client a quantum, or as many as it takes until one of those that wait is ready."""
        least = min(client.used for client in self.clients.values() if client.requests)
        self.horizon += ((least - self.horizon) // self._quantum + 1) * self._quantum
        absent = [n for n, c in self.clients.items() if not c.requests and c.used <= self.horizon - self._quantum]
        for name in absent:
            del self.clients[name]
        ready = [(n, c) for n, c in self.clients.items() if c.requests and c.used < self.horizon]
        self.ready = OrderedDict(sorted(ready, key=lambda item: item[1].place))

    def candidates(self, patience: int) -> Iterator[Request]:
        """Yield the requests that may go next, first come first; at most as many as may be looked up."""
        share = max(1, _MAX_LOOKUPS // len(self.ready))
        for client in islice(self.ready.values(), _MAX_LOOKUPS):
            must_go = client.place < 0 or client.used - client.used_at_head > patience
            yield from islice(client.requests, 1 if must_go else share)


class WaitingQueue:
    """Requests that wait to be admitted, and the order in which they are.

    Args:
        max_len: requests that may wait; None for any number. One client may take half of what the others leave free.
        quantum: tokens per client and round.
        patience: tokens for which a client's oldest request, or a priority, may be passed over.
        clock: seconds, for the time after which a refused client is told to retry.
    """

    def __init__(
        self,
        max_len: int | None = None,
        *,
        quantum: int = QUANTUM,
        patience: int = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_len = max_len
        self._quantum, self._patience, self._clock = quantum, patience, clock
        self._levels: OrderedDict[int, _Level] = OrderedDict()  # longest without a turn first
        self._priorities: list[int] = []  # sorted
        self._num_waiting: Counter[str] = Counter()  # per client
        self._len = 0
        self._next: Request | None = None
        self._num_pushed = self._num_pushed_front = 0
        self._served = 0
        self._last_favour = 0
        self._admissions: deque[float] = deque(maxlen=_RATE_WINDOW)

    def __len__(self) -> int:
        return self._len

    def __iter__(self) -> Iterator[Request]:
        """Yield what waits, most urgent priority first and each client's in order; not the order of service."""
        for priority in self._priorities:
            for client in self._levels[priority].clients.values():
                yield from client.requests

    def push(self, request: Request) -> None:
        """Add a new request at the end of its client's line.

        Raises:
            QueueFullError: too many requests wait, in all or from this client.
        """
        self._check_room(request.options.client)
        self._num_pushed += 1
        self._insert(request, self._num_pushed)

    def push_front(self, request: Request) -> None:
        """Put a preempted request back, first in its client's line, however full the queue is."""
        self._num_pushed_front += 1
        self._insert(request, -self._num_pushed_front)

    def peek(self, locality: Callable[[Request], int] | None = None) -> Request | None:
        """Return the request to admit next, or None; it stays the next one until it is taken or outranked.

        A request that waits for memory is therefore not passed over by smaller ones, and looking again costs nothing.

        Args:
            locality: returns how many tokens of a request's prompt are cached; asked for a few requests only. Without
                it, clients take turns and each one's requests go in order.
        """
        if self._next is None and self._len:
            self._next = self._choose(locality)
        return self._next

    def pop(self) -> Request:
        """Take the request that ``peek`` returned."""
        if self._next is None:
            raise RuntimeError("there is nothing to pop; peek first")
        request = self._next
        priority, name = request.options.priority, request.options.client
        if priority != self._priorities[0]:
            self._last_favour = self._served
        level = self._levels[priority]
        level.last_turn = self._served
        self._levels.move_to_end(priority)
        if name in level.ready:
            level.ready.move_to_end(name)
        self._admissions.append(self._clock())
        self.remove(request)
        return request

    def remove(self, request: Request) -> None:
        """Take out a request that is given up.

        Raises:
            RuntimeError: it does not wait here.
        """
        priority, name = request.options.priority, request.options.client
        level = self._levels.get(priority)
        client = None if level is None else level.clients.get(name)
        if level is None or client is None or request not in client.requests:
            raise RuntimeError(f"request {request.request_id!r} does not wait")
        if request is client.head:
            client.used_at_head = client.used
        del client.requests[request]
        level.num_waiting -= 1
        level.update(name)
        self._num_waiting[name] -= 1
        if not self._num_waiting[name]:
            del self._num_waiting[name]
        self._len -= 1
        if not level.num_waiting:  # with nobody left to share with, debts are forgiven
            del self._levels[priority]
            self._priorities.remove(priority)
        if request is self._next:
            self._next = None

    def charge(self, request: Request, *, prompt: int = 0, output: int = 0) -> None:
        """Charge a request's client for tokens.

        A prompt is charged whole when its request is admitted, less what is cached, so that several admissions in one
        step are shared fairly; not again after a preemption, which is not the client's doing.

        Args:
            request: one that was taken; it may have ended.
            prompt: prompt tokens to compute.
            output: output tokens computed.
        """
        tokens = prompt + OUTPUT_WEIGHT * output
        self._served += tokens
        level = self._levels.get(request.options.priority)
        if level is not None and tokens:
            level.client(request.options.client).used += tokens
            level.update(request.options.client)

    def check_integrity(self) -> None:
        """Check that the queue's parts agree; for tests.

        Raises:
            RuntimeError: they do not.
        """
        waiting = Counter(request.options.client for request in self)
        if waiting != self._num_waiting or waiting.total() != self._len:
            raise RuntimeError("the counts of waiting requests are wrong")
        if self._priorities != sorted(self._levels):
            raise RuntimeError("the list of priorities is wrong")
        for priority, level in self._levels.items():
            clients = level.clients
            if level.num_waiting != sum(len(client.requests) for client in clients.values()) or not level.num_waiting:
                raise RuntimeError(f"priority {priority} has the wrong number of requests")
            if set(level.ready) != {n for n, c in clients.items() if c.requests and c.used < level.horizon}:
                raise RuntimeError(f"the clients that are ready at priority {priority} are wrong")
            for client in clients.values():
                places = list(client.requests.values())
                if places != sorted(places):
                    raise RuntimeError("a client's requests are out of order")
        if self._next is not None and all(request is not self._next for request in self):
            raise RuntimeError("the next request does not wait")

    def _insert(self, request: Request, place: int) -> None:
        priority, name = request.options.priority, request.options.client
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = _Level(self._quantum, self._served)
            insort(self._priorities, priority)
        client = level.client(name)
        client.requests[request] = place
        if place < 0:
            client.requests.move_to_end(request, last=False)
        if client.head is request:
            client.used_at_head = client.used
        level.num_waiting += 1
        level.update(name)
        self._num_waiting[name] += 1
        self._len += 1
        if self._next is not None and (place < 0 or priority < self._next.options.priority):
            self._next = None

    def _choose(self, locality: Callable[[Request], int] | None) -> Request:
        level = self._levels[self._priorities[0]]
        neglected = next(iter(self._levels.values()))
        if self._served - max(neglected.last_turn, self._last_favour) > self._patience:
            level = neglected
        if not level.ready:
            level.begin_round()
        candidates = list(level.candidates(self._patience))
        if locality is None or len(candidates) == 1:
            return candidates[0]
        return max(candidates, key=locality)  # the first of several that are as long

    def _check_room(self, name: str) -> None:
        if self.max_len is None:
            return
        mine, free = self._num_waiting[name], self.max_len - self._len
        if free > 0 and mine < free:
            return
        if free <= 0:
            reason, message = "queue_full", f"the queue is full: {self._len} requests wait"
        else:
            who = f"user {name!r}" if name else "clients that name no user"
            reason = "client_queue_full"
            message = (
                f"{mine} requests of {who} wait, and one client may have no more than there are places left, {free}"
            )
        retry_s = self._retry_after_s()
        raise QueueFullError(f"{message} (max_queue_len is {self.max_len}); retry in {retry_s} s", reason, retry_s)

    def _retry_after_s(self) -> int:
        low, high = _RETRY_BOUNDS_S
        if not self._admissions:
            return low
        seconds_each = (self._clock() - self._admissions[0]) / len(self._admissions)
        return max(low, min(high, math.ceil(self._len * _RETRY_SHARE * seconds_each)))
