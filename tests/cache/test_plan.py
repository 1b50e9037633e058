"""The plan keeps to its budget, always serves one longest request, and its maximum concurrency is the true one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import PROMPT_TAIL, MemoryPlan, attention_pages, default_budget, record_pages
from kvbuffer.cache.pools import POOL_KINDS, Counts
from kvbuffer.cache.store import allocate
from kvbuffer.cache.transfer import block_tensors
from kvbuffer.errors import CapacityError, ConfigError
from tests.support.plans import plan_for, shape

MIB = 1 << 20


def admitted(plan: MemoryPlan, tokens: int) -> int:
    """Requests of ``tokens`` tokens that really get memory, one after the other."""
    memory, count = RequestMemory(plan), 0
    records = max(plan.buffer_len, PROMPT_TAIL) if plan.starts_with_state(tokens) else tokens
    while not isinstance(admission := memory.admit([count] * tokens), str):
        if not memory.extend(admission.row, tokens, records):
            break
        memory.fill[admission.row] = records
        count += 1
    memory.check_integrity()
    return count


@settings(deadline=None)
@given(
    budget=st.integers(1, 64 * MIB),
    max_model_len=st.none() | st.integers(2, 4096),
    max_num_seqs=st.integers(1, 300),
    buffer_len=st.integers(1, 70),
    kv_only_len=st.integers(0, 70),
    fixed=st.booleans(),
    linear=st.integers(0, 3),
    attention=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_plans_keep_their_promises(
    budget: int,
    max_model_len: int | None,
    max_num_seqs: int,
    buffer_len: int,
    kv_only_len: int,
    fixed: bool,
    linear: int,
    attention: int,
    dtype: torch.dtype,
) -> None:
    if linear + attention == 0:
        return
    options = {"max_num_seqs": max_num_seqs, "buffer_len": buffer_len, "kv_only_len": kv_only_len, "dtype": dtype}
    try:
        plan = plan_for(shape(linear, attention), budget, max_model_len=max_model_len, **options)
    except CapacityError:
        return
    if fixed:
        plan = plan.with_fixed_pools()
        assert plan.block_bytes.of(plan.pool_sizes) <= budget
    assert plan.max_model_len == (max_model_len or plan.max_model_len) <= 4096
    assert all(most >= needed for most, needed in zip(plan.pool_sizes, plan.longest_request, strict=True))
    for length in {1, min(16, plan.max_model_len), min(17, plan.max_model_len), plan.max_model_len}:
        assert 1 <= plan.max_concurrency(length) <= admitted(plan, length)
        if plan.starts_with_state(length):
            assert plan.max_concurrency(length) == admitted(plan, length)


@pytest.mark.parametrize(("linear", "attention"), [(3, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_pools_take_exactly_the_bytes_planned(linear: int, attention: int, dtype: torch.dtype) -> None:
    plan = plan_for(shape(linear, attention), 8 * MIB, dtype=dtype).with_fixed_pools()
    plan = dataclasses.replace(plan, num_slots=min(plan.num_slots, 999), num_rings=min(plan.num_rings, 999))
    caches = allocate(shape(linear, attention), plan)
    taken = sum(tensor.nbytes for kind in POOL_KINDS for tensor in block_tensors(caches, kind))
    assert taken == plan.block_bytes.of(plan.pool_sizes)


def test_no_pool_is_smaller_than_the_budget_could_make_it() -> None:
    plan = plan_for(shape(), 4 * MIB)
    for size, count in zip(plan.block_bytes, plan.pool_sizes, strict=True):
        assert 4 * MIB - size < size * count <= 4 * MIB


def test_a_budget_too_small_says_how_much_is_needed_and_what_to_do() -> None:
    with pytest.raises(CapacityError) as caught:
        plan_for(shape(), MIB, max_model_len=4096)
    message = str(caught.value)
    assert "1 MiB of cache memory" in message
    assert "one request of 4096 tokens" in message
    assert "MiB: raise --memory or lower --max-model-len" in message


def test_the_least_budget_is_the_one_the_error_names() -> None:
    plan = plan_for(shape(), max_model_len=512)
    least = plan.block_bytes.of(plan.longest_request)
    assert plan_for(shape(), least, max_model_len=512).max_concurrency(512) == 1
    with pytest.raises(CapacityError):
        plan_for(shape(), least - 1, max_model_len=512)


def test_the_models_own_length_is_the_default_and_is_cut_to_what_fits() -> None:
    assert plan_for(shape(max_position_embeddings=1000)).max_model_len == 1000
    cut = plan_for(shape(), MIB)
    assert 16 <= cut.max_model_len < 4096
    assert cut.max_model_len % 16 == 0
    with pytest.raises(CapacityError):
        plan_for(shape(), MIB, max_model_len=cut.max_model_len + 1)


def test_the_limit_named_is_the_one_that_binds() -> None:
    roomy = plan_for(shape(), max_num_seqs=4, max_model_len=256)
    assert (roomy.max_concurrency(256), roomy.binding_limit(256)) == (4, "--max-num-seqs")
    tight = plan_for(shape(), 4 * MIB, max_num_seqs=1000)
    assert tight.max_concurrency(64) < 1000
    assert tight.binding_limit(64) == "memory (--memory)"
    few_slots = dataclasses.replace(tight, num_slots=3)
    assert (few_slots.max_concurrency(64), few_slots.binding_limit(64)) == (3, "state slots")
    assert few_slots.binding_limit(1) == "memory (--memory)"  # so short a request has no state


@pytest.mark.parametrize("context_len", [1, 16, 64, 300, 4096])
def test_what_is_not_needed_for_one_thing_serves_another(context_len: int) -> None:
    """Whatever requests come, they have the whole budget but for less than one of them."""
    plan = plan_for(shape(), 16 * MIB, max_num_seqs=10_000)
    each = plan.block_bytes.of(plan.request_blocks(context_len))
    assert plan.max_concurrency(context_len) == 16 * MIB // each == admitted(plan, context_len)


def test_records_are_folded_where_they_take_more_than_a_state() -> None:
    plan = plan_for(shape(), 4 * MIB, max_num_seqs=1000, buffer_len=8, kv_only_len=64, max_model_len=64)
    assert plan.block_bytes.record_page * 3 > plan.block_bytes.slot
    assert plan.request_blocks(64).slots == 1
    assert not plan.starts_with_state(64)
    alone = plan.block_bytes.of(Counts(0, record_pages(64), 1, attention_pages(64)))
    assert plan.max_concurrency(64) == admitted(plan, 64) > 4 * MIB // alone


def test_without_attention_layers_length_costs_nothing() -> None:
    plan = plan_for(shape(attention=0), MIB, max_num_seqs=1000, kv_only_len=0)
    assert plan.block_bytes.attention_page == 0
    assert plan.max_model_len == 4096
    assert plan.max_concurrency(17) == plan.max_concurrency(4096) > 1
    assert plan.binding_limit(4096) == "memory (--memory)"


def test_smaller_types_make_room_for_more_requests() -> None:
    options = {"budget": 4 * MIB, "max_num_seqs": 10_000, "max_model_len": 64}
    exact = plan_for(shape(), **options)
    states = plan_for(shape(), **options, state_dtype=torch.bfloat16)
    all_small = plan_for(shape(), **options, state_dtype=torch.bfloat16, dtype=torch.bfloat16)
    assert exact.max_concurrency(64) < states.max_concurrency(64) < all_small.max_concurrency(64)


def test_describe_tells_the_sizes_and_the_true_concurrency() -> None:
    plan = plan_for(shape(), 64 * MIB, max_num_seqs=8)
    text = plan.describe()
    assert "64 MiB, shared by" in text
    assert "state slots of 24 KiB (float32 states)" in text
    assert "buffers of up to 16 tokens, no state before 24" in text
    for length in (128, 2048, 4096):
        line = next(line for line in text.splitlines() if f" requests of {length} tokens" in line)
        assert line.startswith(f"  {plan.max_concurrency(length)} requests")
        assert line.endswith(f"(limited by {plan.binding_limit(length)})")
    assert plan_for(shape(), max_model_len=100).describe().count("requests of") == 1


def test_the_default_budget_leaves_room_for_weights() -> None:
    assert default_budget(1 << 60) == 0
    assert 0 < default_budget(0) < 1 << 50


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"4097 is more than the 4096 tokens.*lower it"):
        plan_for(shape(), max_model_len=4097)
