"""One byte budget, and how many requests it really serves.

Four kinds of memory, each in a pool of its own so that none inflates another's block size: state slots (the
linear-attention states), rings (the convolutions' last inputs), record pages (the KV buffers) and attention pages (keys
and values of the full-attention layers). Running requests and cached prefixes share all of them.

The budget is not divided among the pools beforehand, when nobody knows what requests will need. Each pool has as many
numbers as the whole budget has room for; what counts is the bytes of the blocks that are held, of all kinds together.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kvbuffer.cache.pools import MEMORY, POOL_NAMES, Counts
from kvbuffer.cache.shapes import CacheShape
from kvbuffer.errors import CapacityError, ConfigError
from kvbuffer.ops.attention import PAGE_SIZE

#: A context length between short and long: one of those for which the plan names its maximum concurrency.
TYPICAL_CONTEXT = 2048
#: Share of the machine's free memory, after the weights, that the caches may take by default.
DEFAULT_SHARE = 0.5
#: Records in a record page. With 4, decoding without a state takes a tenth longer, with 16 a few percent less.
RECORD_PAGE_SIZE = 8
#: The last tokens of a prompt, which go into the buffer, not into its state. A chat template opens an answer with up to
#: four tokens that the next prompt does not have (an empty block of thoughts): the two prompts part there.
PROMPT_TAIL = 5
#: Records that a buffer may hold beyond its length, by folds put off so that they spread out.
BUFFER_SLACK = 16
#: Tokens by which a cursor may move back while the ring still has the inputs that the convolution's taps reach to: the
#: last token of a prompt is computed again for its logits.
RING_SLACK = 1
# Block numbers are 32-bit integers, and kernels double those of pages.
_MOST_BLOCKS = 1 << 30


class BlockBytes(NamedTuple):
    """Bytes of one block of each kind, over all layers."""

    slot: int
    record_page: int
    ring: int
    attention_page: int

    def of(self, counts: Counts) -> int:
        """Return the bytes of so many blocks."""
        return sum(count * size for count, size in zip(counts, self, strict=True))


@dataclass(frozen=True)
class MemoryPlan:
    """The byte budget, what is promised of it, and the numbers of the pools that share it.

    Attributes:
        budget: bytes that blocks may take.
        max_model_len: longest request in tokens, prompt and output; one of them always fits.
        max_num_seqs: the user's cap on running requests.
        buffer_len: records a KV buffer holds before it is folded.
        kv_only_len: a request lives on records alone for as many tokens.
        num_draft_tokens: most tokens that a request drafts in a step.
        dtype: dtype of the model: of its weights, of keys and values in attention pages, of the rings.
        state_dtype: dtype of the states.
        record_dtype: dtype of the records' keys and values.
        ring_len: rows of a ring.
        num_slots: state slots, at most.
        num_rings: rings, at most; every running request has one.
        num_record_pages: record pages, at most.
        num_attention_pages: attention pages, at most.
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
    def pool_sizes(self) -> Counts:
        """The most blocks of each kind."""
        return Counts(self.num_slots, self.num_record_pages, self.num_rings, self.num_attention_pages)

    def request_blocks(self, context_len: int) -> Counts:
        """Return what a request of ``context_len`` tokens (prompt and output) holds in the end."""
        slots, records = 1, buffer_pages(self.buffer_len)
        if not self.starts_with_state(context_len):
            # Where memory runs short, records that are larger than a state are folded.
            each, needed = self.block_bytes, record_pages(context_len)
            if needed * each.record_page <= each.slot + records * each.record_page:
                slots, records = 0, needed
        return Counts(slots, records, 1, attention_pages(context_len))

    def limits(self, context_len: int) -> dict[str, int]:
        """Return, per thing that may run out, the requests of ``context_len`` tokens that it lets run together."""
        each = self.request_blocks(context_len)
        limits = {"--max-num-seqs": self.max_num_seqs}
        newest = each
        if each.slots and not self.starts_with_state(context_len):
            # The others are folded to make room for it.
            newest = each._replace(slots=0, record_pages=record_pages(context_len))
        others = (self.budget - self.block_bytes.of(newest)) // max(1, self.block_bytes.of(each))
        limits[f"{MEMORY} (--memory)"] = 1 + others
        for name, size, count in zip(POOL_NAMES, self.pool_sizes, each, strict=True):
            if count:
                limits[name] = size // count
        return limits

    def max_concurrency(self, context_len: int) -> int:
        """Requests of ``context_len`` tokens (prompt and output) that can run at the same time."""
        return min(self.limits(context_len).values())

    def binding_limit(self, context_len: int) -> str:
        """Return the name of what limits :meth:`max_concurrency`."""
        limits = self.limits(context_len)
        return min(limits, key=lambda name: limits[name])

    def describe(self) -> str:
        """Return the plan for people: what blocks take, and the true maximum concurrency with what limits it."""
        each = self.block_bytes
        lines = [
            f"memory for caches: {format_size(self.budget)}, shared by",
            f"  state slots of {format_size(each.slot)} ({_name(self.state_dtype)} states)",
            f"  record pages of {format_size(each.record_page)} ({RECORD_PAGE_SIZE} tokens, {_name(self.record_dtype)} "
            f"records; buffers of up to {self.buffer_len} tokens, no state before {self.kv_only_len})",
            f"  rings of {format_size(each.ring)} ({self.ring_len} tokens of convolution inputs)",
            f"  attention pages of {format_size(each.attention_page)} ({PAGE_SIZE} tokens)",
            "maximum concurrency:",
        ]
        for length in sorted({min(length, self.max_model_len) for length in (128, TYPICAL_CONTEXT, 1 << 62)}):
            size, limit = format_size(each.of(self.request_blocks(length))), self.binding_limit(length)
            lines.append(
                f"  {self.max_concurrency(length)} requests of {length} tokens, {size} each (limited by {limit})"
            )
        return "\n".join(lines)

    def with_fixed_pools(self) -> MemoryPlan:
        """Return a plan whose pools together take no more than the budget, where memory cannot move between them.

        Beyond one longest request, the budget is divided as requests of a typical context divide theirs, with a cached
        prefix beside each.
        """
        alone = self.longest_request
        typical = self.request_blocks(min(self.max_model_len, TYPICAL_CONTEXT))
        typical = Counts(2, typical.record_pages + 1, 2, typical.attention_pages)
        count = (self.budget - self.block_bytes.of(alone)) // max(1, self.block_bytes.of(typical))
        sizes = (one + count * more for one, more in zip(alone, typical, strict=True))
        slots, records, rings, attention = sizes
        return dataclasses.replace(
            self, num_slots=slots, num_record_pages=records, num_rings=rings, num_attention_pages=attention
        )

    @property
    def longest_request(self) -> Counts:
        """Blocks that a longest request may come to hold."""
        return Counts(1, record_pages(self.max_records), 1, attention_pages(self.max_model_len))


def attention_pages(tokens: int) -> int:
    """Return the attention pages that ``tokens`` tokens need."""
    return math.ceil(tokens / PAGE_SIZE)


def record_pages(records: int) -> int:
    """Return the record pages that ``records`` records need."""
    return math.ceil(records / RECORD_PAGE_SIZE)


def buffer_pages(buffer_len: int) -> int:
    """Return the record pages that are counted for each request with a state.

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
    num_draft_tokens: int = 0,
) -> MemoryPlan:
    """Make the plan of a budget of bytes.

    At least one request of ``max_model_len`` tokens always fits, so a request that was accepted can always finish. Left
    to None, ``max_model_len`` is the model's own, or the longest that fits.

    Raises:
        CapacityError: the budget cannot hold one request of the length asked for.
        ConfigError: the length asked for is more than the model was made for.
    """
    if max_model_len is not None and max_model_len > shape.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the {shape.max_position_embeddings} tokens the model was "
            "made for (max_position_embeddings in config.json): lower it"
        )
    # Drafts overwrite the oldest inputs before it is known whether they are accepted.
    ring_len = shape.linear.conv_kernel - 1 + RING_SLACK + num_draft_tokens
    each = block_bytes(shape, dtype, state_dtype, record_dtype, ring_len)

    slots, records, rings, pages = (min(_MOST_BLOCKS, budget // max(1, size)) for size in each)
    plan = MemoryPlan(
        budget=budget,
        max_model_len=PAGE_SIZE,
        max_num_seqs=max_num_seqs,
        buffer_len=buffer_len,
        kv_only_len=kv_only_len,
        num_draft_tokens=num_draft_tokens,
        dtype=dtype,
        state_dtype=state_dtype,
        record_dtype=record_dtype,
        ring_len=ring_len,
        num_slots=slots,
        num_rings=rings,
        num_record_pages=records,
        num_attention_pages=pages,
        block_bytes=each,
    )
    if max_model_len is None:
        fits = shape.max_position_embeddings
        if each.attention_page:
            alone = each.of(plan.longest_request._replace(attention_pages=0))
            fits = min(fits, max(0, budget - alone) // each.attention_page * PAGE_SIZE)
        max_model_len = max(fits, PAGE_SIZE)
    plan = dataclasses.replace(plan, max_model_len=max_model_len)
    needed = each.of(plan.longest_request)
    if needed > budget:
        raise CapacityError(
            f"{format_size(budget)} of cache memory cannot hold one request of {max_model_len} tokens, which needs "
            f"{format_size(needed)}: raise --memory or lower --max-model-len"
        )
    return plan


def default_budget(weight_bytes: int, processes: int = 1) -> int:
    """Return the default cache budget in bytes: half of what is free once ``weight_bytes`` of weights are loaded.

    Processes that share the machine get equal parts of it.
    """
    try:
        with open("/proc/meminfo") as lines:
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(0, int((available - weight_bytes) * DEFAULT_SHARE / processes))


def format_size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
