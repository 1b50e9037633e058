"""Who is served next: priorities, shares of clients, cached prefixes, and that nothing starves. No model is needed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbuffer.engine.queue import OUTPUT_WEIGHT, WaitingQueue
from kvbuffer.engine.request import Request
from kvbuffer.errors import QueueFullError
from tests.support.queues import PATIENCE, QUANTUM, queue, request, take


def filled(*requests: Request) -> WaitingQueue:
    q = queue()
    for one in requests:
        q.push(one)
    return q


def names(q: WaitingQueue, count: int | None = None, locality: Callable[[Request], int] | None = None) -> str:
    return " ".join(take(q, locality).request_id for _ in range(len(q) if count is None else count))


class TestOrder:
    def test_nothing_waits(self) -> None:
        q = queue()
        assert len(q) == 0
        assert q.peek() is None
        with pytest.raises(RuntimeError, match="peek first"):
            q.pop()

    def test_first_come_first_served(self) -> None:
        assert names(filled(request("a"), request("b"), request("c"))) == "a b c"

    def test_different_clients_in_order_of_arrival_and_then_in_turns(self) -> None:
        q = filled(request("a1", "a"), request("a2", "a"), request("b1", "b"), request("c1", "c"), request("b2", "b"))
        assert names(q) == "a1 b1 c1 a2 b2"

    def test_a_round_begins_with_the_client_that_has_waited_longest(self) -> None:
        q = filled(request("a1", "a", cost=QUANTUM + 1), request("b1", "b", cost=QUANTUM + 1))
        assert names(q, 1) == "a1"
        q.push(request("c1", "c"))
        assert names(q, 1) == "b1"
        q.push(request("b2", "b"))
        q.push(request("a2", "a"))
        assert names(q) == "c1 b2 a2"

    def test_lower_priority_values_first(self) -> None:
        q = filled(request("low", priority=5), request("normal"), request("urgent", priority=-5), request("next"))
        assert names(q) == "urgent normal next low"

    def test_the_longest_cached_prefix_first_then_order_of_arrival(self) -> None:
        cached = {"a": 0, "b": 8, "c": 64, "d": 8}
        q = filled(*(request(name) for name in cached))
        assert names(q, locality=lambda r: cached[r.request_id]) == "c b d a"

    def test_the_longest_cached_prefix_of_any_client_that_has_tokens_left(self) -> None:
        q = filled(request("a1", "a", cost=QUANTUM), request("a2", "a"), request("b1", "b"), request("b2", "b"))
        cached = {"a1": 9, "a2": 9, "b1": 0, "b2": 5}
        # After its first request client a has used its quantum; it is b's turn although a's next one is cached.
        assert names(q, locality=lambda r: cached[r.request_id]) == "a1 b2 b1 a2"

    def test_a_preempted_request_is_first_in_its_clients_line(self) -> None:
        q = filled(request("a"), request("b"), request("c"))
        first, second = take(q), take(q)
        q.push_front(second)
        q.push_front(first)
        assert names(q, locality=lambda r: 9 if r.request_id == "c" else 0) == "a b c"

    def test_a_preempted_request_goes_before_one_that_was_to_be_next(self) -> None:
        q = filled(request("a"), request("b"))
        first = take(q)
        assert q.peek() is not None
        q.push_front(first)
        assert names(q) == "a b"

    def test_a_preempted_request_does_not_overtake_a_more_urgent_one(self) -> None:
        q = filled(request("low", priority=1))
        low = take(q)
        q.push(request("normal"))
        q.push_front(low)
        assert names(q) == "normal low"

    def test_the_next_request_stays_the_next_one_unless_it_is_outranked(self) -> None:
        q = filled(request("a"))
        first = q.peek()
        q.push(request("cached"))
        assert q.peek(lambda r: 9 if r.request_id == "cached" else 0) is first
        q.push(request("urgent", priority=-1))
        assert names(q) == "urgent a cached"

    def test_removal_of_any_request(self) -> None:
        requests = [request(str(i), str(i % 2), i % 3) for i in range(7)]
        q = filled(*requests)
        assert q.peek() is requests[0]
        for gone in (requests[0], requests[5], requests[2]):
            q.remove(gone)
            q.check_integrity()
        with pytest.raises(RuntimeError, match="'5' does not wait"):
            q.remove(requests[5])
        assert sorted(r.request_id for r in q) == ["1", "3", "4", "6"]
        assert names(q) == "6 3 1 4"  # the first client keeps its turn


class TestCost:
    def test_few_prefixes_are_looked_up_and_none_twice(self) -> None:
        q = filled(*(request(str(i), str(i % 100)) for i in range(1000)))
        asked: list[Request] = []
        locality: Callable[[Request], int] = lambda r: asked.append(r) or len(asked)  # noqa: E731
        for _ in range(3):
            q.peek(locality)
        assert 2 <= len(asked) <= 16
        assert len(set(asked)) == len(asked)

    def test_no_prefix_is_looked_up_without_a_choice(self) -> None:
        assert names(filled(request("a")), locality=lambda r: pytest.fail("asked")) == "a"

    @pytest.mark.parametrize("clients", [1, 10_000])
    def test_ten_thousand_requests_come_and_go(self, clients: int) -> None:
        requests = [request(str(i), str(i % clients)) for i in range(10_000)]
        started = time.perf_counter()
        q = filled(*requests)
        for gone in random.Random(0).sample(requests, 5000):
            q.remove(gone)
        while q.peek() is not None:
            q.charge(q.pop(), prompt=30)
        assert time.perf_counter() - started < 5  # a walk of the queue for each of them would take minutes
        q.check_integrity()

    def test_clients_that_gave_up_are_forgotten(self) -> None:
        q = filled(request("waits for memory", "patient"))
        q.peek()
        for i in range(100):
            gone = request("gone", f"gone {i}")
            q.push(gone)
            q.remove(gone)
        assert list(q._levels[0].clients) == ["patient"]

    def test_clients_that_left_are_forgotten(self) -> None:
        q = filled(*(request(f"x{i}", "backlogged") for i in range(1000)))
        for i in range(1000):
            if i % 2:
                q.push(request(str(i), f"client {i}", cost=3 * QUANTUM))
            gone = request("gone", f"gone {i}")
            q.push(gone)
            q.remove(gone)
            take(q)
            [level] = q._levels.values()
            assert len(level.clients) < 100
        names(q)
        assert not q._levels
        assert not q._num_waiting


class TestFairness:
    @settings(max_examples=100, deadline=None)
    @given(costs=st.lists(st.integers(1, 3 * QUANTUM), min_size=20, max_size=80), seed=st.integers(0, 2**20))
    def test_clients_with_work_get_equal_tokens(self, costs: list[int], seed: int) -> None:
        """Whatever their requests cost and whatever is cached: within a quantum and one request of each other."""
        generator = random.Random(seed)
        q, used = queue(), {"a": 0, "b": 0, "c": 0}
        for i in range(2):
            for client in used:
                q.push(request(str(i), client, cost=generator.choice(costs)))
        for cost in costs:
            served, output = take(q, lambda r: generator.randrange(5)), generator.randrange(10)
            q.charge(served, output=output)
            used[served.options.client] += served.num_prompt_tokens + OUTPUT_WEIGHT * output
            q.push(request("more", served.options.client, cost=cost))
            assert max(used.values()) - min(used.values()) <= QUANTUM + max(costs) + OUTPUT_WEIGHT * 10

    def test_a_client_that_was_away_gets_a_quantum_at_most(self) -> None:
        q = filled(*(request(str(i), "there") for i in range(200)), request("x", "away"))
        for _ in range(100):
            take(q)
        for i in range(100):
            q.push(request(str(i), "away"))
        served = [take(q).options.client for _ in range(100)]
        assert 45 <= served.count("away") <= 45 + QUANTUM // 10
        assert "there" in served[: QUANTUM // 10 + 10]

    def test_debts_are_paid_before_the_next_turn(self) -> None:
        q = filled(request("big", "a", cost=5 * QUANTUM), *(request(str(i), "b") for i in range(100)))
        assert take(q).request_id == "big"
        q.push(request("a2", "a"))
        before = names(q).split().index("a2")
        assert 4 * QUANTUM // 10 <= before <= 5 * QUANTUM // 10 + 1

    def test_output_tokens_count_for_the_share(self) -> None:
        q = filled(*(request(f"{c}{i}", c) for i in range(50) for c in "ab"))
        talker = q.peek()
        assert talker is not None
        served = []
        for _ in range(40):
            served.append(take(q).options.client)
            if served[-1] == talker.options.client:
                q.charge(request("", served[-1]), output=15)
        assert served.count(talker.options.client) == pytest.approx(8, abs=1)  # 40 tokens against 10

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.integers(1, 300)), max_size=30))
    def test_the_order_depends_on_the_requests_alone(self, arrivals: list[tuple[str, int, int]]) -> None:
        orders = []
        for clock in (lambda: 0.0, time.monotonic):
            q = queue(clock=clock)
            for i, (client, priority, cost) in enumerate(arrivals):
                q.push(request(str(i), client, priority, cost))
            orders.append(names(q))
        assert orders[0] == orders[1]


class TestNothingStarves:
    def test_behind_more_urgent_priorities(self) -> None:
        q, waited = filled(request("victim", priority=9), request("other", priority=5)), 0
        while any(r.request_id == "victim" for r in q):
            q.push(request("urgent", cost=30))
            waited += take(q).num_prompt_tokens
        assert PATIENCE < waited <= 2 * (PATIENCE + 2 * 30)

    def test_and_the_urgent_keep_almost_all_of_the_service(self) -> None:
        q = filled(*(request(str(i), priority=i % 4 + 1) for i in range(40)))
        served = []
        for _ in range(1300):
            q.push(request("urgent"))
            served.append(take(q).options.priority)
        favoured = [priority for priority in served if priority]
        assert favoured == [1, 2, 3, 4] * 3  # one in every 1000 tokens of 10 each, and in turns

    def test_a_priority_that_was_just_served_has_not_been_waiting(self) -> None:
        q = filled(*(request(str(i), priority=1) for i in range(2 * PATIENCE // 10)))
        for _ in range(PATIENCE // 10 + 1):
            take(q)
        for _ in range(PATIENCE // 10):
            q.push(request("urgent"))
            assert take(q).request_id == "urgent"

    def test_behind_cached_requests_of_the_same_client(self) -> None:
        q, waited = filled(request("victim")), 0
        while any(r.request_id == "victim" for r in q):
            q.push(request("cached", cost=30))
            waited += take(q, lambda r: int(r.request_id == "cached")).num_prompt_tokens
        assert PATIENCE < waited <= PATIENCE + 2 * 30

    def test_and_cached_requests_still_go_first_however_much_was_served(self) -> None:
        q = filled(*(request(str(i)) for i in range(2 * PATIENCE // 10)), request("x", "other"))
        for _ in range(PATIENCE // 10 + 10):
            take(q)
        second = [r for r in q if not r.options.client][1]
        assert take(q, lambda r: int(r is second)) is second

    def test_and_cached_requests_of_a_client_that_returns(self) -> None:
        q = filled(request("big", "a", cost=2 * PATIENCE), *(request("x", "b") for _ in range(3 * PATIENCE // 10)))
        assert take(q).request_id == "big"
        for name in ("first", "cached"):
            q.push(request(name, "a"))
        while (name := take(q, lambda r: int(r.request_id == "cached")).request_id) == "x":
            pass
        assert name == "cached"

    def test_behind_clients_that_nobody_has_seen_before(self) -> None:
        q = filled(request("big", "victim", cost=10 * QUANTUM), request("second", "victim"))
        for i in range(5):
            q.push(request("new", f"first {i}"))
        assert take(q).request_id == "big"
        turns = 0
        while any(r.request_id == "second" for r in q):
            q.push(request("new", f"client {turns}"))
            take(q)
            turns += 1
        assert turns <= 12 * 6  # rounds until the debt is paid, times the clients of a round

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 2**20), ahead=st.integers(0, 10))
    def test_behind_any_mixture(self, seed: int, ahead: int) -> None:
        """Everything arrives as fast as it is served, at random priorities from random clients with random caches."""
        generator = random.Random(seed)

        def arrival(name: str) -> Request:
            return request(name, generator.choice("abc"), generator.randrange(3), generator.randint(1, 50))

        q = filled(*(arrival("ahead") for _ in range(ahead)))
        victim = request("victim", "a", 2)
        q.push(victim)
        waited = 0
        while victim in list(q):
            q.push(arrival("later"))
            waited += take(q, lambda r: 0 if r is victim else generator.randrange(9)).num_prompt_tokens
        # Its priority gets one turn per patience, its client one of those in three or so, and within its client it is
        # passed over for a patience of the client's own tokens, of at most 50 in a turn.
        assert waited <= (ahead + 3 + PATIENCE) * 3 * (PATIENCE + 100)


class TestLimits:
    def test_a_full_queue_refuses_and_says_what_is_full(self) -> None:
        q = queue(max_len=3)
        for client in "abc":
            q.push(request("r", client))
        with pytest.raises(QueueFullError, match=r"the queue is full: 3 requests wait \(max_queue_len is 3\)") as error:
            q.push(request("r", "d"))
        assert error.value.reason == "queue_full"
        q.check_integrity()
        take(q)
        q.push(request("r", "d"))

    def test_one_client_leaves_half_of_the_queue_to_others(self) -> None:
        q = queue(max_len=8)
        for _ in range(4):
            q.push(request("r", "greedy"))
        with pytest.raises(QueueFullError, match="4 requests of user 'greedy' wait") as error:
            q.push(request("r", "greedy"))
        assert error.value.reason == "client_queue_full"
        q.push(request("r", "other"))
        q.push(request("r", "third"))

    def test_those_without_a_name_are_one_client(self) -> None:
        q = queue(max_len=2)
        q.push(request("r"))
        with pytest.raises(QueueFullError, match="1 requests of clients that name no user wait"):
            q.push(request("r"))

    def test_a_preempted_request_always_comes_back(self) -> None:
        q = queue(max_len=1)
        q.push(request("a"))
        preempted = take(q)
        q.push(request("b"))
        q.push_front(preempted)
        assert names(q) == "a b"

    def test_when_to_retry_follows_the_rate_of_service(self) -> None:
        now = 0.0
        q = queue(max_len=80, clock=lambda: now)

        def retry_after() -> int:
            with pytest.raises(QueueFullError) as error:
                q.push(request("more", "more"))
            return error.value.retry_after_s

        for i in range(80):
            q.push(request("r", str(i)))
        assert retry_after() == 1  # nothing is known yet
        for i in range(20):
            now += 2.0
            take(q)
            q.push(request("r", f"new {i}"))
        assert retry_after() == 19  # a place in ten, at 19 intervals of 2 s for 20 admissions
        now += 1000.0
        assert retry_after() == 60
