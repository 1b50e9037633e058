"""Whatever requests come, grow, fold, share and go, no block is lost, and nobody writes where another one reads."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import PROMPT_TAIL, RECORD_PAGE_SIZE, record_pages
from kvbuffer.cache.work import Copy, Fold
from tests.support.memories import admit, plan


def pages(memory: RequestMemory, row: int, count: int) -> list[int]:
    return memory.attention_table[row, :count].tolist()


class TestSharing:
    """A prompt of 100 tokens: a state of the first 95, 5 records."""

    tokens: ClassVar = list(range(100))

    def published(self, memory: RequestMemory) -> int:
        row, _ = admit(memory, self.tokens)
        memory.fill[row] = PROMPT_TAIL
        memory.publish(row, self.tokens)
        return row

    def test_the_same_prompt_shares_everything_but_its_last_token(self) -> None:
        memory = RequestMemory(plan())
        first = self.published(memory)
        second, cached = admit(memory, self.tokens)
        assert (cached, memory.fill[second]) == (99, PROMPT_TAIL - 1)
        assert memory.slot[second] == memory.slot[first]
        assert pages(memory, second, 6) == pages(memory, first, 6)

    def test_pages_that_both_will_append_to_are_copied(self) -> None:
        memory = RequestMemory(plan())
        first = self.published(memory)
        memory.work.clear()
        second, _ = admit(memory, self.tokens)
        assert set(memory.work) == {
            Copy("attention_pages", memory.attention_table[first, 6], memory.attention_table[second, 6]),
            Copy("record_pages", memory.record_table[first, 0], memory.record_table[second, 0]),
            Copy("rings", memory.work[1].source, memory.ring[second]),  # type: ignore[union-attr]
        }
        assert memory.record_table[first, 0] != memory.record_table[second, 0]

    def test_a_shared_state_is_folded_into_another_slot(self) -> None:
        memory = RequestMemory(plan())
        row = self.published(memory)
        shared, page = int(memory.slot[row]), int(memory.record_table[row, 0])
        assert not memory.folds_in_place(row)
        assert memory.own_state(row)
        assert memory.slot[row] != shared
        assert memory.work[-1] == Fold(shared, int(memory.slot[row]), (page,), PROMPT_TAIL)
        assert admit(memory, self.tokens)[1] == 99

    def test_without_another_slot_the_prefix_gives_up_its_state(self) -> None:
        memory = RequestMemory(dataclasses.replace(plan(), num_slots=1))
        row = self.published(memory)
        shared = int(memory.slot[row])
        assert memory.own_state(row)
        assert memory.slot[row] == shared
        assert memory.prefixes is not None
        assert memory.prefixes.match(self.tokens, None, 99).num_tokens == 0

    def test_an_own_state_without_records_needs_no_work(self) -> None:
        memory = RequestMemory(plan())
        row, _ = admit(memory, self.tokens)
        assert memory.own_state(row)
        assert memory.work == []

    def test_a_longer_prompt_continues_from_a_copy_of_the_state(self) -> None:
        memory = RequestMemory(plan(pages=60, max_model_len=256))
        first = self.published(memory)
        memory.work.clear()
        second, cached = admit(memory, [*self.tokens, *range(200, 300)])
        assert (cached, memory.fill[second]) == (100, 0)
        assert memory.slot[second] != memory.slot[first]
        page = int(memory.record_table[first, 0])
        assert Fold(int(memory.slot[first]), int(memory.slot[second]), (page,), PROMPT_TAIL) in [
            work if isinstance(work, Copy) else work._replace(pages=(page,)) for work in memory.work
        ]

    def test_a_text_may_leave_the_prompt_before_its_last_tokens(self) -> None:
        """Where the step that computes these keeps the convolutions' inputs; no state is needed beside the prompt's."""
        memory = RequestMemory(plan())
        first, _ = admit(memory, self.tokens)
        memory.fill[first] = PROMPT_TAIL
        assert memory.keep_ring(first)
        kept, border = int(memory.kept_ring[first]), 100 - PROMPT_TAIL
        memory.publish(first, self.tokens)
        assert memory.kept_ring[first] == -1
        for shared in range(border, 99):
            second, cached = admit(memory, [*self.tokens[:shared], *[7] * 9])
            assert (cached, memory.fill[second]) == (border, 0)
            assert memory.slot[second] == memory.slot[first]
            assert memory.work[-1] == Copy("rings", kept, int(memory.ring[second]))
            memory.release(second)
        memory.check_integrity()

    def test_a_ring_that_is_kept_goes_with_a_request_that_is_not_published(self) -> None:
        memory = RequestMemory(plan())
        row, _ = admit(memory, self.tokens)
        assert memory.keep_ring(row)
        memory.check_integrity()
        memory.release(row)
        assert all(pool.num_used == 0 for pool in memory.pools[:4])

    def test_no_ring_is_kept_without_room_or_without_a_cache(self) -> None:
        for memory in (RequestMemory(dataclasses.replace(plan(), num_rings=1)), RequestMemory(plan(), False)):
            row, _ = admit(memory, self.tokens)
            assert not memory.keep_ring(row)
            assert memory.kept_ring[row] == -1

    def test_other_salts_share_nothing(self) -> None:
        memory = RequestMemory(plan())
        self.published(memory)
        admission = memory.admit(self.tokens, "someone else")
        assert not isinstance(admission, str)
        assert (admission.match.num_tokens, admission.match.branch) == (0, 0)

    def test_what_is_published_is_evicted_when_memory_is_wanted(self) -> None:
        memory = RequestMemory(plan(slots=2, pages=8))
        row, _ = admit(memory, self.tokens)
        memory.publish(row, self.tokens, origin="output")
        memory.release(row)
        row, cached = admit(memory, [7] * 128)
        assert cached == 0
        memory.check_integrity()

    def test_without_prefix_caching_nothing_is_kept(self) -> None:
        memory = RequestMemory(plan(), prefix_caching=False)
        row = self.published(memory)
        memory.release(row)
        assert all(pool.num_used == 0 for pool in memory.pools[:4])


TEXT = np.random.default_rng(0).integers(0, 2, 128).tolist()


class RequestMemoryMachine(RuleBasedStateMachine):
    """Admits, grows, folds, publishes and releases at random, with few texts that share long beginnings."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = RequestMemory(plan(slots=3, pages=14))
        self.live: dict[int, list[int]] = {}

    @rule(length=st.integers(1, 120), fork=st.integers(0, 120), end=st.integers(2, 5))
    def admit(self, length: int, fork: int, end: int) -> None:
        tokens = [*TEXT[: min(fork, length)], *[end] * (length - fork)]
        admission = self.memory.admit(tokens)
        if isinstance(admission, str):
            return
        row, cached = admission.row, admission.match.num_tokens
        assert row not in self.live
        assert cached < length
        if self.memory.slot[row] < 0 or cached:
            grown = int(self.memory.fill[row]) + length - cached
            if grown <= self.memory.plan.max_records:
                assert self.memory.extend(row, length, grown)
                self.memory.fill[row] = grown
        self.live[row] = tokens

    @rule(data=st.data(), count=st.integers(1, 9))
    def decode(self, data: st.DataObject, count: int) -> None:
        for row in self.some_row(data):
            tokens, fill = self.live[row], int(self.memory.fill[row])
            if len(tokens) + count > 128 or fill + count > self.memory.plan.max_records:
                continue
            if self.memory.extend(row, len(tokens) + count, fill + count):
                first = fill // RECORD_PAGE_SIZE
                written = self.memory.record_table[row, first : record_pages(fill + count)].tolist()
                own = [self.memory.pools.record_pages.references(page) for page in written]
                kept = [self.memory.pools.record_pages.kept(page) for page in written]
                assert [a - b for a, b in zip(own, kept, strict=True)] == [1] * len(written)
                self.live[row] = [*tokens, *[1] * count]
                self.memory.fill[row] += count

    @rule(data=st.data())
    def fold(self, data: st.DataObject) -> None:
        for row in self.some_row(data):
            if self.memory.fill[row] and self.memory.folds_in_place(row):
                self.memory.folded(row)
            elif self.memory.own_state(row):
                assert self.memory.pools.slots.references(int(self.memory.slot[row])) == 1
                assert self.memory.fill[row] == 0

    @rule(data=st.data(), keep=st.booleans())
    def publish(self, data: st.DataObject, keep: bool) -> None:
        for row in self.some_row(data):
            if keep and self.memory.fill[row] >= PROMPT_TAIL < len(self.live[row]):
                self.memory.keep_ring(row)
            self.memory.publish(row, self.live[row])

    @rule(data=st.data(), publish=st.booleans())
    def release(self, data: st.DataObject, publish: bool) -> None:
        for row in self.some_row(data):
            tokens = self.live.pop(row)
            if publish:
                self.memory.publish(row, tokens, origin="output")
            self.memory.release(row)

    def some_row(self, data: st.DataObject) -> list[int]:
        return [data.draw(st.sampled_from(sorted(self.live)))] if self.live else []

    @invariant()
    def the_books_balance(self) -> None:
        self.memory.check_integrity()

    def teardown(self) -> None:
        for row in list(self.live):
            self.memory.release(row)
        assert self.memory.prefixes is not None
        self.memory.prefixes.clear()
        assert all(pool.num_used == 0 for pool in self.memory.pools[:4])


def test_any_order_of_events_keeps_the_books() -> None:
    run_state_machine_as_test(
        RequestMemoryMachine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )
