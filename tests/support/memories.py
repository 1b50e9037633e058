"""Memory of requests whose buffers are short, by numbers of blocks."""

from __future__ import annotations

from typing import Any

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import MemoryPlan
from tests.support.plans import sized_plan


def plan(slots: int = 4, pages: int = 20, **options: Any) -> MemoryPlan:
    """A plan of so many state slots and attention pages; no state up to 40 tokens."""
    return sized_plan(slots, pages, buffer_len=8, kv_only_len=40, **options)


def admit(memory: RequestMemory, tokens: list[int], max_len: int = 0) -> tuple[int, int]:
    """Admit a request; return its row, and how many of its tokens were cached."""
    admission = memory.admit(tokens, max_len=max_len)
    assert not isinstance(admission, str), admission
    return admission.row, admission.match.num_tokens
