"""The SwiGLU activation between two dense layers."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F

from kvbuffer.ops import dispatch


@cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.kvb_swiglu.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int,
    ]
    lib.kvb_swiglu.restype = None
    return lib


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, computed in float32 and rounded once.

    Args:
        gate_up: [M, 2 I], float32 or bfloat16, gate in the first I columns; elements of a row are adjacent.

    Returns:
        [M, I], contiguous, same dtype.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    lib = dispatch.cpu_kernels()
    dtype = dispatch.DTYPE_CODES.get(gate_up.dtype)
    if lib is None or dtype is None:
        return _swiglu_portable(gate_up)
    out = torch.empty((rows, width), dtype=gate_up.dtype)
    _declare(lib).kvb_swiglu(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), rows, width, dtype)
    return out


def _swiglu_portable(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up.float()).to(gate_up.dtype)
