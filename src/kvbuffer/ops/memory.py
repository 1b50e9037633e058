"""Memory for what every step streams through: weights, states, pages."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from functools import cache

import torch

HUGE_PAGE = 2 << 20
#: Whether tensors may be larger than what is ever written of them, and give back what is not needed any more.
ELASTIC = sys.platform == "linux"
_MADV_POPULATE_WRITE = 23  # Python's mmap has no name for it


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
    if torch.device(device).type != "cpu" or num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        # Whole ones only, so that the tensor's end takes no more memory than it needs.
        mapping.madvise(mmap.MADV_HUGEPAGE, start, num_bytes // HUGE_PAGE * HUGE_PAGE)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start).view(shape)


def release(x: torch.Tensor) -> None:
    """Give the memory behind a contiguous part of a tensor back to the system, in whole pages; its contents are lost.

    What is written there next takes memory again.
    """
    _madvise(x, mmap.MADV_DONTNEED, whole_pages=True)


def populate(x: torch.Tensor) -> bool:
    """Take memory from the system for a contiguous part of a tensor; its contents stay.

    Returns:
        Whether the system can do that: Linux since 5.14.
    """
    return ELASTIC and _madvise(x, _MADV_POPULATE_WRITE)


def use_small_pages(x: torch.Tensor) -> None:
    """Let a contiguous tensor take further memory in pages of 4 KB."""
    _madvise(x, mmap.MADV_NOHUGEPAGE)


def _madvise(x: torch.Tensor, advice: int, *, whole_pages: bool = False) -> bool:
    begin, end = x.data_ptr(), x.data_ptr() + x.nbytes
    first = (begin + mmap.PAGESIZE - 1 if whole_pages else begin) // mmap.PAGESIZE * mmap.PAGESIZE
    length = (end // mmap.PAGESIZE * mmap.PAGESIZE if whole_pages else end) - first
    return length <= 0 or bool(_libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice) == 0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
