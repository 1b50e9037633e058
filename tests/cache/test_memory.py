"""Whatever requests come, grow and go, each one's memory is its own and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import attention_pages
from tests.support.plans import sized_plan


class RequestMemoryMachine(RuleBasedStateMachine):
    """Admits, grows and releases at random; the model is a dictionary of lengths."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.plan = sized_plan(slots=4, pages=11, buffer_len=33)
        self.memory = RequestMemory(self.plan)
        self.lengths: dict[int, int] = {}

    @property
    def free_pages(self) -> int:
        return self.plan.num_attention_pages - sum(map(attention_pages, self.lengths.values()))

    @rule(target=live, tokens=st.integers(1, 128))
    def admit(self, tokens: int) -> int | None:
        fits = len(self.lengths) < 4 and attention_pages(tokens) <= self.free_pages
        assert self.memory.can_admit(tokens) == fits
        if not fits:
            return None
        slot = self.memory.admit(tokens)
        assert slot not in self.lengths
        assert self.memory.fill[slot] == 0
        self.lengths[slot] = tokens
        self.memory.fill[slot] = 3
        return slot

    @rule(slot=live, extra=st.integers(0, 40))
    def grow(self, slot: int | None, extra: int) -> None:
        if slot not in self.lengths:
            return
        tokens = min(128, self.lengths[slot] + extra)
        more = attention_pages(tokens) - attention_pages(self.lengths[slot])
        assert self.memory.can_grow(slot, tokens) == (more <= self.free_pages)
        if more <= self.free_pages:
            before = self.pages(slot)
            self.memory.grow(slot, tokens)
            self.lengths[slot] = tokens
            assert self.pages(slot)[: len(before)] == before

    @rule(slot=consumes(live))
    def release(self, slot: int | None) -> None:
        if slot in self.lengths:
            self.memory.release(slot)
            del self.lengths[slot]

    def pages(self, slot: int) -> list[int]:
        return self.memory.attention_table[slot, : attention_pages(self.lengths[slot])].tolist()

    @invariant()
    def the_books_balance(self) -> None:
        self.memory.check_integrity()
        assert self.memory.slots.num_used == len(self.lengths)
        assert self.memory.attention_pages.num_free == self.free_pages

    @invariant()
    def no_page_has_two_owners(self) -> None:
        pages = [page for slot in self.lengths for page in self.pages(slot)]
        records = [page for slot in self.lengths for page in self.memory.record_table[slot].tolist()]
        for held, size in ((pages, self.plan.num_attention_pages), (records, self.plan.num_record_pages)):
            assert len(set(held)) == len(held)
            assert all(0 <= page < size for page in held)


TestRequestMemory = RequestMemoryMachine.TestCase
TestRequestMemory.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_asking_changes_nothing() -> None:
    memory = RequestMemory(sized_plan(slots=2, pages=4))
    slot = memory.admit(17)
    table = memory.attention_table.copy()
    assert memory.can_admit(32)
    assert not memory.can_admit(33)
    assert memory.can_grow(slot, 64)
    assert not memory.can_grow(slot, 65)
    assert np.array_equal(table, memory.attention_table)
    assert memory.attention_pages.num_used == 2


def test_a_slot_is_needed_even_when_pages_are_free() -> None:
    memory = RequestMemory(sized_plan(slots=1, pages=100))
    memory.admit(1)
    assert not memory.can_admit(1)


def test_releasing_twice_is_an_error() -> None:
    memory = RequestMemory(sized_plan(slots=2, pages=4))
    slot = memory.admit(20)
    memory.release(slot)
    with pytest.raises(RuntimeError, match="not in use"):
        memory.release(slot)


def test_check_integrity_finds_pages_that_no_request_holds() -> None:
    memory = RequestMemory(sized_plan(slots=2, pages=4))
    memory.admit(20)
    memory.attention_pages.take(1)
    with pytest.raises(RuntimeError, match="attention pages in use"):
        memory.check_integrity()
