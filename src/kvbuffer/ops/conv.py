"""The short causal convolution in front of a linear-attention layer, with its last inputs in rings.

N tokens, S sequences, C channels, W taps. Position p of a request lies in row ``p % R`` of its ring, so that nothing
has to be moved when a request goes on, and nothing undone when its last tokens are rejected: at most R - W + 1 of them.
"""

from __future__ import annotations

from ctypes import CDLL, c_int64, c_void_p
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.ops import dispatch

#: Most taps that the kernels take.
MAX_TAPS = 16


@cache
def _bind(lib: CDLL) -> CDLL:
    lib.kvb_causal_conv.argtypes = [c_void_p, c_int64, *[c_void_p] * 8, *[c_int64] * 6]
    lib.kvb_causal_conv.restype = None
    return lib


def causal_conv(
    x: Tensor,
    weight: Tensor,
    pool: Tensor,
    rings: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    parents: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Return ``silu(conv(x))`` and keep the last inputs of each request in its ring.

    Args:
        x: [N, >= C] float32: the first C columns are the inputs (rows may be strided).
        weight: [W, C] float32, the oldest tap first; W at most 16.
        pool: [num_rings, R, C] float32 or bfloat16, R >= W - 1; the rings' rows are read and written.
        rings: [S] int32. Sequences run in order: one that names the ring of an earlier one goes on where that stopped.
        cu_seqlens: [S + 1] int32, borders of the sequences in ``x``; a sequence may be empty.
        context_lens: [S] int32, position of each sequence's first token; before position 0 the inputs are zero.
        parents: [N] int32, the token that each one follows, counted among its sequence's own and less than its own
            place; -1 follows the ring's last. None for chains. Token i of a sequence goes to its place in the ring as
            in a chain, whatever it follows; a tree has at most R - W + 1 tokens.
        kept: [M, 3] int32, (ring, sequence, count), sequences ascending: a further ring, no sequence's own, is left
            with what the sequence's ring holds after the first ``count`` of its tokens. None for none.

    Returns:
        [N, C] float32.
    """
    (taps, channels), tokens = weight.shape, x.shape[0]
    lib = dispatch.cpu_kernels()
    if lib is None:
        return _causal_conv_portable(x[:, :channels], weight, pool, rings, cu_seqlens, context_lens, parents, kept)
    out = torch.empty(tokens, channels)
    _bind(lib).kvb_causal_conv(
        x.data_ptr(), x.stride(0), weight.data_ptr(), pool.data_ptr(), rings.data_ptr(), cu_seqlens.data_ptr(),
        context_lens.data_ptr(), None if parents is None else parents.data_ptr(),
        None if kept is None else kept.data_ptr(), out.data_ptr(), 0 if kept is None else kept.shape[0],
        rings.shape[0], channels, taps, pool.shape[1], dispatch.DTYPE_CODES[pool.dtype],
    )  # fmt: skip
    return out


def compact_rings(pool: Tensor, rings: Tensor, context_lens: Tensor, accepted: Tensor, cu_accepted: Tensor) -> None:
    """Keep the inputs of the accepted path of a tree: move them to where those of a chain lie.

    Args:
        pool: [num_rings, R, C], written.
        rings: [B] int32.
        context_lens: [B] int32, tokens of each request before the tree.
        accepted: [A] int32, the accepted tokens, counted among their request's own, ascending.
        cu_accepted: [B + 1] int32, borders of the requests in ``accepted``.
    """
    ring_len, counts = pool.shape[1], cu_accepted.diff().long()
    request = torch.arange(len(rings)).repeat_interleave(counts)
    target = torch.arange(len(accepted)) - cu_accepted[request]
    ring, context = rings[request].long(), context_lens[request]
    pool[ring, (context + target) % ring_len] = pool[ring, (context + accepted) % ring_len]


def _causal_conv_portable(
    x: Tensor,
    weight: Tensor,
    pool: Tensor,
    rings: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    parents: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    (taps, channels), ring_len = weight.shape, pool.shape[1]
    out = torch.empty(x.shape[0], channels)
    borders = cu_seqlens.tolist()

    def keep(ring: int, context: int, begin: int, end: int) -> None:
        rows = torch.arange(max(begin, end - ring_len), end)
        pool[ring, (context + rows - begin) % ring_len] = x[rows].to(pool.dtype)

    for s, (ring, context) in enumerate(zip(rings.tolist(), context_lens.tolist(), strict=True)):
        begin, end = borders[s], borders[s + 1]
        if begin == end:
            continue
        before = torch.arange(context - taps + 1, context)
        past = torch.where((before >= 0).unsqueeze(1), pool[ring, before % ring_len].float(), 0.0)
        inputs = torch.cat([past, x[begin:end]])
        # Where the inputs of each token are, [n, W]: its own last.
        path = torch.arange(taps - 1, taps - 1 + end - begin)
        before = path - 1 if parents is None else parents[begin:end].long() + taps - 1
        path = torch.cat([torch.arange(taps - 1), path])
        before = torch.cat([torch.arange(-1, taps - 2), before])
        places = [path[taps - 1 :]]
        for _ in range(taps - 1):
            places.insert(0, before[places[0]])
        out[begin:end] = F.silu((inputs[torch.stack(places, 1)] * weight).sum(1))
        for other, sequence, count in [] if kept is None else kept.tolist():
            if sequence == s:
                pool[other] = pool[ring]
                keep(other, context, begin, begin + count)
        keep(ring, context, begin, end)
    return out
