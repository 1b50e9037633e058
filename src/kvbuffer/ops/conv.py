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
    lib.kvb_causal_conv.argtypes = [c_void_p, c_int64, *[c_void_p] * 6, *[c_int64] * 5]
    lib.kvb_causal_conv.restype = None
    return lib


def causal_conv(
    x: Tensor, weight: Tensor, pool: Tensor, rings: Tensor, cu_seqlens: Tensor, context_lens: Tensor
) -> Tensor:
    """Return ``silu(conv(x))`` and keep the last inputs of each request in its ring.

    Args:
        x: [N, >= C] float32: the first C columns are the inputs (rows may be strided).
        weight: [W, C] float32, the oldest tap first; W at most 16.
        pool: [num_rings, R, C] float32 or bfloat16, R >= W - 1; the rings' rows are read and written.
        rings: [S] int32. Sequences run in order: one that names the ring of an earlier one goes on where that stopped.
        cu_seqlens: [S + 1] int32, borders of the sequences in ``x``; a sequence may be empty.
        context_lens: [S] int32, position of each sequence's first token; before position 0 the inputs are zero.

    Returns:
        [N, C] float32.
    """
    (taps, channels), tokens = weight.shape, x.shape[0]
    lib = dispatch.cpu_kernels()
    if lib is None:
        return _causal_conv_portable(x[:, :channels], weight, pool, rings, cu_seqlens, context_lens)
    out = torch.empty(tokens, channels)
    _bind(lib).kvb_causal_conv(
        x.data_ptr(), x.stride(0), weight.data_ptr(), pool.data_ptr(), rings.data_ptr(), cu_seqlens.data_ptr(),
        context_lens.data_ptr(), out.data_ptr(), rings.shape[0], channels, taps, pool.shape[1],
        dispatch.DTYPE_CODES[pool.dtype],
    )  # fmt: skip
    return out


def _causal_conv_portable(
    x: Tensor, weight: Tensor, pool: Tensor, rings: Tensor, cu_seqlens: Tensor, context_lens: Tensor
) -> Tensor:
    (taps, channels), ring_len = weight.shape, pool.shape[1]
    out = torch.empty(x.shape[0], channels)
    borders = cu_seqlens.tolist()
    for s, (ring, context) in enumerate(zip(rings.tolist(), context_lens.tolist(), strict=True)):
        begin, end = borders[s], borders[s + 1]
        if begin == end:
            continue
        before = torch.arange(context - taps + 1, context)
        past = torch.where((before >= 0).unsqueeze(1), pool[ring, before % ring_len].float(), 0.0)
        inputs = torch.cat([past, x[begin:end]])
        taps_first = weight.T.unsqueeze(1)  # [C, 1, W]
        conv = F.conv1d(inputs.T.unsqueeze(0), taps_first, groups=channels)
        out[begin:end] = F.silu(conv[0].T)
        kept = torch.arange(max(begin, end - ring_len), end)
        pool[ring, (context + kept - begin) % ring_len] = x[kept].to(pool.dtype)
    return out
