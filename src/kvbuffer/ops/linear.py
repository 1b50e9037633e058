"""Dense layers on weights packed once for the CPU."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F

from kvbuffer.ops import dispatch

_P, _I, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


@cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Give the C functions of this file their signatures."""
    lib.kvb_linear_packed_elements.argtypes = [_I, _I]
    lib.kvb_linear_packed_elements.restype = _I
    lib.kvb_linear_pack.argtypes = [_P, _I, _I, _INT, _P]
    lib.kvb_linear_pack.restype = None
    lib.kvb_linear.argtypes = [_P, _I, _P, _P, _P, _I, _I, _I, _I, _INT, _INT]
    lib.kvb_linear.restype = None
    lib.kvb_bfloat16_compute.argtypes = []
    lib.kvb_bfloat16_compute.restype = _INT
    return lib


def compute_code(lib: ctypes.CDLL, dtype: torch.dtype) -> int:
    """Return the C interface's code for how products in ``dtype`` are computed on this CPU.

    0: float32; 1: bfloat16 widened to float32; 2: bfloat16 pairs with the CPU's dot-product instruction.
    """
    return 0 if dtype == torch.float32 else int(_declare(lib).kvb_bfloat16_compute())


class Linear:
    """``y = x Wᵀ + b`` with the weight packed once into the layout that the CPU kernel streams.

    With the compiled kernels a row's result has the same bits whatever the other rows, their number and the
    number of threads. The portable form is :func:`torch.nn.functional.linear`, whose bits may depend on the
    number of rows.

    Args:
        weight: [N, K], float32 or bfloat16; copied (packed), not kept, when the compiled kernels are present.
        bias: [N] or None; added in float32 before the one rounding to the output dtype.
        out_dtype: float32 or bfloat16, the weight's if None. Float32 means the unrounded sums.

    Attributes:
        in_features: K.
        out_features: N.
        dtype: dtype of the weight, hence of inputs.
        out_dtype: dtype of outputs.
        nbytes: bytes of memory that the layer holds.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.out_dtype = weight.dtype if out_dtype is None else out_dtype
        lib = dispatch.cpu_kernels()
        self._lib = None if lib is None or self.dtype not in dispatch.DTYPE_CODES else _declare(lib)
        if self._lib is None:
            self._weight = weight
            self._bias = bias if bias is None else bias.to(self.out_dtype)
        else:
            n, k = weight.shape
            source = weight.contiguous()
            self._weight = torch.empty(self._lib.kvb_linear_packed_elements(n, k), dtype=self.dtype)
            self._lib.kvb_linear_pack(
                source.data_ptr(), n, k, dispatch.DTYPE_CODES[self.dtype], self._weight.data_ptr()
            )
            self._bias = bias if bias is None else bias.to(torch.float32, copy=True).contiguous()
            self._packed_ptr = self._weight.data_ptr()
            self._bias_ptr = None if self._bias is None else self._bias.data_ptr()
            self._compute = compute_code(self._lib, self.dtype)
        self.nbytes = self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x Wᵀ + b``.

        Args:
            x: [M, K] in the weight's dtype; elements of a row are adjacent.
            out: [M, N] to write into, or None to allocate; elements of a row are adjacent.
        """
        if self._lib is None:
            y = F.linear(x.to(self.out_dtype), self._weight.to(self.out_dtype), self._bias)
            return y if out is None else out.copy_(y)
        rows = x.shape[0]
        if out is None:
            out = torch.empty((rows, self.out_features), dtype=self.out_dtype)
        self._lib.kvb_linear(
            x.data_ptr(),
            x.stride(0),
            self._packed_ptr,
            self._bias_ptr,
            out.data_ptr(),
            out.stride(0),
            rows,
            self.in_features,
            self.out_features,
            self._compute,
            dispatch.DTYPE_CODES[self.out_dtype],
        )
        return out
