"""One token against a state and records: the heart of decode and verification."""

from __future__ import annotations

import triton
import triton.language as tl

from kvbuffer.ops.triton.tiles import load_decay, load_key, load_value, record_decay, record_pair

# Records at a time. Buffers hold 8 on average where they are folded at 16.
_BLOCK_N: tl.constexpr = tl.constexpr(8)


@triton.jit
def step(state, scale, tokens, strides, token, buffers, b, count, parents, parent, head, cols, dims):
    """Run one token of request b.

    Args:
        state: [block_k, block_v] tile of the state.
        scale: [block_k] what its rows are to be multiplied by.
        tokens: the tokens' inputs.
        strides: of the tokens' rows.
        token: which one.
        buffers: record pages and page tables.
        b: the request.
        count: records that it follows.
        parents: [m] parents of the request's new tokens, whose records begin at ``count``; or none for a chain.
        parent: its own parent among them, or -1.
        head: the value head.
        cols: [block_v] value dims.
        dims: sizes.

    Returns:
        Its output, its removal (zeros where the family has none) and its written value, [block_v] each.
    """
    q = load_key(tokens.q, token, True, strides.q, head, dims)
    key = load_key(tokens.k, token, True, strides.k, head, dims)
    value = load_value(tokens, strides, token, True, head, cols, dims)
    decay = tl.exp(load_decay(tokens, strides, token, True, head, dims))
    decayed_q = q * decay
    if dims.removal:
        # A removal reads what was there before the token's own decay.
        read = load_key(tokens.removal_read, token, True, dims.key_heads * dims.k, head, dims)
    else:
        read = key * decay

    out = tl.zeros([dims.block_v], tl.float32)
    removed = tl.zeros([dims.block_v], tl.float32)
    # From the newest record to the oldest, ``later`` being the log-decay since: a sum that starts small and grows, so
    # that none is the difference of two large ones.
    later = tl.zeros([dims.block_d], tl.float32)
    if parents is not None:
        while parent >= 0:
            for pair in tl.static_range(dims.pairs):
                pair_key, pair_value = record_pair(buffers, b, count + parent, True, pair, head, cols, dims)
                pair_key *= tl.exp(later)
                out += tl.sum(pair_key * decayed_q, 0) * pair_value
                if dims.delta or dims.removal:
                    removed -= tl.sum(pair_key * read, 0) * pair_value
            later += record_decay(buffers, b, count + parent, True, head, dims)
            parent = tl.load(parents + parent)
    for done in range(0, count, _BLOCK_N):
        place = ((count - 1 - done) // _BLOCK_N * _BLOCK_N + tl.arange(0, _BLOCK_N))[:, None]
        after = record_decay(buffers, b, place + 1, place + 1 < count, head, dims)
        weights = tl.exp(sums_from(after) + later)
        for pair in tl.static_range(dims.pairs):
            keys, values = record_pair(buffers, b, place, place < count, pair, head, cols, dims)
            keys *= weights
            out += tl.sum(tl.sum(keys * decayed_q, 1)[:, None] * values, 0)
            if dims.delta or dims.removal:
                removed -= tl.sum(tl.sum(keys * read, 1)[:, None] * values, 0)
        later += tl.sum(after, 0)
    if count > 0:
        later += record_decay(buffers, b, 0, True, head, dims)
    # The state comes last: its loads may be in flight while the records are read.
    scale *= tl.exp(later)
    out += tl.sum(state * (decayed_q * scale)[:, None], 0)
    if dims.delta or dims.removal:
        removed -= tl.sum(state * (read * scale)[:, None], 0)

    if dims.delta:
        value = tl.load(tokens.beta + token * dims.value_heads + head) * (value + removed)
    if dims.removal:
        write = load_key(tokens.removal_write, token, True, dims.key_heads * dims.k, head, dims)
        out += tl.sum(q * write, 0) * removed
    out += tl.sum(q * key, 0) * value
    return out, removed, value


@triton.jit
def sums_from(x):
    """Return the sums over each row and the ones after it [n, d]."""
    if x.shape[1] == 1:
        # As a vector: Triton 3.6 fails to compile scans of single columns in some layouts.
        return tl.cumsum(tl.reshape(x, [x.shape[0]]), 0, reverse=True)[:, None]
    else:
        return tl.cumsum(x, 0, reverse=True)
