"""The row-wise operators around the layers: RMSNorm with the residual add, gated RMSNorm, the delta rule's inputs."""

from __future__ import annotations

from ctypes import CDLL, c_double, c_int64, c_void_p
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.ops import dispatch

#: Added to the squared length of queries and keys before they are made unit length (the families' common choice).
UNIT_EPS = 1e-6


@cache
def _bind(lib: CDLL) -> CDLL:
    lib.kvb_add_rms_norm.argtypes = [*[c_void_p] * 4, c_int64, c_int64, c_double]
    lib.kvb_gated_rms_norm.argtypes = [
        c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_double,
    ]  # fmt: skip
    lib.kvb_gated_delta_inputs.argtypes = [
        c_void_p, c_int64, c_void_p, c_void_p, c_int64, *[c_void_p] * 4, *[c_int64] * 4,
    ]  # fmt: skip
    return lib


def add_rms_norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add ``x`` to ``residual`` in place and return the RMSNorm of the sum.

    Args:
        x: [N, D] float32, contiguous, or None to add nothing.
        residual: [N, D] float32, contiguous; updated in place.
        weight: [D] float32, the factor itself (1 + w for zero-centred norms).
        eps: added to the mean square.

    Returns:
        [N, D] float32.
    """
    lib = dispatch.cpu_kernels()
    if lib is None:
        if x is not None:
            residual += x
        return residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps) * weight
    out = torch.empty_like(residual)
    _bind(lib).kvb_add_rms_norm(
        None if x is None else x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(),
        residual.shape[0], residual.shape[1], eps,
    )  # fmt: skip
    return out


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm(x) * weight * silu(gate)``, normalised per head.

    Args:
        x: [N, H, V] float32, contiguous.
        gate: [N, H * V] float32; rows may be strided.
        weight: [V] float32.
        eps: added to the mean square.

    Returns:
        [N, H * V] float32.
    """
    tokens, heads, dim = x.shape
    lib = dispatch.cpu_kernels()
    if lib is None:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
        return normed.flatten(1) * F.silu(gate)
    out = torch.empty(tokens, heads * dim)
    _bind(lib).kvb_gated_rms_norm(
        x.data_ptr(), gate.data_ptr(), gate.stride(0), weight.data_ptr(), out.data_ptr(), tokens, heads, dim, eps,
    )  # fmt: skip
    return out


def gated_delta_inputs(qk: Tensor, b: Tensor, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Prepare what Gated DeltaNet reads: unit-length queries and keys in place, decays and writing strengths.

    Args:
        qk: [N, 2 * HK, K] float32 (rows may be strided), query heads first. In place each head becomes unit length and
            queries are also scaled by K ** -0.5.
        b: [N, HV] float32, writing strength before its sigmoid (rows strided as a's).
        a: [N, HV] as b, time step before its softplus.
        a_log: [HV] float32, log of the decay rate.
        dt_bias: [HV] float32.

    Returns:
        g [N, HV] float32 log-decays (<= 0) and beta [N, HV] float32 in (0, 1).
    """
    tokens, heads, dim = qk.shape
    value_heads = a_log.shape[0]
    lib = dispatch.cpu_kernels()
    if lib is None:
        qk *= torch.rsqrt(qk.square().sum(-1, keepdim=True) + UNIT_EPS)
        qk[:, : heads // 2] *= dim**-0.5
        return -a_log.exp() * F.softplus(a + dt_bias), torch.sigmoid(b)
    g = torch.empty(tokens, value_heads)
    beta = torch.empty_like(g)
    _bind(lib).kvb_gated_delta_inputs(
        qk.data_ptr(), qk.stride(0), b.data_ptr(), a.data_ptr(), a.stride(0), a_log.data_ptr(), dt_bias.data_ptr(),
        g.data_ptr(), beta.data_ptr(), tokens, heads // 2, value_heads, dim,
    )  # fmt: skip
    return g, beta
