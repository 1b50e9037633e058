"""What the kernels share: how tiles of states, records and tokens are read and written.

Every program owns one (request, value head, block of the value dim): it alone reads and writes its tile of the state
and its part of the values, in an order that depends on nothing else, so results do not depend on the batch. Loops are
bounded by numbers that lie on the device, grids only by shapes, so a captured CUDA graph replays for any fill.

Everything is float32 in registers. A scalar log-decay is a vector of one element that broadcasts over the key dim, a
family without decay has zeros, so one code serves all three. Decays of several tokens are summed and then
exponentiated, never divided: every factor is the exponential of a sum of log-decays, and at most 1.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import Correction, Decay, UpdateRule

#: Elements of a state that one thread holds: with what a step needs beside them, K = V = 128 stays in registers.
_STATE_PER_THREAD = 64
_WARP = 32


class Dims(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        key_heads: HK.
        value_heads: HV.
        k: K.
        v: V.
        d: width of a log-decay, K or 1.
        block_k: K up to a power of two.
        block_v: part of the value dim that one program owns.
        block_d: width of a log-decay's tile.
        delta: whether ``u`` follows the delta rule.
        removal: whether a token writes a removal before its own pair.
        pairs: key-value pairs per record.
        has_decay: whether the tokens come with ``g``.
        page_size: records per page.
    """

    key_heads: tl.constexpr
    value_heads: tl.constexpr
    k: tl.constexpr
    v: tl.constexpr
    d: tl.constexpr
    block_k: tl.constexpr
    block_v: tl.constexpr
    block_d: tl.constexpr
    delta: tl.constexpr
    removal: tl.constexpr
    pairs: tl.constexpr
    has_decay: tl.constexpr
    page_size: tl.constexpr


class Buffers(NamedTuple):
    """Record pages and the requests' page tables.

    Attributes:
        keys: of the pages.
        written: their values, a name that a Triton tuple would hide.
        decays: of the pages.
        page_table: [B, P].
        stride: elements between the page tables of two requests.
    """

    keys: Tensor
    written: Tensor
    decays: Tensor
    page_table: Tensor
    stride: int


class Strides(NamedTuple):
    """Elements between the rows of two tokens."""

    q: int
    k: int
    v: int
    g: int


def launch_shape(
    rule: UpdateRule, states: StatePool, key_heads: int, records: RecordPages | None, block_v: int
) -> tuple[Dims, int, int]:
    """Return what to compile for, the number of value blocks and of warps per program.

    Args:
        rule: the family.
        states: the layer's states.
        key_heads: HK.
        records: the layer's pages, for operators that have them.
        block_v: the value block that suits an operator at K = 128; a larger K makes it smaller. int8 states are never
            split: a row's scale is made from the whole row.
    """
    _, value_heads, k, v = states.data.shape
    block_k, whole_v = max(16, triton.next_power_of_2(k)), max(16, triton.next_power_of_2(v))
    block_v = whole_v if states.scales is not None else min(whole_v, max(16, block_v * 128 // max(block_k, 128)))
    vector = rule.decay is Decay.VECTOR
    sizes = (
        key_heads,
        value_heads,
        k,
        v,
        k if vector else 1,
        block_k,
        block_v,
        block_k if vector else 1,
        rule.correction is Correction.DELTA,
        rule.correction is Correction.REMOVAL,
        rule.num_pairs,
        rule.decay is not Decay.NONE,
        1 if records is None else records.page_size,
    )
    warps = min(16, max(1, block_k * block_v // (_WARP * _STATE_PER_THREAD)))
    return Dims(*(tl.constexpr(size) for size in sizes)), triton.cdiv(v, block_v), warps


def row_strides(tokens: Tokens) -> Strides:
    """Return the strides of the inputs whose rows need not be contiguous; an expanded ``g`` has stride 0."""
    return Strides(
        tokens.q.stride(0), tokens.k.stride(0), tokens.v.stride(0), 0 if tokens.g is None else tokens.g.stride(0)
    )


@triton.jit
def load_state(states, slot, head, cols, dims):
    """Return a state's tile [block_k, block_v] and what its rows are to be multiplied by; zeros for slot -1."""
    rows = tl.arange(0, dims.block_k)
    live = rows < tl.where(slot >= 0, dims.k, 0)
    row = (slot * dims.value_heads + head) * dims.k + rows
    tile = tl.load(
        states.data + row[:, None] * dims.v + cols[None, :], mask=live[:, None] & (cols < dims.v)[None, :], other=0
    )
    scale = tl.full([dims.block_k], 1.0, tl.float32)
    if states.scales is not None:
        scale = tl.load(states.scales + row, mask=live, other=0.0)
    return tile.to(tl.float32), scale


@triton.jit
def store_state(states, slot, head, cols, state, dims):
    """Round a state's tile to nearest into its slot; return what load_state would."""
    rows = tl.arange(0, dims.block_k)
    live = rows < dims.k
    row = (slot * dims.value_heads + head) * dims.k + rows
    scale = tl.full([dims.block_k], 1.0, tl.float32)
    if states.scales is not None:
        scale = tl.div_rn(tl.max(tl.abs(state), 1), 127.0)
        tl.store(states.scales + row, scale, mask=live)
        state = round_to_even(tl.div_rn(state, tl.maximum(scale, 1.2e-38)[:, None]))
    stored = state.to(states.data.dtype.element_ty)
    tl.store(states.data + row[:, None] * dims.v + cols[None, :], stored, mask=live[:, None] & (cols < dims.v)[None, :])
    return stored.to(tl.float32), scale


@triton.jit
def round_to_even(x):
    """Round a float32 below 2^22 to the nearest integer: at 1.5 * 2^23 a float's last place is worth one."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def load_key(keys, token, live, stride, head, dims):
    """Return a token's vector over the key dim [block_k], or for tokens [n, 1] their tile [n, block_k]."""
    lanes = tl.arange(0, dims.block_k)
    key_head = head // (dims.value_heads // dims.key_heads)
    return tl.load(keys + token * stride + key_head * dims.k + lanes, mask=live & (lanes < dims.k), other=0.0)


@triton.jit
def load_value(tokens, strides, token, live, head, cols, dims):
    """Return a token's value [block_v], or for tokens [n, 1] their tile [n, block_v]."""
    return tl.load(tokens.v + token * strides.v + head * dims.v + cols, mask=live & (cols < dims.v), other=0.0)


@triton.jit
def load_decay(tokens, strides, token, live, head, dims):
    """Return a token's log-decay [block_d], or for tokens [n, 1] their tile [n, block_d]."""
    lanes = tl.arange(0, dims.block_d)
    if dims.has_decay:
        return tl.load(tokens.g + token * strides.g + head * dims.d + lanes, mask=live & (lanes < dims.d), other=0.0)
    else:
        return tl.zeros_like(token + lanes).to(tl.float32)


@triton.jit
def store_keys(tokens, strides, buffers, b, token, place, live, head, dims):
    """Write the keys of a token, or of tokens [n, 1], rounded to nearest, to their places in the buffer."""
    lanes = tl.arange(0, dims.block_k)
    key_head = head // (dims.value_heads // dims.key_heads)
    row = record_row(buffers, b, place, live, dims.key_heads, key_head, dims)
    to = buffers.keys + row * dims.pairs * dims.k + lanes
    inside = live & (lanes < dims.k)
    if dims.removal:
        write = load_key(tokens.removal_write, token, live, dims.key_heads * dims.k, head, dims)
        tl.store(to, write.to(to.dtype.element_ty), mask=inside)
        to += dims.k
    key = load_key(tokens.k, token, live, strides.k, head, dims)
    tl.store(to, key.to(to.dtype.element_ty), mask=inside)


@triton.jit
def store_decay(tokens, strides, buffers, b, token, place, live, head, dims):
    """Write the log-decay of a token, or of tokens [n, 1], to their places in the buffer."""
    lanes = tl.arange(0, dims.block_d)
    row = record_row(buffers, b, place, live, dims.value_heads, head, dims)
    g = load_decay(tokens, strides, token, live, head, dims)
    tl.store(buffers.decays + row * dims.d + lanes, g, mask=live & (lanes < dims.d))


@triton.jit
def record_row(buffers, b, place, live, heads, head, dims):
    """Return in which row of a record pool's [pages * heads * page_size] a head's record lies."""
    entry = place // dims.page_size
    page = tl.load(buffers.page_table + b * buffers.stride + entry, mask=live, other=0).to(tl.int64)
    return (page * heads + head) * dims.page_size + (place - entry * dims.page_size)


@triton.jit
def record_decay(buffers, b, place, live, head, dims):
    """Return a record's log-decay [block_d], or for places [n, 1] their tile [n, block_d]."""
    lanes = tl.arange(0, dims.block_d)
    row = record_row(buffers, b, place, live, dims.value_heads, head, dims)
    return tl.load(buffers.decays + row * dims.d + lanes, mask=live & (lanes < dims.d), other=0.0)


@triton.jit
def record_pair(buffers, b, place, live, pair, head, cols, dims):
    """Return one of a record's pairs, key [block_k] and value [block_v], or for places [n, 1] their tiles."""
    lanes = tl.arange(0, dims.block_k)
    key_head = head // (dims.value_heads // dims.key_heads)
    row = record_row(buffers, b, place, live, dims.key_heads, key_head, dims) * dims.pairs + pair
    key = tl.load(buffers.keys + row * dims.k + lanes, mask=live & (lanes < dims.k), other=0.0)
    row = record_row(buffers, b, place, live, dims.value_heads, head, dims) * dims.pairs + pair
    value = tl.load(buffers.written + row * dims.v + cols, mask=live & (cols < dims.v), other=0.0)
    return key.to(tl.float32), value.to(tl.float32)


@triton.jit
def fold_into(state, buffers, b, count, head, cols, dims):
    """Return the state after the first ``count`` records: the recurrence itself over what was stored."""
    # Unrolled, so that the loads of several records are in flight together.
    for place in tl.range(0, count, loop_unroll_factor=4):
        state *= tl.exp(record_decay(buffers, b, place, True, head, dims))[:, None]
        for pair in tl.static_range(dims.pairs):
            key, value = record_pair(buffers, b, place, True, pair, head, cols, dims)
            state += key[:, None] * value[None, :]
    return state


@triton.jit
def store_written(buffers, b, place, removed, value, head, cols, dims):
    """Write a token's part of its written values, rounded to nearest, to its place in the buffer."""
    row = record_row(buffers, b, place, True, dims.value_heads, head, dims)
    to = buffers.written + row * dims.pairs * dims.v + cols
    if dims.removal:
        tl.store(to, removed.to(to.dtype.element_ty), mask=cols < dims.v)
        to += dims.v
    tl.store(to, value.to(to.dtype.element_ty), mask=cols < dims.v)
