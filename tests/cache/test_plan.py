"""The plan keeps to its budget, always serves one longest request, and its maximum concurrency is the true one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import PROMPT_TAIL, MemoryPlan, attention_pages, buffer_pages, default_budget, record_pages
from kvbuffer.cache.store import allocate
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
    prefix_caching=st.booleans(),
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
    prefix_caching: bool,
    linear: int,
    attention: int,
    dtype: torch.dtype,
) -> None:
    if linear + attention == 0:
        return
    options = {"max_num_seqs": max_num_seqs, "buffer_len": buffer_len, "kv_only_len": kv_only_len, "dtype": dtype}
    try:
        lengths = {"max_model_len": max_model_len, "prefix_caching": prefix_caching}
        plan = plan_for(shape(linear, attention), budget, **lengths, **options)
    except CapacityError:
        return
    assert plan.total_bytes <= budget
    assert plan.num_slots >= 1
    assert plan.max_model_len == (max_model_len or plan.max_model_len) <= 4096
    assert plan.num_attention_pages >= attention_pages(plan.max_model_len)
    for length in {1, min(16, plan.max_model_len), min(17, plan.max_model_len), plan.max_model_len}:
        assert 1 <= plan.max_concurrency(length) <= admitted(plan, length)
        if plan.starts_with_state(length) or buffer_pages(plan.buffer_len) == 1:
            assert plan.max_concurrency(length) == admitted(plan, length)


@pytest.mark.parametrize(("linear", "attention"), [(3, 1), (2, 0), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensors_take_exactly_the_bytes_planned(linear: int, attention: int, dtype: torch.dtype) -> None:
    plan = plan_for(shape(linear, attention), 8 * MIB, dtype=dtype, max_num_seqs=3)
    tensors = []
    for cache in allocate(shape(linear, attention), plan):
        for part in cache:
            tensors += [part] if isinstance(part, torch.Tensor) else [t for t in part if t is not None]
    assert sum(t.numel() * t.element_size() for t in tensors) == plan.total_bytes


def test_a_budget_too_small_says_how_much_is_needed_and_what_to_do() -> None:
    with pytest.raises(CapacityError) as caught:
        plan_for(shape(), MIB, max_model_len=4096)
    message = str(caught.value)
    assert "1 MiB of cache memory" in message
    assert "one request of 4096 tokens" in message
    assert "MiB: raise --memory or lower --max-model-len" in message


def test_the_least_budget_is_the_one_the_error_names() -> None:
    plan = plan_for(shape(), max_model_len=512, max_num_seqs=1, prefix_caching=False)
    assert plan_for(shape(), plan.total_bytes, max_model_len=512).num_slots == 1
    with pytest.raises(CapacityError):
        plan_for(shape(), plan.total_bytes - 1, max_model_len=512)


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
    few_pages = plan_for(shape(), 4 * MIB, max_num_seqs=64)
    assert few_pages.binding_limit(few_pages.max_model_len) == "attention pages (--memory)"
    few_slots = plan_for(shape(), 4 * MIB, max_num_seqs=1000, max_model_len=64, prefix_caching=False)
    assert few_slots.max_concurrency(64) == few_slots.num_slots < 1000
    assert few_slots.binding_limit(64) == "state slots (--memory)"
    assert few_slots.binding_limit(1) == "rings (--memory)"  # so short a request has no state


def test_where_no_request_outlives_its_records_there_is_memory_for_records_alone() -> None:
    options = {"budget": 4 * MIB, "max_num_seqs": 1000, "prefix_caching": False, "kv_only_len": 16}
    records = plan_for(shape(), **options, max_model_len=16)
    states = plan_for(shape(), **options, max_model_len=17)
    assert records.num_slots == 1
    assert records.max_concurrency(16) == admitted(records, 16) > 1.3 * states.max_concurrency(17)


def test_where_records_are_larger_than_a_state_there_is_memory_for_states() -> None:
    options = {"max_num_seqs": 1000, "prefix_caching": False, "kv_only_len": 64, "max_model_len": 64}
    plan = plan_for(shape(), 4 * MIB, **options)
    assert plan.block_bytes.record_page * 3 > plan.block_bytes.slot
    assert plan.max_concurrency(64) == admitted(plan, 64) >= plan.num_slots > 1


def test_room_for_records_without_a_state_is_not_planned_for_every_request() -> None:
    """They would take more memory than the states that they stand for."""
    plan = plan_for(shape(), 16 * MIB, max_num_seqs=1000, buffer_len=16, kv_only_len=64, prefix_caching=False)
    assert plan.num_record_pages < 2 * plan.num_slots
    few = plan_for(shape(), 16 * MIB, max_num_seqs=4, buffer_len=16, kv_only_len=64, max_model_len=256)
    assert few.num_record_pages >= 4 * record_pages(64)


def test_without_attention_layers_length_costs_nothing() -> None:
    plan = plan_for(shape(attention=0), MIB, max_num_seqs=1000, kv_only_len=0, prefix_caching=False)
    assert plan.block_bytes.attention_page == 0
    assert plan.max_model_len == 4096
    assert plan.max_concurrency(17) == plan.max_concurrency(4096) == plan.num_slots > 1
    assert plan.binding_limit(4096) == "state slots (--memory)"


def test_smaller_types_make_room_for_more_requests() -> None:
    options = {"budget": 4 * MIB, "max_num_seqs": 10_000, "max_model_len": 64}
    exact = plan_for(shape(), **options)
    states = plan_for(shape(), **options, state_dtype=torch.bfloat16)
    assert exact.num_slots < states.num_slots
    assert states.num_slots < plan_for(shape(), **options, state_dtype=torch.bfloat16, dtype=torch.bfloat16).num_slots


def test_describe_tells_the_pools_and_the_true_concurrency() -> None:
    plan = plan_for(shape(), 64 * MIB, max_num_seqs=8)
    text = plan.describe()
    assert f"{plan.num_slots} state slots" in text
    assert f"{plan.num_attention_pages} attention pages" in text
    assert "buffers of up to 16 tokens, no state before 24" in text
    for length in (128, 2048, 4096):
        assert f"{plan.max_concurrency(length)} requests of {length} tokens (limited by " in text
    assert plan_for(shape(), max_model_len=100).describe().count("requests of") == 1


def test_the_default_budget_leaves_room_for_weights() -> None:
    assert default_budget(1 << 60) == 0
    assert 0 < default_budget(0) < 1 << 50


def test_a_context_longer_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"4097 is more than the 4096 tokens.*lower it"):
        plan_for(shape(), max_model_len=4097)
