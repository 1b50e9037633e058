"""Memory is reserved for as much as the budget could make of each kind, or where that cannot be, divided."""

from __future__ import annotations

import pytest
from torch import Tensor

from kvbuffer.cache.pools import POOL_KINDS
from kvbuffer.cache.store import reserve
from kvbuffer.cache.transfer import block_tensors
from kvbuffer.ops import memory
from tests.support.plans import plan_for, shape

MIB = 1 << 20


def reserved(plan) -> int:  # type: ignore[no-untyped-def]
    _, caches = reserve(shape(), plan)
    return sum(tensor.nbytes for kind in POOL_KINDS for tensor in block_tensors(caches, kind))


def test_each_kind_has_addresses_for_the_whole_budget() -> None:
    plan = plan_for(shape(), 16 * MIB)
    assert reserve(shape(), plan)[0] is plan
    assert 3.9 * 16 * MIB < reserved(plan) <= 4 * 16 * MIB


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), RuntimeError("can't allocate memory")])
def test_where_the_system_refuses_the_budget_is_divided_and_the_log_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty, taken = memory.empty, 0

    def strict(*size: int, **options) -> Tensor:  # type: ignore[no-untyped-def]
        nonlocal taken
        tensor = empty(*size, **options)
        taken += tensor.nbytes
        if taken > 16 * MIB:
            taken = 0
            raise error
        return tensor

    monkeypatch.setattr(memory, "empty", strict)
    plan, caches = reserve(shape(), plan_for(shape(), 16 * MIB))
    assert 8 * MIB < sum(tensor.nbytes for kind in POOL_KINDS for tensor in block_tensors(caches, kind)) <= 16 * MIB
    assert plan.max_concurrency(plan.max_model_len) >= 1
    assert "divided into pools of fixed sizes" in caplog.text
    assert "allocate memory" in caplog.text


def test_where_memory_cannot_move_it_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ELASTIC", False)
    assert reserved(plan_for(shape(), 16 * MIB)) <= 16 * MIB
