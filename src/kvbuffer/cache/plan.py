"""How a byte budget is divided, and how many requests that really serves.

Three kinds of memory, each in a pool of its own so that none inflates another's block size: state slots (one per
running request: the linear-attention states, the convolutions' rolling inputs), record pages (the KV buffers) and
attention pages (keys and values of the full-attention layers).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from kvbuffer.cache.shapes import CacheShape
from kvbuffer.errors import CapacityError, ConfigError
from kvbuffer.ops.attention import PAGE_SIZE

#: Context length for which slots and attention pages are balanced when memory cannot serve the longest for everyone.
TYPICAL_CONTEXT = 2048
#: Share of the machine's free memory, after the weights, that the caches may take by default.
DEFAULT_SHARE = 0.5


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes of the pools, and the bytes behind them.

    Attributes:
        budget: bytes the plan may use.
        max_model_len: longest request in tokens, prompt and output.
        max_num_seqs: the user's cap on running requests.
        buffer_len: records a KV buffer holds before it is folded.
        record_page_size: records in a record page.
        dtype: dtype of the model: of its weights, and of the attention pages' keys and values.
        state_dtype: dtype of the states.
        num_slots: running requests that have memory.
        num_attention_pages: attention pages.
        slot_bytes: bytes of a slot over all layers, its record pages not included.
        record_page_bytes: bytes of a record page over all layers.
        attention_page_bytes: bytes of an attention page over all layers.
    """

    budget: int
    max_model_len: int
    max_num_seqs: int
    buffer_len: int
    record_page_size: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    num_slots: int
    num_attention_pages: int
    slot_bytes: int
    record_page_bytes: int
    attention_page_bytes: int

    @property
    def record_pages_per_slot(self) -> int:
        """Record pages of one request's buffer."""
        return math.ceil(self.buffer_len / self.record_page_size)

    @property
    def num_record_pages(self) -> int:
        """Record pages in all."""
        return self.num_slots * self.record_pages_per_slot

    @property
    def total_bytes(self) -> int:
        """Bytes the pools take."""
        return (
            self.num_slots * self.slot_bytes
            + self.num_record_pages * self.record_page_bytes
            + self.num_attention_pages * self.attention_page_bytes
        )

    def max_concurrency(self, context_len: int) -> int:
        """Requests of ``context_len`` tokens (prompt and output) that can run at the same time."""
        return min(self.num_slots, self.num_attention_pages // attention_pages(context_len))

    def binding_limit(self, context_len: int) -> str:
        """Return the name of what limits :meth:`max_concurrency`."""
        if self.num_attention_pages // attention_pages(context_len) < self.num_slots:
            return "attention pages (--memory)"
        return "--max-num-seqs" if self.num_slots == self.max_num_seqs else "state slots (--memory)"

    def describe(self) -> str:
        """Return the plan for people: the pools, and the true maximum concurrency with what limits it."""
        lines = [
            f"caches {_size(self.total_bytes)} of {_size(self.budget)} allowed:",
            f"  {self.num_slots} state slots x {_size(self.slot_bytes)} ({_name(self.state_dtype)} states)",
            f"  {self.num_record_pages} record pages x {_size(self.record_page_bytes)} (buffers of "
            f"{self.buffer_len} tokens, pages of {self.record_page_size})",
            f"  {self.num_attention_pages} attention pages x {_size(self.attention_page_bytes)} "
            f"({PAGE_SIZE} tokens each)",
            "maximum concurrency:",
        ]
        for length in sorted(
            {min(128, self.max_model_len), min(TYPICAL_CONTEXT, self.max_model_len), self.max_model_len}
        ):
            limit = self.binding_limit(length)
            lines.append(f"  {self.max_concurrency(length)} requests of {length} tokens (limited by {limit})")
        return "\n".join(lines)


def attention_pages(tokens: int) -> int:
    """Return the attention pages that ``tokens`` tokens need."""
    return math.ceil(tokens / PAGE_SIZE)


def plan_memory(
    shape: CacheShape,
    *,
    budget: int,
    max_model_len: int | None,
    max_num_seqs: int,
    buffer_len: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> MemoryPlan:
    """Divide ``budget`` bytes into pools.

    At least one request of ``max_model_len`` tokens always fits, so a request that was accepted can always finish. Left
    to None, ``max_model_len`` is the model's own, or the longest that fits.

    Raises:
        CapacityError: the budget cannot hold one request of the length asked for.
        ConfigError: the length asked for is more than the model was made for.
    """
    linear, full = shape.linear, torch.float32.itemsize
    state = linear.num_value_heads * linear.key_head_dim * linear.value_head_dim * state_dtype.itemsize
    rolling = (linear.conv_kernel - 1) * linear.conv_dim * full
    slot_bytes = shape.num_linear_layers * (state + rolling)
    record = (linear.key_dim + linear.value_dim + linear.num_value_heads) * full
    record_page_size = min(16, buffer_len)
    record_page_bytes = shape.num_linear_layers * record_page_size * record
    page_bytes = shape.num_attention_layers * 2 * shape.num_kv_heads * PAGE_SIZE * shape.head_dim * dtype.itemsize
    per_request = slot_bytes + math.ceil(buffer_len / record_page_size) * record_page_bytes

    if max_model_len is not None and max_model_len > shape.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the {shape.max_position_embeddings} tokens the model was "
            "made for (max_position_embeddings in config.json): lower it"
        )
    if max_model_len is None:
        fits = shape.max_position_embeddings
        if page_bytes:
            fits = min(fits, max(0, budget - per_request) // page_bytes * PAGE_SIZE)
        max_model_len = max(fits, PAGE_SIZE)
    pages_for_longest = attention_pages(max_model_len)
    needed = per_request + pages_for_longest * page_bytes
    if needed > budget:
        raise CapacityError(
            f"{_size(budget)} of cache memory cannot hold one request of {max_model_len} tokens, which needs "
            f"{_size(needed)}: raise --memory or lower --max-model-len"
        )
    # Slots first, as many as can each have a typical context; attention pages take the rest. Without linear-attention
    # layers a slot costs nothing.
    typical = attention_pages(min(max_model_len, TYPICAL_CONTEXT)) * page_bytes
    spare = (budget - needed) // per_request if per_request else max_num_seqs
    slots = max(1, min(max_num_seqs, budget // (per_request + typical), 1 + spare))
    pages = slots * pages_for_longest
    if page_bytes:
        pages = min(pages, (budget - slots * per_request) // page_bytes)
    return MemoryPlan(
        budget=budget,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        buffer_len=buffer_len,
        record_page_size=record_page_size,
        dtype=dtype,
        state_dtype=state_dtype,
        num_slots=slots,
        num_attention_pages=pages,
        slot_bytes=slot_bytes,
        record_page_bytes=record_page_bytes,
        attention_page_bytes=page_bytes,
    )


def default_budget(weight_bytes: int) -> int:
    """Return the default cache budget in bytes: half of what is free once ``weight_bytes`` of weights are loaded."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, int((available - weight_bytes) * DEFAULT_SHARE))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
