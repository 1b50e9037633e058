"""The short causal convolution in front of a linear-attention layer, with its rolling inputs.

N tokens, B requests, C channels, W taps. The last W - 1 inputs of each request are kept in a pool of slots.
"""

from __future__ import annotations

from ctypes import CDLL, c_int64, c_void_p
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.ops import dispatch


@cache
def _bind(lib: CDLL) -> CDLL:
    lib.kvb_causal_conv.argtypes = [
        c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, *[c_int64] * 3,
    ]  # fmt: skip
    return lib


def causal_conv(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor, fresh: Tensor) -> Tensor:
    """Return ``silu(conv(x))`` and roll the inputs in ``state`` forward.

    Args:
        x: [N, >= C] float32: the first C columns are the inputs (rows may be strided).
        weight: [W, C] float32, the oldest tap first.
        state: [num_slots, W - 1, C] float32; the rows of ``slots`` are read and written.
        slots: [B] int32, all different.
        cu_seqlens: [B + 1] int32, borders of the requests in ``x``; a request may be empty.
        fresh: [B] uint8, 1 where nothing came before: zeros are used instead of ``state``.

    Returns:
        [N, C] float32.
    """
    (taps, channels), tokens, requests = weight.shape, x.shape[0], slots.shape[0]
    lib = dispatch.cpu_kernels()
    if lib is None:
        return _causal_conv_portable(x[:, :channels], weight, state, slots, cu_seqlens, fresh)
    out = torch.empty(tokens, channels)
    _bind(lib).kvb_causal_conv(
        x.data_ptr(), x.stride(0), weight.data_ptr(), state.data_ptr(), slots.data_ptr(), cu_seqlens.data_ptr(),
        fresh.data_ptr(), out.data_ptr(), requests, channels, taps,
    )  # fmt: skip
    return out


def _causal_conv_portable(
    x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, cu_seqlens: Tensor, fresh: Tensor
) -> Tensor:
    channels = weight.shape[1]
    out = torch.empty(x.shape[0], channels)
    borders = cu_seqlens.tolist()
    for b, slot in enumerate(slots.tolist()):
        begin, end = borders[b], borders[b + 1]
        if begin == end:
            continue
        past = torch.zeros_like(state[slot]) if fresh[b] else state[slot]
        inputs = torch.cat([past, x[begin:end]])
        taps_first = weight.T.unsqueeze(1)  # [C, 1, W]
        conv = F.conv1d(inputs.T.unsqueeze(0), taps_first, groups=channels)
        out[begin:end] = F.silu(conv[0].T)
        state[slot] = inputs[end - begin :]
    return out
