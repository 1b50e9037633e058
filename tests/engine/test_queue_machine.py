"""Requests come, go and are served in any order; the books of the queue balance at every moment."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvbuffer.engine.request import Request
from kvbuffer.errors import QueueFullError
from tests.support.queues import queue, request, take


class QueueMachine(RuleBasedStateMachine):
    """Requests come, go and come back at random; the model is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = queue(max_len=12)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_pushed = 0

    @rule(client=st.sampled_from("abcd"), priority=st.integers(0, 2), cost=st.integers(1, 300))
    def push(self, client: str, priority: int, cost: int) -> None:
        self.num_pushed += 1
        new = request(str(self.num_pushed), client, priority, cost)
        mine = sum(r.options.client == client for r in self.waiting)
        free = 12 - len(self.waiting)
        if mine < free:
            self.queue.push(new)
            self.waiting.append(new)
            return
        with pytest.raises(QueueFullError) as error:
            self.queue.push(new)
        assert (error.value.reason == "queue_full") == (free <= 0)

    @precondition(lambda self: self.waiting)
    @rule(salt=st.integers(1, 1000))
    def pop(self, salt: int) -> None:
        first = take(self.queue, lambda r: 7919 * int(r.request_id) % salt)
        self.waiting.remove(first)
        self.running.append(first)

    @rule()
    def peek(self) -> None:
        assert self.queue.peek() in (self.waiting or [None])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.queue.remove(self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1))))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), back=st.booleans(), output=st.integers(0, 200))
    def end_or_preempt(self, data: st.DataObject, back: bool, output: int) -> None:
        one = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.queue.charge(one, output=output)
        if back:
            self.queue.push_front(one)
            self.waiting.append(one)

    @invariant()
    def agrees_with_the_list(self) -> None:
        self.queue.check_integrity()
        assert len(self.queue) == len(self.waiting)
        assert {id(r) for r in self.queue} == {id(r) for r in self.waiting}


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
