"""Which blocks each running request has."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from kvbuffer.cache.allocator import BlockAllocator
from kvbuffer.cache.plan import MemoryPlan, attention_pages, record_pages
from kvbuffer.cache.pool import BlockPool
from kvbuffer.cache.pools import POOL_KINDS, Blocks, Pools


class RequestTables:
    """A row for each running request, ready to be gathered into a batch.

    A request's state covers the tokens that its records do not; without a slot (KV only) the records cover all.

    Args:
        plan: the budget, and the longest request and buffer.
        pools: what the blocks are of.
        allocator: takes them.

    Attributes:
        plan: the budget, and the longest request and buffer.
        pools: the blocks.
        rows: one per running request.
        slot: [max_num_seqs] int32, state slots; -1 for none.
        ring: [max_num_seqs] int32, rings.
        kept_ring: [max_num_seqs] int32, rings that keep the convolutions' inputs before the last tokens of a prompt,
            until it is published; -1 for none.
        fill: [max_num_seqs] int32, records in each buffer.
        record_table: [max_num_seqs, record pages of the longest buffer] int32.
        attention_table: [max_num_seqs, pages of the longest request] int32.
    """

    def __init__(self, plan: MemoryPlan, pools: Pools, allocator: BlockAllocator) -> None:
        self.plan, self.pools, self._allocator = plan, pools, allocator
        seqs = plan.max_num_seqs
        self.rows = BlockPool(seqs, "rows")
        self.slot: npt.NDArray[np.int32] = np.full(seqs, -1, np.int32)
        self.ring: npt.NDArray[np.int32] = np.zeros(seqs, np.int32)
        self.kept_ring: npt.NDArray[np.int32] = np.full(seqs, -1, np.int32)
        self.fill: npt.NDArray[np.int32] = np.zeros(seqs, np.int32)
        self.record_table: npt.NDArray[np.int32] = np.zeros((seqs, record_pages(plan.max_records)), np.int32)
        self.attention_table: npt.NDArray[np.int32] = np.zeros((seqs, attention_pages(plan.max_model_len)), np.int32)
        self._num_record_pages = [0] * seqs
        self._num_attention_pages = [0] * seqs

    def release(self, row: int) -> None:
        """Free everything that a request holds; what has been published stays."""
        self.pools.give_back(self._blocks(row))
        self.slot[row], self.kept_ring[row], self.fill[row] = -1, -1, 0
        self._num_attention_pages[row] = self._num_record_pages[row] = 0
        self.rows.give_back([row])

    def folds_in_place(self, row: int) -> bool:
        """Return whether a decode step may fold a request's records into its own state and go on in its own pages."""
        slot, first_page = int(self.slot[row]), int(self.record_table[row, 0])
        return slot >= 0 and self.pools.slots.references(slot) == self.pools.record_pages.references(first_page) == 1

    def _take_record_pages(self, row: int, num_records: int) -> None:
        have, need = self._num_record_pages[row], record_pages(num_records)
        if need > have:
            self.record_table[row, have:need] = self._allocator.take("record_pages", need - have)
            self._num_record_pages[row] = need

    def _drop_record_pages(self, row: int, keep: int = 0) -> None:
        dropped = self.record_table[row, keep : self._num_record_pages[row]].tolist()
        self.pools.record_pages.give_back(dropped)
        self._num_record_pages[row] = min(keep, self._num_record_pages[row])

    def _num_own_pages(self, row: int) -> int:
        """Return how many record pages of a request no other holds."""
        pages = self.record_table[row, : self._num_record_pages[row]].tolist()
        return sum(self._allocator.num_holders("record_pages", page) == 1 for page in pages)

    def _take_attention_pages(self, row: int, count: int) -> None:
        have = self._num_attention_pages[row]
        self.attention_table[row, have : have + count] = self._allocator.take("attention_pages", count)
        self._num_attention_pages[row] += count

    def _drop_attention_pages(self, row: int, keep: int) -> None:
        dropped = self.attention_table[row, keep : self._num_attention_pages[row]].tolist()
        self.pools.attention_pages.give_back(dropped)
        self._num_attention_pages[row] = keep

    def _blocks(self, row: int) -> Blocks:
        slot, kept = int(self.slot[row]), int(self.kept_ring[row])
        return Blocks(
            slots=() if slot < 0 else (slot,),
            record_pages=tuple(self.record_table[row, : self._num_record_pages[row]].tolist()),
            rings=(int(self.ring[row]), *(() if kept < 0 else (kept,))),
            attention_pages=tuple(self.attention_table[row, : self._num_attention_pages[row]].tolist()),
        )

    def check_integrity(self) -> None:
        """Check that no block is lost, and that every one is held by just the requests and prefixes that name it.

        Raises:
            RuntimeError: the books do not balance.
        """
        self.rows.check_integrity()
        held = [self._blocks(row) for row in range(self.rows.size) if self.rows.references(row)]
        for index, kind in enumerate(POOL_KINDS):
            pool = self.pools.by_kind(kind)
            pool.check_integrity()
            counts = Counter(block for blocks in held for block in blocks[index]) + self._allocator.pinned(kind)
            for block in range(pool.num_taken):
                if self._allocator.num_holders(kind, block) != counts[block]:
                    raise RuntimeError(f"{pool.name} {block} is not held by just the requests that name it")
