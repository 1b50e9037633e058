"""The SwiGLU activation between two dense layers."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F

from kvbuffer.ops import dispatch


@cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    lib.kvb_swiglu.argtypes = [pointer, size, pointer, size, size]
    lib.kvb_swiglu.restype = None
    return lib


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up.

    Args:
        gate_up: [M, 2 I] float32, gate in the first I columns; elements of a row are adjacent.

    Returns:
        [M, I] float32, contiguous.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    lib = dispatch.cpu_kernels()
    if lib is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    out = torch.empty((rows, width))
    _declare(lib).kvb_swiglu(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), rows, width)
    return out
