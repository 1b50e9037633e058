"""Memory for what is streamed: tensors as torch.empty makes them, large ones in huge pages."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from kvbuffer.ops import memory

HUGE_PAGE = 2 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (3, 1000, 1000)], ids=str)
def test_a_tensor_of_its_own(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = memory.empty(*shape, dtype=dtype), memory.empty(*shape, dtype=dtype)
    assert (first.shape, first.dtype, first.is_contiguous()) == (shape, dtype, True)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert (second == 2).all()


def test_lives_as_long_as_a_view_of_it() -> None:
    view = memory.empty(2 * HUGE_PAGE, dtype=torch.uint8).fill_(7)[-5:]
    gc.collect()
    assert view.tolist() == [7] * 5


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="no transparent huge pages")
def test_large_tensors_ask_for_huge_pages_from_their_first_byte() -> None:
    x = memory.empty(3 * HUGE_PAGE + 5, dtype=torch.uint8)
    assert x.data_ptr() % HUGE_PAGE == 0
    areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    own = next(area for area in areas if area.startswith(f"{x.data_ptr():x}-"))
    assert " hg" in next(line for line in own.splitlines() if line.startswith("VmFlags"))
