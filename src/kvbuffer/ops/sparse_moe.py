"""A whole mixture-of-experts layer, in one call of the compiled kernels."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from kvbuffer.ops.cpu.arguments import kernel
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.mlp import SwigluMlp
from kvbuffer.ops.moe import PackedExperts, SwigluStruct, moe_mlp, route
from kvbuffer.ops.norm import add_rms_norm


class SparseMoeStruct(ctypes.Structure):
    """A layer as the C interface passes it; sparse_moe.cpp describes it."""

    _fields_ = (
        *((name, c_void_p) for name in ("norm", "router", "shared_gate")),
        ("experts", SwigluStruct),
        ("shared", SwigluStruct),
        *((name, c_int64) for name in ("num_experts", "top_k", "normalize")),
        ("eps", c_double),
        ("seconds", c_double * 4),
    )


class SparseMoeMlp:
    """A mixture of SwiGLU experts, of which each token takes the top k, plus a gated expert that all tokens share.

    Args:
        norm: [H] float32, the norm in front of the layer.
        eps: added to the mean square.
        router: [E, H].
        experts: E of them.
        top_k: experts per token.
        normalize: whether the weights of a token's experts are scaled to sum to one.
        shared: the shared expert.
        shared_gate: [1, H], of which the sigmoid is taken.

    Attributes:
        router, experts, shared, shared_gate: as given.
        top_k: as given.
        struct: the layer as the C interface passes it; None without the compiled kernels.
    """

    def __init__(
        self,
        norm: Tensor,
        eps: float,
        router: Linear,
        experts: PackedExperts,
        top_k: int,
        normalize: bool,
        shared: SwigluMlp,
        shared_gate: Linear,
    ) -> None:
        self._norm, self._eps, self._normalize = norm, eps, normalize
        self.router, self.experts, self.top_k = router, experts, top_k
        self.shared, self.shared_gate = shared, shared_gate
        self.struct: SparseMoeStruct | None = None
        if experts.lib is not None:
            self.struct = SparseMoeStruct(
                norm.data_ptr(), router.layer_ptr, shared_gate.layer_ptr, experts.struct(), shared.weights.struct(),
                experts.num_experts, top_k, normalize, eps,
            )  # fmt: skip
            self._struct_ptr = ctypes.addressof(self.struct)
            self._kernel = kernel("kvb_sparse_moe", *[c_void_p] * 4, c_int64)

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the layer's output for the norm of ``residual + x``.

        Args:
            x: [M, H] float32, contiguous.
            residual: [M, H] float32, contiguous; ``x`` is added to it in place.

        Returns:
            [M, H] float32.
        """
        if self.struct is None:
            normed = add_rms_norm(x, residual, self._norm, self._eps)
            expert_ids, weights = route(self.router(normed), self.top_k, self._normalize)
            shared = torch.sigmoid(self.shared_gate(normed)) * self.shared(normed)
            return moe_mlp(normed, expert_ids, weights, self.experts).add_(shared)
        out = torch.empty_like(residual)
        self._kernel(self._struct_ptr, x.data_ptr(), residual.data_ptr(), out.data_ptr(), len(residual))
        return out
