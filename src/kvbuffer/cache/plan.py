"""How a byte budget is divided, and how many requests that really serves.

Four kinds of memory, each in a pool of its own so that none inflates another's block size: state slots (the
linear-attention states), rings (the convolutions' last inputs), record pages (the KV buffers) and attention pages (keys
and values of the full-attention layers). Running requests and cached prefixes share all of them.
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
#: Records in a record page.
RECORD_PAGE_SIZE = 16
#: The state of a prompt ends at a multiple of this; its last tokens, this many at most, go into the buffer.
PROMPT_TAIL = 16
#: Records that a buffer may hold beyond its length: the end of a prompt, and folds put off so that they spread out.
BUFFER_SLACK = PROMPT_TAIL
#: Tokens by which a cursor may move back while the ring still has the inputs that the convolution's taps reach to.
RING_SLACK = 5
# Tokens from one cached state to the next, on average, for dividing what running requests leave over.
_CACHED_CONTEXT = 1024
# More than this in the prefix cache is not planned for: page tables of many gigabytes take seconds to set up.
_MOST_CACHED_TOKENS = 1 << 21


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of one block of each kind, over all layers."""

    slot: int
    ring: int
    record_page: int
    attention_page: int


@dataclass(frozen=True)
class MemoryPlan:
    """The sizes of the pools, and the bytes behind them.

    Attributes:
        budget: bytes the plan may use.
        max_model_len: longest request in tokens, prompt and output.
        max_num_seqs: the user's cap on running requests.
        buffer_len: records a KV buffer holds before it is folded.
        kv_only_len: a request lives on records alone for as many tokens.
        num_draft_tokens: most tokens that a request drafts in a step.
        dtype: dtype of the model: of its weights, of keys and values in attention pages, of the rings.
        state_dtype: dtype of the states.
        record_dtype: dtype of the records' keys and values.
        ring_len: rows of a ring.
        num_slots: state slots.
        num_rings: rings; every running request has one.
        num_record_pages: record pages.
        num_attention_pages: attention pages.
        block_bytes: bytes of a block of each kind.
    """

    budget: int
    max_model_len: int
    max_num_seqs: int
    buffer_len: int
    kv_only_len: int
    num_draft_tokens: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    record_dtype: torch.dtype
    ring_len: int
    num_slots: int
    num_rings: int
    num_record_pages: int
    num_attention_pages: int
    block_bytes: BlockBytes

    def starts_with_state(self, num_tokens: int) -> bool:
        """Return whether a prompt of so many tokens is computed into a state, not into records alone."""
        return num_tokens > max(self.kv_only_len, PROMPT_TAIL)

    @property
    def max_records(self) -> int:
        """Records that a request's buffer may come to hold."""
        return max(self.buffer_len, self.kv_only_len) + BUFFER_SLACK + self.num_draft_tokens

    @property
    def total_bytes(self) -> int:
        """Bytes the pools take."""
        each = self.block_bytes
        return (
            self.num_slots * each.slot
            + self.num_rings * each.ring
            + self.num_record_pages * each.record_page
            + self.num_attention_pages * each.attention_page
        )

    def limits(self, context_len: int) -> dict[str, int]:
        """Return, per thing that may run out, the requests of ``context_len`` tokens that it lets run together."""
        limits = {"--max-num-seqs": self.max_num_seqs}
        buffer = buffer_pages(self.buffer_len)
        pages = self.num_record_pages // buffer
        if self.starts_with_state(context_len):
            limits["state slots (--memory)"] = self.num_slots
        elif record_pages(context_len) <= buffer:
            pages = self.num_record_pages // record_pages(context_len)
        else:
            # Where pages run short, as many requests as there are slots are folded and keep a buffer only.
            folded = min(self.num_slots, pages)
            pages = folded + (self.num_record_pages - folded * buffer) // record_pages(context_len)
        limits["rings (--memory)"] = self.num_rings
        limits["record pages (--memory)"] = pages
        limits["attention pages (--memory)"] = self.num_attention_pages // attention_pages(context_len)
        return limits

    def max_concurrency(self, context_len: int) -> int:
        """Requests of ``context_len`` tokens (prompt and output) that can run at the same time."""
        return min(self.limits(context_len).values())

    def binding_limit(self, context_len: int) -> str:
        """Return the name of what limits :meth:`max_concurrency`."""
        limits = self.limits(context_len)
        return min(limits, key=lambda name: limits[name])

    def describe(self) -> str:
        """Return the plan for people: the pools, and the true maximum concurrency with what limits it."""
        each = self.block_bytes
        lines = [
            f"caches {format_size(self.total_bytes)} of {format_size(self.budget)} allowed:",
            f"  {self.num_slots} state slots x {format_size(each.slot)} ({_name(self.state_dtype)} states)",
            f"  {self.num_record_pages} record pages x {format_size(each.record_page)} "
            f"({RECORD_PAGE_SIZE} tokens each, {_name(self.record_dtype)} records; buffers of up to {self.buffer_len} "
            f"tokens, no state before {self.kv_only_len})",
            f"  {self.num_rings} rings x {format_size(each.ring)} ({self.ring_len} tokens of convolution inputs each)",
            f"  {self.num_attention_pages} attention pages x {format_size(each.attention_page)} "
            f"({PAGE_SIZE} tokens each)",
            "maximum concurrency:",
        ]
        for length in sorted({min(length, self.max_model_len) for length in (128, TYPICAL_CONTEXT, 1 << 62)}):
            limit = self.binding_limit(length)
            lines.append(f"  {self.max_concurrency(length)} requests of {length} tokens (limited by {limit})")
        return "\n".join(lines)


def attention_pages(tokens: int) -> int:
    """Return the attention pages that ``tokens`` tokens need."""
    return math.ceil(tokens / PAGE_SIZE)


def record_pages(records: int) -> int:
    """Return the record pages that ``records`` records need."""
    return math.ceil(records / RECORD_PAGE_SIZE)


def buffer_pages(buffer_len: int) -> int:
    """Return the record pages that are planned for each request with a state.

    A buffer may hold BUFFER_SLACK records more, but few do at a time: most are not full, and where pages run short
    a fold is not put off.
    """
    return record_pages(max(buffer_len, PROMPT_TAIL))


def block_bytes(
    shape: CacheShape, dtype: torch.dtype, state_dtype: torch.dtype, record_dtype: torch.dtype, ring_len: int
) -> BlockBytes:
    """Return the bytes of one block of each kind, over all of a model's layers."""
    linear, layers, kv_dim = shape.linear, shape.num_linear_layers, shape.num_kv_heads * shape.head_dim
    rows = linear.num_value_heads * linear.key_head_dim
    scales = 4 * rows if state_dtype == torch.int8 else 0
    record = (linear.key_dim + linear.value_dim) * record_dtype.itemsize + linear.num_value_heads * 4
    return BlockBytes(
        slot=layers * (rows * linear.value_head_dim * state_dtype.itemsize + scales),
        ring=layers * ring_len * linear.conv_dim * dtype.itemsize,
        record_page=layers * RECORD_PAGE_SIZE * record,
        attention_page=shape.num_attention_layers * PAGE_SIZE * 2 * kv_dim * dtype.itemsize,
    )


def typical_request_bytes(
    shape: CacheShape,
    max_model_len: int | None,
    buffer_len: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    record_dtype: torch.dtype,
) -> int:
    """Return the bytes of a request of a typical context, to weigh models against each other."""
    context = min(max_model_len or TYPICAL_CONTEXT, TYPICAL_CONTEXT)
    each = block_bytes(shape, dtype, state_dtype, record_dtype, shape.linear.conv_kernel - 1 + RING_SLACK)
    buffers = each.slot + each.ring + buffer_pages(buffer_len) * each.record_page
    return buffers + attention_pages(context) * each.attention_page


def plan_memory(
    shape: CacheShape,
    *,
    budget: int,
    max_model_len: int | None,
    max_num_seqs: int,
    buffer_len: int,
    kv_only_len: int,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    record_dtype: torch.dtype,
    prefix_caching: bool,
    num_draft_tokens: int = 0,
) -> MemoryPlan:
    """Divide ``budget`` bytes into pools.

    At least one request of ``max_model_len`` tokens always fits, so a request that was accepted can always finish. Left
    to None, ``max_model_len`` is the model's own, or the longest that fits.

    Raises:
        CapacityError: the budget cannot hold one request of the length asked for.
        ConfigError: the length asked for is more than the model was made for.
    """
    # Drafts overwrite the oldest inputs before it is known whether they are accepted.
    ring_len = shape.linear.conv_kernel - 1 + RING_SLACK + num_draft_tokens
    each = block_bytes(shape, dtype, state_dtype, record_dtype, ring_len)
    most_pages = record_pages(max(buffer_len, kv_only_len) + BUFFER_SLACK + num_draft_tokens)
    alone = each.slot + each.ring + most_pages * each.record_page

    if max_model_len is not None and max_model_len > shape.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the {shape.max_position_embeddings} tokens the model was "
            "made for (max_position_embeddings in config.json): lower it"
        )
    if max_model_len is None:
        fits = shape.max_position_embeddings
        if each.attention_page:
            fits = min(fits, max(0, budget - alone) // each.attention_page * PAGE_SIZE)
        max_model_len = max(fits, PAGE_SIZE)
    longest = attention_pages(max_model_len)
    needed = alone + longest * each.attention_page
    if needed > budget:
        raise CapacityError(
            f"{format_size(budget)} of cache memory cannot hold one request of {max_model_len} tokens, which needs "
            f"{format_size(needed)}: raise --memory or lower --max-model-len"
        )
    # A request with a state, or with records alone where none is too long for that and they are smaller; a prefix that
    # is kept.
    slots, pages_per_request = 1, buffer_pages(buffer_len)
    only_records = record_pages(max_model_len) * each.record_page < each.slot + pages_per_request * each.record_page
    if only_records and max_model_len <= max(kv_only_len, PROMPT_TAIL):
        slots, pages_per_request = 0, record_pages(max_model_len)
    request = slots * each.slot + each.ring + pages_per_request * each.record_page
    cached = (slots * each.slot + each.ring + each.record_page) if prefix_caching else 0
    # What the first request may need beyond that.
    first = alone - request
    # As many requests as can each have a typical context, with a cached prefix beside each; attention pages take the
    # rest, up to the longest context for everyone. Without linear-attention layers a slot costs nothing.
    typical = attention_pages(min(max_model_len, TYPICAL_CONTEXT)) * each.attention_page
    spare = (budget - needed) // request if request else max_num_seqs
    requests = max(1, min(max_num_seqs, (budget - first) // max(1, request + cached + typical), 1 + spare))
    budget_left = budget - first - requests * request
    left = budget_left - longest * each.attention_page
    prefixes = min(requests, left // cached) if cached else 0
    attention = requests * longest
    if each.attention_page:
        attention = min(attention, (budget_left - prefixes * cached) // each.attention_page)
    left = budget_left - prefixes * cached - attention * each.attention_page
    # Where --max-num-seqs is what binds, requests without a state have room for all their records.
    more_pages = (requests - 1) * (most_pages - pages_per_request)
    more_pages = min(more_pages, left // each.record_page) if each.record_page else 0
    if prefix_caching:
        # What is still left is for prefixes: their states, and keys and values as far as one state serves.
        left -= more_pages * each.record_page
        pages = attention_pages(_CACHED_CONTEXT)
        more = min(left // max(1, cached + pages * each.attention_page), _MOST_CACHED_TOKENS // _CACHED_CONTEXT)
        prefixes, attention = prefixes + more, attention + more * pages
    return MemoryPlan(
        budget=budget,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        buffer_len=buffer_len,
        kv_only_len=kv_only_len,
        num_draft_tokens=num_draft_tokens,
        dtype=dtype,
        state_dtype=state_dtype,
        record_dtype=record_dtype,
        ring_len=ring_len,
        num_slots=slots * (requests + prefixes) + (1 - slots),
        num_rings=requests + prefixes,
        num_record_pages=requests * pages_per_request + most_pages - pages_per_request + more_pages + prefixes,
        num_attention_pages=attention,
        block_bytes=each,
    )


def default_budget(weight_bytes: int) -> int:
    """Return the default cache budget in bytes: half of what is free once ``weight_bytes`` of weights are loaded."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, int((available - weight_bytes) * DEFAULT_SHARE))


def format_size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
