"""Mixture of experts: top-k routing, and SwiGLU experts on weights packed once for the CPU."""

from __future__ import annotations

import ctypes
from functools import cache

import torch
import torch.nn.functional as F

from kvbuffer.ops import dispatch, memory
from kvbuffer.ops.linear import choose_compute, packed_dtype, weight_scale

_P, _I, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class SwigluStruct(ctypes.Structure):
    """Packed SwiGLU weights as the C interface passes them; operators.h describes them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate_up", "down")),
        *((name, ctypes.c_double) for name in ("gate_up_scale", "down_scale")),
        *((name, ctypes.c_int64) for name in ("hidden", "intermediate", "compute")),
    )


@cache
def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Give the C functions of this file their signatures."""
    lib.kvb_route.argtypes = [_P, _P, _P, _I, _I, _I, _INT]
    lib.kvb_route.restype = None
    lib.kvb_experts_elements.argtypes = [_I, _I, _I, _INT, _P, _P]
    lib.kvb_experts_elements.restype = None
    lib.kvb_experts_pack.argtypes = [_P, _P, _I, _I, _I, _INT, _FLOAT, _FLOAT, _P, _P]
    lib.kvb_experts_pack.restype = None
    lib.kvb_moe_mlp.argtypes = [_P, _I, _P, _P, _P, _P, _FLOAT, _FLOAT, _P, _I, _I, _I, _I, _I, _INT]
    lib.kvb_moe_mlp.restype = None
    return lib


def route(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts: softmax in float32, then the ``top_k`` most probable, best first.

    Equal probabilities go to the lower index first. Rows are independent of each other.

    Args:
        logits: [M, E] float32, contiguous.
        top_k: experts per token, at most E.
        normalize: whether the chosen probabilities are scaled to sum to one.

    Returns:
        Expert indices [M, top_k], int32, and their weights [M, top_k], float32.
    """
    lib = dispatch.cpu_kernels()
    if lib is None:
        return _route_portable(logits, top_k, normalize)
    rows, experts = logits.shape
    ids = torch.empty((rows, top_k), dtype=torch.int32)
    weights = torch.empty((rows, top_k), dtype=torch.float32)
    _declare(lib).kvb_route(logits.data_ptr(), ids.data_ptr(), weights.data_ptr(), rows, experts, top_k, normalize)
    return ids, weights


def _route_portable(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # A stable sort, because topk leaves the order of equal values open.
    probabilities = torch.softmax(logits, dim=-1)
    weights, ids = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :top_k], ids[:, :top_k]
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.to(torch.int32).contiguous(), weights.contiguous()


class PackedExperts:
    """The weights of E SwiGLU experts, packed once into the layout that the CPU kernel streams.

    Args:
        gate_up: [E, 2 I, H], float32 or bfloat16, the gate's rows first; copied (packed), not kept, when the
            compiled kernels are present.
        down: [E, H, I], same dtype.

    Attributes:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        dtype: dtype of the weights.
        nbytes: bytes of memory that the weights take.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self.num_experts, self.hidden_size, self.intermediate_size = down.shape
        self.dtype = gate_up.dtype
        lib = dispatch.cpu_kernels()
        self.lib = None if lib is None or self.dtype not in dispatch.DTYPE_CODES else _declare(lib)
        self.gate_up, self.down = gate_up, down
        if self.lib is not None:
            shape = (self.num_experts, self.hidden_size, self.intermediate_size)
            self.compute = choose_compute(self.lib, self.dtype)
            self.scales = weight_scale(gate_up, self.compute), weight_scale(down, self.compute)
            sizes = (ctypes.c_int64(), ctypes.c_int64())
            self.lib.kvb_experts_elements(*shape, self.compute, ctypes.byref(sizes[0]), ctypes.byref(sizes[1]))
            gate_up, down = gate_up.contiguous(), down.contiguous()
            self.gate_up, self.down = (memory.empty(size.value, dtype=packed_dtype(self.compute)) for size in sizes)
            self.lib.kvb_experts_pack(
                gate_up.data_ptr(),
                down.data_ptr(),
                *shape,
                self.compute,
                *self.scales,
                self.gate_up.data_ptr(),
                self.down.data_ptr(),
            )
        self.nbytes = self.gate_up.nbytes + self.down.nbytes

    def struct(self) -> SwigluStruct:
        """Return the weights, which have to outlive it, as the compiled kernels find them."""
        pointers = self.gate_up.data_ptr(), self.down.data_ptr()
        return SwigluStruct(*pointers, *self.scales, self.hidden_size, self.intermediate_size, self.compute)


def moe_mlp(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, experts: PackedExperts
) -> torch.Tensor:
    """Return, for each token, the weighted sum of down(silu(gate x) * up x) over its experts.

    The sum over experts is taken in float32, in ascending order of the expert's index. With the compiled kernels a
    token's result has the same bits whatever the other tokens, their number and the number of threads.

    Args:
        x: [M, H] float32; elements of a row are adjacent.
        expert_ids: [M, top_k], int32, contiguous; an index outside [0, E) adds nothing.
        expert_weights: [M, top_k], float32, contiguous.
        experts: the packed weights.

    Returns:
        [M, H] float32, contiguous.
    """
    if experts.lib is None:
        return _moe_mlp_portable(x, expert_ids, expert_weights, experts)
    rows, top_k = expert_ids.shape
    out = torch.empty((rows, experts.hidden_size))
    experts.lib.kvb_moe_mlp(
        x.data_ptr(),
        x.stride(0),
        expert_ids.data_ptr(),
        expert_weights.data_ptr(),
        experts.gate_up.data_ptr(),
        experts.down.data_ptr(),
        *experts.scales,
        out.data_ptr(),
        rows,
        top_k,
        experts.num_experts,
        experts.hidden_size,
        experts.intermediate_size,
        experts.compute,
    )
    return out


def _moe_mlp_portable(
    x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor, experts: PackedExperts
) -> torch.Tensor:
    total = torch.zeros(x.shape)
    for expert in torch.unique(expert_ids).tolist():
        if 0 <= expert < experts.num_experts:
            token, slot = torch.where(expert_ids == expert)
            y = swiglu_mlp_portable(x[token], experts.gate_up[expert], experts.down[expert])
            total.index_add_(0, token, y * expert_weights[token, slot, None])
    return total


def swiglu_mlp_portable(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return down(silu(gate x) * up x), [M, H] float32, for x [M, H], gate_up [2 I, H] and down [H, I]."""
    gate, up = F.linear(x.to(gate_up.dtype), gate_up).float().chunk(2, dim=-1)
    return F.linear((F.silu(gate) * up).to(down.dtype), down).float()
