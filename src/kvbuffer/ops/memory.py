"""Memory for what every step streams through: weights, states, pages."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

_HUGE_PAGE = 2 << 20


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return an uninitialised tensor, on the CPU in huge pages where the system has them.

    Streaming through pages of 4 KB, which is what the allocator has, loses bandwidth to page walks, most of all on a
    virtual machine, whose walks are nested. As with :func:`torch.empty`, memory is taken when it is first written.
    Tensors smaller than a huge page come from the allocator.

    Args:
        shape: of the tensor.
        dtype: of its elements.
        device: where it lies.
    """
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    if torch.device(device).type != "cpu" or num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    mapping = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        # Whole ones only, so that the tensor's end takes no more memory than it needs.
        mapping.madvise(mmap.MADV_HUGEPAGE, start, num_bytes // _HUGE_PAGE * _HUGE_PAGE)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start).view(shape)
