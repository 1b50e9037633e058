"""Blocks never have more memory than the budget, whatever kind they are of; some is taken while there is time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import MemoryPlan
from kvbuffer.cache.pools import POOL_KINDS, PoolKind
from kvbuffer.cache.residency import Residency
from kvbuffer.cache.shapes import CacheShape
from kvbuffer.cache.store import allocate
from kvbuffer.cache.transfer import block_tensors
from kvbuffer.ops import memory
from tests.support.plans import plan_for, shape

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not memory.ELASTIC, reason="memory cannot be given back piece by piece")


class Bench:
    """Pools, their tensors, and what the test has written to each block."""

    def __init__(self, plan: MemoryPlan, cache_shape: CacheShape | None = None) -> None:
        self.pools = RequestMemory(plan).pools
        self.caches = allocate(cache_shape or shape(), plan)
        self.residency = Residency(self.pools, plan, self.caches)
        self.held: list[tuple[PoolKind, int, int]] = []

    def take(self, kind: PoolKind, count: int) -> None:
        """Take as many blocks as there is room for, settle, and write a number of its own to each."""
        blocks = self.pools.by_kind(kind).take(min(count, self.pools.room(kind)))
        self.residency.settle()
        assert self.residency.num_bytes <= self.pools.budget
        for block in blocks:
            value = len(self.held) % 100
            self.held.append((kind, block, value))
            for tensor in block_tensors(self.caches, kind):
                tensor[block] = value

    def give_back(self, which: int) -> None:
        kind, block, _ = self.held.pop(which)
        self.pools.by_kind(kind).give_back([block])

    def check(self) -> None:
        for kind, block, value in self.held:
            assert all((tensor[block] == value).all() for tensor in block_tensors(self.caches, kind))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_held_blocks_keep_what_was_written_to_them(data: st.DataObject) -> None:
    bench = Bench(plan_for(shape(), MIB, max_model_len=64))
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["take", "take", "give back", "ahead"]))
        if action == "take":
            bench.take(data.draw(st.sampled_from(POOL_KINDS)), data.draw(st.integers(1, 40)))
        elif action == "ahead":
            bench.residency.take_ahead()
        while action == "give back" and bench.held and data.draw(st.booleans()):
            bench.give_back(data.draw(st.integers(0, len(bench.held) - 1)))
    bench.check()


def test_memory_goes_from_one_kind_to_another() -> None:
    bench = Bench(plan_for(shape(), 4 * MIB))
    for kind in POOL_KINDS * 2:
        bench.take(kind, 1 << 20)
        bench.check()
        pool = bench.pools.by_kind(kind)
        assert pool.num_used * pool.block_bytes > 4 * MIB - pool.block_bytes
        while bench.held:
            bench.give_back(-1)


def test_memory_that_was_given_back_is_used_again_before_more_is_taken() -> None:
    bench = Bench(plan_for(shape(), 4 * MIB))
    for _ in range(5):
        bench.take("slots", 3)
        bench.take("rings", 2)
        assert bench.residency.num_bytes == 3 * bench.pools.slots.block_bytes + 2 * bench.pools.rings.block_bytes
        while bench.held:
            bench.give_back(0)


def run_ahead(residency: Residency) -> int:
    count = 0
    while residency.take_ahead():
        count += 1
        assert count < 1000
    return count


def test_ahead_is_taken_in_small_pieces_and_again_when_half_of_it_is_used() -> None:
    plan = plan_for(shape(), 64 * MIB)
    bench = Bench(plan)
    assert run_ahead(bench.residency) >= 7
    ahead = bench.residency.num_bytes
    assert 8 * MIB < ahead <= 16 * MIB
    assert run_ahead(bench.residency) == 0
    bench.take("slots", 10)
    assert bench.residency.num_bytes == ahead  # they had memory
    while bench.residency.num_bytes == ahead:
        bench.take("slots", 10)
    assert run_ahead(bench.residency) > 0
    bench.check()


def test_ahead_gives_way_to_what_is_needed() -> None:
    bench = Bench(plan_for(shape(), 4 * MIB))
    run_ahead(bench.residency)
    bench.take("attention_pages", 1 << 20)
    assert run_ahead(bench.residency) == 0
    bench.check()


def test_all_of_the_budget_can_be_taken_at_the_start() -> None:
    bench = Bench(plan_for(shape(), 64 * MIB))
    bench.residency.take_all()
    assert 60 * MIB < bench.residency.num_bytes <= 64 * MIB
    bench.take("slots", 100)
    assert bench.residency.num_bytes > 60 * MIB


@pytest.mark.parametrize("kind", POOL_KINDS)
def test_what_was_taken_for_other_kinds_goes_as_it_is_needed(kind: PoolKind) -> None:
    bench = Bench(plan_for(shape(), 64 * MIB))
    bench.residency.take_all()
    while bench.pools.room(kind):
        bench.take(kind, 50)
        assert bench.residency.num_bytes > 60 * MIB
    bench.check()


def test_nothing_is_taken_ahead_where_the_system_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "populate", lambda tensor: False)
    assert run_ahead(Bench(plan_for(shape(), 64 * MIB)).residency) < 10


def test_the_process_grows_by_no_more_than_the_budget() -> None:
    """Measured from outside the books: the resident size, in a process of its own."""
    output = subprocess.run([sys.executable, "-c", _GROW], capture_output=True, text=True, check=True).stdout
    most, budget = map(int, output.split())
    assert 0.9 * budget < most < 1.03 * budget


_GROW = """
from pathlib import Path
from kvbuffer.cache.shapes import CacheShape, LinearShape
from tests.cache.test_residency import Bench, MIB, POOL_KINDS, plan_for

def resident():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])

shape = CacheShape(("linear_attention", "full_attention"), LinearShape(2, 4, 64, 128, 4), 4, 64, 4096)
bench = Bench(plan_for(shape, 96 * MIB), shape)
bench.take("slots", 10)
before, most = resident() - bench.residency.num_bytes, 0
for kind in POOL_KINDS * 2:
    bench.take(kind, 1 << 20)
    most = max(most, resident() - before)
    bench.held = []
    pool = bench.pools.by_kind(kind)
    # Every tenth block stays, so that what goes has holes in it.
    pool.give_back([block for block in range(pool.num_taken) if pool.references(block) and block % 10])
print(most, 96 * MIB)
"""


@pytest.mark.parametrize("budget", [MIB, 500 * MIB])
def test_huge_pages_are_for_budgets_that_they_hardly_add_to(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small: list[Any] = []
    monkeypatch.setattr(memory, "use_small_pages", small.append)
    model = shape(linear=1, attention=0)
    Bench(plan_for(model, budget), model)
    assert bool(small) == (budget == MIB)


def test_released_memory_is_zero_and_can_be_written() -> None:
    x = memory.empty(8 * MIB, dtype=torch.uint8).fill_(7)
    memory.release(x[MIB + 5 : 3 * MIB + 9])
    assert (x[: MIB + 5] == 7).all()
    assert (x[3 * MIB + 9 :] == 7).all()
    assert (x[MIB + 4096 + 5 : 3 * MIB] == 0).all()
    assert memory.populate(x[: 2 * MIB])
    assert (x[: MIB + 5] == 7).all()
