"""The dense SwiGLU layer, on weights packed once for the CPU."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from kvbuffer.ops.moe import PackedExperts, swiglu_mlp_portable
from kvbuffer.ops.norm import add_rms_norm

_P, _I, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


@cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.kvb_mlp.argtypes = [_P, _I, _P, _P, _FLOAT, _P, _P, _FLOAT, _FLOAT, _P, _I, _I, _I, _INT]
    lib.kvb_mlp.restype = None
    return lib


class SwigluMlp:
    """``y = down(silu(gate x) * up x)``: an expert that all tokens take.

    With the compiled kernels a row's result has the same bits whatever the other rows, their number and the number of
    threads.

    Args:
        gate_up: [2 I, H], float32 or bfloat16, the gate's rows first; copied (packed), not kept, when the compiled
            kernels are present.
        down: [H, I], same dtype.

    Attributes:
        weights: the packed weights.
    """

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.weights = weights = PackedExperts(gate_up.unsqueeze(0), down.unsqueeze(0))
        if weights.lib is not None:
            self._kernel = _declare(weights.lib).kvb_mlp
            self._packed = (weights.gate_up.data_ptr(), weights.down.data_ptr(), *weights.scales)
            self._shape = (weights.hidden_size, weights.intermediate_size, weights.compute)

    def __call__(self, x: Tensor) -> Tensor:
        """Map [M, H] float32, whose rows may be strided, to [M, H] float32."""
        if self.weights.lib is None:
            return swiglu_mlp_portable(x, self.weights.gate_up[0], self.weights.down[0])
        out = torch.empty(x.shape)
        self._kernel(x.data_ptr(), x.stride(0), None, None, 0.0, *self._packed, out.data_ptr(), len(x), *self._shape)
        return out

    def of_add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the layer's output for :func:`add_rms_norm` of the arguments, in one call.

        Args:
            x: [M, H] float32, contiguous.
            residual: [M, H] float32, contiguous; ``x`` is added to it in place.
            weight: [H] float32.
            eps: added to the mean square.

        Returns:
            [M, H] float32.
        """
        if self.weights.lib is None:
            return self(add_rms_norm(x, residual, weight, eps))
        out = torch.empty_like(residual)
        self._kernel(
            x.data_ptr(), x.stride(0), residual.data_ptr(), weight.data_ptr(), eps, *self._packed, out.data_ptr(),
            len(x), *self._shape,
        )  # fmt: skip
        return out
