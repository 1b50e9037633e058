"""Dense layers on weights packed once for the CPU."""

from __future__ import annotations

import ctypes
import math
from enum import IntEnum
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.ops import dispatch, memory
from kvbuffer.ops.norm import add_rms_norm, gated_rms_norm

_P, _I, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Give the C functions of this file their signatures."""
    lib.kvb_linear_packed_elements.argtypes = [_I, _I, _INT]
    lib.kvb_linear_packed_elements.restype = _I
    lib.kvb_linear_pack.argtypes = [_P, _I, _I, _INT, _FLOAT, _P]
    lib.kvb_linear_pack.restype = None
    lib.kvb_linear.argtypes = [_P, _I, _I, _P, _P, _I]
    lib.kvb_add_rms_norm_linear.argtypes = [_P, _P, _P, _FLOAT, _I, _P, _P]
    lib.kvb_gated_rms_norm_linear.argtypes = [_P, _P, _I, _P, _I, _FLOAT, _I, _P, _P]
    for function in (lib.kvb_linear, lib.kvb_add_rms_norm_linear, lib.kvb_gated_rms_norm_linear):
        function.restype = None
    lib.kvb_bfloat16_compute.argtypes = []
    lib.kvb_bfloat16_compute.restype = _INT
    return lib


class Compute(IntEnum):
    """How the compiled kernels compute products, by the C interface's codes; gemm.h has the details.

    FLOAT32: float32 weights. The others are for bfloat16 weights. WIDENED: in float32, exact products. PAIR_DOT: inputs
    rounded to bfloat16, for the CPU's dot-product instruction. HALF: products and short sums in float16 under
    power-of-two scales, inputs rounded to its 11 bits.
    """

    FLOAT32 = 0
    WIDENED = 1
    PAIR_DOT = 2
    HALF = 3


def choose_compute(lib: ctypes.CDLL, dtype: torch.dtype) -> Compute:
    """Return the fastest way to compute with weights in ``dtype`` on this CPU."""
    return Compute.FLOAT32 if dtype == torch.float32 else Compute(_declare(lib).kvb_bfloat16_compute())


def weight_scale(weight: Tensor, compute: Compute) -> float:
    """Return the power of two by which packing divides a weight: for HALF, what brings it below 1."""
    if compute is not Compute.HALF or weight.numel() == 0:
        return 1.0
    # By rows: a float32 or boolean copy of a whole vocabulary is not needed.
    largest = max(float(torch.linalg.vector_norm(rows, torch.inf)) for rows in weight.flatten(0, -2).split(4096))
    # Scales beyond these would themselves leave float32's range; no weight is meant to be so.
    return 2.0 ** max(-100, min(math.frexp(largest)[1], 100))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("packed", _P),
        ("bias", _P),
        ("n", _I),
        ("k", _I),
        ("weight_scale", _FLOAT),
        ("compute", ctypes.c_int32),
    )


class Linear:
    """``y = x Wᵀ + b`` with the weight packed once into the layout that the CPU kernel streams.

    Inputs and outputs are float32 whatever the weight's dtype. With the compiled kernels a row's result has the same
    bits whatever the other rows, their number and the number of threads. The portable form is
    :func:`torch.nn.functional.linear` in the weight's dtype, whose bits may depend on the number of rows.

    Args:
        weight: [N, K], float32 or bfloat16; copied (packed), not kept, when the compiled kernels are present.
        bias: [N] or None; added in float32.

    Attributes:
        in_features: K.
        out_features: N.
        dtype: dtype of the weight.
        nbytes: bytes of memory that the layer holds.
        layer_ptr: where the kernels find the layer; None without them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._bias = None if bias is None else bias.to(torch.float32, copy=True).contiguous()
        lib = dispatch.cpu_kernels()
        self._lib = None if lib is None or self.dtype not in dispatch.DTYPE_CODES else _declare(lib)
        self.layer_ptr: int | None = None
        if self._lib is None:
            self._weight = weight
        else:
            n, k = weight.shape
            compute = choose_compute(self._lib, self.dtype)
            scale = weight_scale(weight, compute)
            elements = self._lib.kvb_linear_packed_elements(n, k, compute)
            self._weight = memory.empty(elements, dtype=packed_dtype(compute))
            source, packed = weight.contiguous(), self._weight.data_ptr()
            self._lib.kvb_linear_pack(source.data_ptr(), n, k, compute, scale, packed)
            bias_ptr = None if self._bias is None else self._bias.data_ptr()
            self._layer = _Layer(packed, bias_ptr, n, k, scale, compute)
            self.layer_ptr = ctypes.addressof(self._layer)
        self.nbytes = self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Return ``x Wᵀ + b``.

        Args:
            x: [M, K] float32; elements of a row are adjacent.
            out: [M, N] float32 to write into, or None to allocate; elements of a row are adjacent.
        """
        if self._lib is None:
            y = F.linear(x.to(self.dtype), self._weight).float()
            y = y if self._bias is None else y + self._bias
            return y if out is None else out.copy_(y)
        rows = x.shape[0]
        if out is None:
            out = torch.empty(rows, self.out_features)
        self._lib.kvb_linear(x.data_ptr(), x.stride(0), rows, self.layer_ptr, out.data_ptr(), out.stride(0))
        return out

    def of_add_rms_norm(self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the layer's output for :func:`add_rms_norm` of the arguments, in one call.

        Args:
            x: [M, K] float32, contiguous, or None to add nothing.
            residual: [M, K] float32, contiguous; ``x`` is added to it in place.
            weight: [K] float32.
            eps: added to the mean square.

        Returns:
            [M, N] float32.
        """
        if self._lib is None:
            return self(add_rms_norm(x, residual, weight, eps))
        rows = residual.shape[0]
        out = torch.empty(rows, self.out_features)
        self._lib.kvb_add_rms_norm_linear(
            None if x is None else x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, rows, self.layer_ptr,
            out.data_ptr(),
        )  # fmt: skip
        return out

    def of_gated_rms_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the layer's output for :func:`gated_rms_norm` of the arguments, in one call.

        Args:
            x: [M, H, V] float32, contiguous; K is H * V.
            gate: [M, K] float32; rows may be strided.
            weight: [V] float32.
            eps: added to the mean square.

        Returns:
            [M, N] float32.
        """
        if self._lib is None:
            return self(gated_rms_norm(x, gate, weight, eps))
        rows = x.shape[0]
        out = torch.empty(rows, self.out_features)
        self._lib.kvb_gated_rms_norm_linear(
            x.data_ptr(), gate.data_ptr(), gate.stride(0), weight.data_ptr(), x.shape[2], eps, rows, self.layer_ptr,
            out.data_ptr(),
        )  # fmt: skip
        return out


def packed_dtype(compute: Compute) -> torch.dtype:
    """Return the dtype of packed weights."""
    return {Compute.FLOAT32: torch.float32, Compute.HALF: torch.float16}.get(compute, torch.bfloat16)
