"""What the heads of a Gated DeltaNet layer compute, in one call of the compiled kernels.

Called one by one, the operators cost more in Python than a small one takes: after each of them the interpreter starts
with cold caches. C convolution channels; HV value heads of V columns.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from kvbuffer.ops import dispatch
from kvbuffer.ops.batch import ModelInputs
from kvbuffer.ops.cpu import backend
from kvbuffer.ops.cpu.arguments import RecordsStruct, ShapeStruct, StatesStruct, kernel, records_of, shape_of, states_of
from kvbuffer.ops.layout import RecordPages, StatePool
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.rule import GATED_DELTANET


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("in_proj", "input_norm", "conv_weight", "a_log", "dt_bias", "ring_pool")),
        *((name, c_int64) for name in ("taps", "ring_len", "ring_dtype")),
        ("eps", c_double),
        ("shape", ShapeStruct),
        ("states", StatesStruct),
        ("records", RecordsStruct),
        ("seconds", c_double * 4),
    )


class GatedDeltaHeads:
    """A layer's weights and memory. Same bits as its operators called one by one.

    Args:
        in_proj: [C + HV * V + 2 * HV, hidden]: queries, keys and values, gate z, b and a; without bias.
        input_norm: [hidden] float32, the norm in front.
        eps: of the norm.
        conv_weight: [W, C] float32, the oldest tap first.
        a_log: [HV] float32, log of the decay rate.
        dt_bias: [HV] float32.
        states: the layer's states.
        rings: [num_rings, R, C] float32 or bfloat16, the convolution's last inputs.
        records: the layer's pages.

    Attributes:
        in_proj, states, records: as given.
        layer_ptr: where the kernels find the layer.
        seconds: what the last call's operators took: norm and projection, convolution, the delta rule's inputs, forms.
    """

    def __init__(
        self,
        in_proj: Linear,
        input_norm: Tensor,
        eps: float,
        conv_weight: Tensor,
        a_log: Tensor,
        dt_bias: Tensor,
        states: StatePool,
        rings: Tensor,
        records: RecordPages,
    ) -> None:
        self.in_proj, self.states, self.records = in_proj, states, records
        self._pointed_to = (input_norm, conv_weight, a_log, dt_bias, rings)
        self._heads = states.data.shape[1], states.data.shape[3]
        no_pages = torch.empty(0, 0, dtype=torch.int32)
        self._layer = _Layer(
            in_proj.layer_ptr, input_norm.data_ptr(), conv_weight.data_ptr(), a_log.data_ptr(), dt_bias.data_ptr(),
            rings.data_ptr(), conv_weight.shape[0], rings.shape[1], dispatch.DTYPE_CODES[rings.dtype], eps,
            shape_of(GATED_DELTANET, states, records.keys.shape[1]), states_of(states), records_of(records, no_pages),
        )  # fmt: skip
        self.seconds = self._layer.seconds
        self.layer_ptr = ctypes.addressof(self._layer)
        self._kernel = kernel("kvb_gated_delta_heads", *[c_void_p] * 6)

    @staticmethod
    def covers(in_proj: Linear, states: StatePool, records: RecordPages) -> bool:
        """Return whether the kernels compute such a layer."""
        chosen = dispatch.backend_for(GATED_DELTANET, None, states, records)
        return chosen is backend and in_proj.layer_ptr is not None

    def __call__(self, x: Tensor | None, residual: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """Compute a batch of N tokens; states, records and rings move on.

        Args:
            x: [N, hidden] float32, contiguous, or None to add nothing.
            residual: [N, hidden] float32, contiguous; ``x`` is added to it in place.
            inputs: the batch.

        Returns:
            The heads' outputs [N, HV, V] and the projections [N, C + HV * V + 2 * HV], float32.
        """
        projected = torch.empty(len(residual), self.in_proj.out_features)
        out = torch.empty(len(residual), *self._heads)
        self._kernel(
            self.layer_ptr, None if x is None else x.data_ptr(), residual.data_ptr(), ctypes.addressof(inputs.struct),
            projected.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out, projected
