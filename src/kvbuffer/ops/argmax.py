"""The largest logit of each row."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from kvbuffer.ops import dispatch
from kvbuffer.ops.cpu.arguments import kernel


def finite_argmax(rows: Tensor) -> Tensor:
    """Return for each row the lowest index among those of its largest element.

    Args:
        rows: [R, V] float32, V >= 1; elements of a row are adjacent.

    Returns:
        [R] int64; -1 where the largest is not a finite number, or the row holds NaN.
    """
    if dispatch.cpu_kernels() is None:
        largest, best = rows.max(1)
        # max() leaves open which of equals it names.
        best = torch.where(largest.isnan(), best, (rows == largest.unsqueeze(1)).int().argmax(1))
        return torch.where(largest.isfinite(), best, -1)
    best = torch.empty(len(rows), dtype=torch.int64)
    argmax = kernel("kvb_argmax", c_void_p, c_int64, c_int64, c_int64, c_void_p)
    argmax(rows.data_ptr(), rows.stride(0), *rows.shape, best.data_ptr())
    return best
