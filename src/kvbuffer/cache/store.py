"""The tensors behind the plan: per layer, states with their buffers, or pages of keys and values."""

from __future__ import annotations

import logging
from typing import NamedTuple

from torch import Tensor

from kvbuffer.cache.plan import RECORD_PAGE_SIZE, MemoryPlan
from kvbuffer.cache.shapes import CacheShape
from kvbuffer.ops import memory
from kvbuffer.ops.attention import PAGE_SIZE
from kvbuffer.ops.layout import RecordPages, StatePool
from kvbuffer.ops.rule import GATED_DELTANET

logger = logging.getLogger(__name__)


class LinearCache(NamedTuple):
    """Memory of one linear-attention layer, or of a group of them with all their heads.

    Attributes:
        states: in the plan's state dtype.
        rings: [num_rings, R, C] in the model dtype, the convolution's last inputs.
        records: pages of the KV buffers, in the plan's record dtype.
    """

    states: StatePool
    rings: Tensor
    records: RecordPages


class AttentionCache(NamedTuple):
    """Memory of one full-attention layer, or of a group of them with all their heads.

    Attributes:
        pages: [num_pages, 2, HKV, PAGE_SIZE, D] in the model dtype.
    """

    pages: Tensor


def allocate(shape: CacheShape, plan: MemoryPlan) -> list[LinearCache | AttentionCache]:
    """Return the memory of every layer or group, in the order of ``shape.units``.

    It is uninitialised, and memory is taken from the system when it is written: the pools of a plan may add up to more
    than there is.

    Raises:
        OSError, RuntimeError: the system does not let a process reserve that much.
    """
    caches: list[LinearCache | AttentionCache] = []
    for unit in shape.units:
        if shape.layer_types[unit[0]] == "full_attention":
            size = (plan.num_attention_pages, 2, len(unit) * shape.num_kv_heads, PAGE_SIZE, shape.head_dim)
            caches.append(AttentionCache(memory.empty(*size, dtype=plan.dtype)))
            continue
        linear = shape.linear.repeated(len(unit))
        heads = (linear.num_value_heads, linear.key_head_dim, linear.value_head_dim)
        caches.append(
            LinearCache(
                StatePool.allocate(plan.num_slots, *heads, plan.state_dtype),
                memory.empty(plan.num_rings, plan.ring_len, linear.conv_dim, dtype=plan.dtype),
                RecordPages.allocate(
                    GATED_DELTANET,
                    plan.num_record_pages,
                    RECORD_PAGE_SIZE,
                    linear.num_key_heads,
                    *heads,
                    plan.record_dtype,
                ),
            )
        )
    return caches


def reserve(shape: CacheShape, plan: MemoryPlan) -> tuple[MemoryPlan, list[LinearCache | AttentionCache]]:
    """Return the memory of a plan, and the plan, with fixed pools if memory cannot move between them."""
    reason = "it moves between them on Linux only"
    if memory.ELASTIC:
        try:
            return plan, allocate(shape, plan)
        except (OSError, RuntimeError) as error:
            reason = f"the system reserves no more than there is ({error}; see vm.overcommit_memory and ulimit -v)"
    logger.warning("Memory is divided into pools of fixed sizes, which serve fewer requests: %s.", reason)
    plan = plan.with_fixed_pools()
    return plan, allocate(shape, plan)
