"""Which backend runs: the compiled CPU kernels, or portable PyTorch.

The choice is made once per process and can explain itself: ``kvbuffer info`` prints :func:`explain`, and the first
fall-back to portable PyTorch is logged once.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache

import torch

from kvbuffer.ops.cpu.build import library

logger = logging.getLogger(__name__)

#: Codes by which the C interface names an element type.
DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}


@cache
def cpu_kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None when portable PyTorch is to be used instead."""
    lib, detail = library()
    if lib is None:
        logger.warning("CPU kernels are off, using portable PyTorch, which is much slower: %s", detail)
    return lib


def explain() -> str:
    """Return one line that says which backend runs and why."""
    lib, detail = library()
    return f"cpu kernels: {detail}" if lib is not None else f"portable PyTorch: {detail}"
