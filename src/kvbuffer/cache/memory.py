"""Where each running request's memory lies: its state slot, its record pages, its attention pages."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvbuffer.cache.plan import MemoryPlan, attention_pages
from kvbuffer.cache.pool import BlockPool


class RequestMemory:
    """Hands out slots and pages by the plan; page tables are rows of arrays, ready to be gathered into a batch.

    Attributes:
        attention_table: [num_slots, pages of the longest request] int32.
        record_table: [num_slots, record pages per slot] int32.
        fill: [num_slots] int32, records in each slot's buffer.
    """

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.slots = BlockPool(plan.num_slots, "state slots")
        self.record_pages = BlockPool(plan.num_record_pages, "record pages")
        self.attention_pages = BlockPool(plan.num_attention_pages, "attention pages")
        self.attention_table: npt.NDArray[np.int32] = np.zeros(
            (plan.num_slots, attention_pages(plan.max_model_len)), np.int32
        )
        self.record_table: npt.NDArray[np.int32] = np.zeros((plan.num_slots, plan.record_pages_per_slot), np.int32)
        self.fill: npt.NDArray[np.int32] = np.zeros(plan.num_slots, np.int32)
        self._num_pages = [0] * plan.num_slots

    def can_admit(self, tokens: int) -> bool:
        """Return whether a request that is about to compute ``tokens`` tokens can start. Changes nothing."""
        return self.slots.num_free > 0 and attention_pages(tokens) <= self.attention_pages.num_free

    def admit(self, tokens: int) -> int:
        """Take a slot, an empty buffer, and attention pages for ``tokens`` tokens; return the slot."""
        slot = self.slots.take(1)[0]
        self.record_table[slot] = self.record_pages.take(self.plan.record_pages_per_slot)
        self.fill[slot] = 0
        self.grow(slot, tokens)
        return slot

    def can_grow(self, slot: int, tokens: int) -> bool:
        """Return whether the request in ``slot`` can have attention pages for ``tokens`` tokens. Changes nothing."""
        return attention_pages(tokens) - self._num_pages[slot] <= self.attention_pages.num_free

    def grow(self, slot: int, tokens: int) -> None:
        """Give the request in ``slot`` the attention pages it lacks for ``tokens`` tokens in all."""
        have, need = self._num_pages[slot], attention_pages(tokens)
        if need > have:
            self.attention_table[slot, have:need] = self.attention_pages.take(need - have)
            self._num_pages[slot] = need

    def release(self, slot: int) -> None:
        """Free everything that the request in ``slot`` holds."""
        self.attention_pages.give_back(self.attention_table[slot, : self._num_pages[slot]].tolist())
        self.record_pages.give_back(self.record_table[slot].tolist())
        self.slots.give_back([slot])
        self._num_pages[slot] = 0

    def check_integrity(self) -> None:
        """Check that no block is lost or held twice.

        Raises:
            RuntimeError: the books do not balance.
        """
        for pool in (self.slots, self.record_pages, self.attention_pages):
            pool.check_integrity()
        if self.attention_pages.num_used != sum(self._num_pages):
            raise RuntimeError("attention pages in use are not the ones that requests hold")
        if self.record_pages.num_used != self.slots.num_used * self.plan.record_pages_per_slot:
            raise RuntimeError("record pages in use are not the ones that requests hold")
