"""The memory of running requests: taken, grown, folded, shared with cached prefixes, and given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from kvbuffer.cache.admission import Admission, Need
from kvbuffer.cache.allocator import BlockAllocator
from kvbuffer.cache.plan import PROMPT_TAIL, RECORD_PAGE_SIZE, RING_SLACK, MemoryPlan, attention_pages, record_pages
from kvbuffer.cache.pools import MEMORY, Blocks, Counts, PoolKind, Pools
from kvbuffer.cache.prefix import Origin, PrefixCache, PrefixMatch
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.cache.tables import RequestTables
from kvbuffer.cache.work import Compact, Copy, Fold, Work
from kvbuffer.ops.attention import PAGE_SIZE

NO_MATCH = PrefixMatch(0, (), None, None, 0, 0)


class RequestMemory(RequestTables):
    """Hands out blocks by the plan and shares them with cached prefixes.

    What a prefix shares is only read: a fold goes to a new slot, and a page that is shared in part is copied before it
    is appended to. What has to be done to the memory itself is noted in :attr:`work`, in order, for whoever owns the
    tensors to do before the next step.

    Args:
        plan: the budget and the sizes of the pools.
        prefix_caching: keep the memory of prefixes that requests leave behind.

    Attributes:
        prefixes: what is kept of earlier requests; None without prefix caching.
        work: what is still to be done to the memory itself.
        on_admit: called with a prompt, its salt and how many of its tokens are cached, before a request is admitted;
            says whether it has brought more of them.
    """

    def __init__(self, plan: MemoryPlan, prefix_caching: bool = True) -> None:
        pools = Pools.make(plan.pool_sizes, plan.block_bytes, plan.budget)
        self.prefixes = PrefixCache(pools) if prefix_caching else None
        super().__init__(plan, pools, BlockAllocator(pools, self.prefixes))
        self.work: list[Work] = []
        self.on_admit: Callable[[Sequence[int], str | None, int], bool] | None = None
        self._needs_slot = [False] * plan.max_num_seqs

    def admit(
        self, token_ids: Sequence[int], salt: str | None = None, max_len: int = 0, *, reuse: bool = True
    ) -> Admission | str:
        """Take memory for a request, reusing the longest cached prefix.

        Enough is taken for the computation of all its tokens, so that a prompt never stops half-way for want of memory:
        attention pages, a state if the tokens are too many for records alone, pages for the records they leave. A state
        that it will need later, when its records outgrow their buffer, is not taken yet, but must be there besides
        those of the requests that run.

        Args:
            token_ids: all known tokens, at least one.
            salt: only prefixes that were computed under the same salt are reused.
            max_len: tokens that it may come to have.
            reuse: whether what is cached of them may be used.

        Returns:
            The name of what there is too little of, if there is, and nothing changed.
        """
        num_tokens = len(token_ids)
        if not self.rows.num_free:
            return "--max-num-seqs"
        match = NO_MATCH
        if self.prefixes is not None and reuse:
            match = self.prefixes.match(token_ids, salt, num_tokens - 1)
            if self.on_admit is not None and self.on_admit(token_ids, salt, match.num_tokens):
                match = self.prefixes.match(token_ids, salt, num_tokens - 1)
        need = self._need(match, num_tokens, max_len)
        short = self._shortage_beside(match, need)
        if short is not None and match.stored is not None and not self.rows.num_used:
            # Alone it fits, if need be without what was cached of it.
            match = match._replace(num_tokens=0, attention_pages=(), partial_page=None, stored=None)
            need = self._need(match, num_tokens, max_len)
            short = self._shortage_beside(match, need)
        if short is not None:
            return self.admit(token_ids, salt, max_len, reuse=reuse) if self._fold_longest(short) else short
        if self.prefixes is not None:
            self.prefixes.acquire(match)
        row = self.rows.take(1)[0]
        self.slot[row], self.fill[row], self._num_record_pages[row] = -1, 0, 0
        self._needs_slot[row] = need.slot_later
        (self.ring[row],) = self._allocator.take("rings", 1)
        pages = [*match.attention_pages, *self._allocator.take("attention_pages", need.attention_pages)]
        self.attention_table[row, : len(pages)] = pages
        self._num_attention_pages[row] = len(pages)
        if match.partial_page is not None:
            self.work.append(Copy("attention_pages", match.partial_page, pages[len(match.attention_pages)]))
            self.pools.give_back(Blocks(attention_pages=(match.partial_page,)))
        if match.snapshot is not None:
            self._resume(row, match.snapshot, match.num_tokens - match.snapshot.checkpoint)
        if need.slot and not self.own_state(row):
            raise RuntimeError("no state slot, though one was free")
        self._take_record_pages(row, need.records)
        return Admission(row, match)

    def _need(self, match: PrefixMatch, num_tokens: int, max_len: int) -> Need:
        """Return what a request of so many known tokens takes beside a match."""
        slot = None if match.snapshot is None else match.snapshot.slot
        # A state that only the cache shares is given up by it when there is no other.
        owns = slot is not None and not self._allocator.num_holders("slots", slot)
        return Need.of(self.plan, match, num_tokens, max_len, owns)

    def _shortage_beside(self, match: PrefixMatch, need: Need) -> str | None:
        """Return what there is too little of for a request, the states counted that it and others will need later."""
        # Record pages that only a request without a state has make room for it, all but one for the next record.
        own = [self._num_own_pages(row) for row in np.flatnonzero(self._needs_slot).tolist()]
        own += [need.record_pages] * need.slot_later
        each, slots = self.plan.block_bytes, self.pools.slots
        reserved = sum(max(0, each.slot - max(0, pages - 1) * each.record_page) for pages in own)
        self.pools.share(match.blocks)  # so that they do not count as evictable
        wanted = Counts(need.slot, need.record_pages, 1, need.attention_pages)
        short = self._allocator.shortage(wanted, reserved)
        if short is None and need.slot + len(own) > slots.num_free + slots.num_idle:
            short = slots.name
        self.pools.give_back(match.blocks)
        return short

    def _resume(self, row: int, snapshot: Snapshot, fill: int) -> None:
        """Give a row the memory of a snapshot that it has references to."""
        self.work.append(Copy("rings", snapshot.ring, int(self.ring[row])))
        used = record_pages(fill)
        pages = list(snapshot.record_pages[:used])
        self.pools.give_back(Blocks(record_pages=snapshot.record_pages[used:], rings=(snapshot.ring,)))
        self.slot[row] = -1 if snapshot.slot is None else snapshot.slot
        self.fill[row] = fill
        if fill % RECORD_PAGE_SIZE:
            # The request will append to this page, whose other half may be someone else's.
            (page,) = self._allocator.take("record_pages", 1)
            self.work.append(Copy("record_pages", pages[-1], page))
            self.pools.give_back(Blocks(record_pages=(pages[-1],)))
            pages[-1] = page
        self.record_table[row, :used] = pages
        self._num_record_pages[row] = used

    def take_blocks(self, counts: Counts) -> Blocks | None:
        """Take blocks for a prefix that comes from elsewhere; None, and nothing changed, if there are too few."""
        return self._allocator.take_all(counts)

    def num_cached_tokens(self, token_ids: Sequence[int], salt: str | None) -> int:
        """Return how many tokens of a prompt would not have to be computed."""
        return 0 if self.prefixes is None else self.prefixes.match(token_ids, salt, len(token_ids) - 1).num_tokens

    def extend(self, row: int, num_tokens: int, num_records: int) -> bool:
        """Let a request have ``num_tokens`` tokens and ``num_records`` records in all.

        Returns:
            Whether there is memory for it; if not, nothing changed.
        """
        attention = attention_pages(num_tokens) - self._num_attention_pages[row]
        records = record_pages(num_records) - self._num_record_pages[row]
        attention, records = max(0, attention), max(0, records)
        if (attention or records) and not self._allocator.can_take(attention_pages=attention, record_pages=records):
            return False
        if attention:
            self._take_attention_pages(row, attention)
        self._take_record_pages(row, num_records)
        return True

    def own_state(self, row: int) -> bool:
        """Fold all of a request's records into a state that no one else holds.

        Returns:
            Whether there is a slot for it; if not, nothing changed.
        """
        slot, fill = int(self.slot[row]), int(self.fill[row])
        pages = tuple(self.record_table[row, : record_pages(fill)].tolist())
        freed = self._num_own_pages(row) if fill else 0
        shared = slot >= 0 and self.pools.slots.references(slot) > 1
        if shared and self.prefixes is not None and not self._allocator.can_take(slots=1, record_pages=-freed):
            self.prefixes.disown(slot)
            shared = self.pools.slots.references(slot) > 1
        target = slot
        if slot < 0 or shared:
            if not self._allocator.can_take(slots=1, record_pages=-freed):
                return False
            if fill:
                self._drop_record_pages(row)  # the fold that reads them is done before what takes them writes
            (target,) = self._allocator.take("slots", 1)
        if fill or (slot >= 0 and target != slot):
            self.work.append(Fold(slot, target, pages, fill))
        if slot >= 0 and target != slot:
            self.pools.slots.give_back([slot])
        self.slot[row], self.fill[row], self._needs_slot[row] = target, 0, False
        if fill:  # empty pages were taken in advance, for the end of a prompt
            self._drop_record_pages(row)
        return True

    def _fold_longest(self, short: str) -> bool:
        """Give a state to the request with the most records that decodes without one, to have its pages back.

        Args:
            short: what there is too little of.

        Returns:
            Whether there was such a request, and that made room.
        """
        used = np.array(self._num_record_pages)
        # A prompt has pages for all of its tokens; a request that decodes, for no more than the next.
        decoding = (self.slot < 0) & (used > 1) & (used * RECORD_PAGE_SIZE <= self.fill + RECORD_PAGE_SIZE)
        row = int(np.argmax(np.where(decoding, used, 0)))
        smaller = self.plan.block_bytes.slot < (self._num_own_pages(row) - 1) * self.plan.block_bytes.record_page
        if not decoding[row] or not (short == self.pools.record_pages.name or (short == MEMORY and smaller)):
            return False
        if not self.own_state(row):
            return False
        self._take_record_pages(row, 1)
        return True

    def folded(self, row: int) -> None:
        """Note that a decode step has folded a request's records in place, and appended one."""
        self.fill[row], self._needs_slot[row] = 1, False
        self._drop_record_pages(row, keep=1)

    def keep_ring(self, row: int) -> bool:
        """Take a ring for the convolutions' inputs before the last tokens of a prompt.

        The step that computes those leaves them there; :meth:`publish` hands them on.

        Returns:
            Whether there is one, and prefixes are cached at all.
        """
        if self.prefixes is not None and self.kept_ring[row] < 0 and self._allocator.can_take(rings=1):
            (self.kept_ring[row],) = self._allocator.take("rings", 1)
        return bool(self.kept_ring[row] >= 0)

    def accept(self, row: int, num_tokens: int, accepted: Sequence[int]) -> None:
        """Keep what the accepted tokens of a draft have left, and give back the pages that only rejected ones needed.

        Args:
            row: the request's row.
            num_tokens: tokens before the draft.
            accepted: which of the draft's tokens are accepted, ascending.
        """
        if any(place != index for index, place in enumerate(accepted)):
            self.work.append(self._compact(row, num_tokens, tuple(accepted)))
        self.fill[row] += len(accepted)
        num_tokens += len(accepted)
        self._drop_record_pages(row, keep=record_pages(int(self.fill[row])))
        self._drop_attention_pages(row, keep=attention_pages(num_tokens))

    def _compact(self, row: int, num_tokens: int, accepted: tuple[int, ...]) -> Compact:
        fill = int(self.fill[row])
        first_record, first_attention = fill // RECORD_PAGE_SIZE, num_tokens // PAGE_SIZE
        end = accepted[-1] + 1
        return Compact(
            fill=fill % RECORD_PAGE_SIZE,
            record_pages=tuple(self.record_table[row, first_record : record_pages(fill + end)].tolist()),
            num_tokens=num_tokens,
            attention_pages=tuple(
                self.attention_table[row, first_attention : attention_pages(num_tokens + end)].tolist()
            ),
            ring=int(self.ring[row]),
            accepted=accepted,
        )

    def publish(self, row: int, token_ids: Sequence[int], salt: str | None = None, origin: Origin = "prompt") -> None:
        """Offer a request's memory to later requests with the same beginning.

        At the end of its prompt also what it was PROMPT_TAIL tokens before, if :meth:`keep_ring` found room for that.

        Args:
            row: the request's row.
            token_ids: its computed tokens.
            salt: what the prefix is to be kept under.
            origin: where in the request's life; after its ``"output"`` it releases its memory.
        """
        if self.prefixes is None or not len(token_ids):
            return
        checkpoint, ring, kept = len(token_ids) - int(self.fill[row]), int(self.ring[row]), int(self.kept_ring[row])
        if origin == "prompt" and kept >= 0:
            self._insert(row, token_ids[:-PROMPT_TAIL], salt, "tail", checkpoint, kept)
            self.pools.rings.give_back([kept])
            self.kept_ring[row] = -1
        if origin == "output":
            self._insert(row, token_ids, salt, origin, checkpoint, ring)
        elif self._allocator.can_take(rings=1):
            (copy,) = self._allocator.take("rings", 1)
            self.work.append(Copy("rings", ring, copy))
            self._insert(row, token_ids, salt, origin, checkpoint, copy)
            self.pools.rings.give_back([copy])

    def _insert(
        self, row: int, token_ids: Sequence[int], salt: str | None, origin: Origin, checkpoint: int, ring: int
    ) -> None:
        """Publish a request's memory of these tokens, its convolutions' inputs being in ``ring``."""
        end, slot = len(token_ids), int(self.slot[row])
        # Taps reach back to inputs that the ring must still hold, unless it holds all there are.
        earliest = end - RING_SLACK if end > self.plan.ring_len - self.plan.num_draft_tokens else 0
        snapshot = Snapshot(
            start=max(checkpoint, earliest),
            end=end,
            checkpoint=checkpoint,
            slot=None if slot < 0 else slot,
            record_pages=tuple(self.record_table[row, : record_pages(end - checkpoint)].tolist()),
            ring=ring,
        )
        assert self.prefixes is not None
        pages = self.attention_table[row, : attention_pages(end)].tolist()
        self.prefixes.insert(token_ids, salt, pages, snapshot, origin)

    def pin(self, token_ids: Sequence[int], salt: str | None, seconds: float) -> None:
        """Keep a published prefix for some time, within the share of memory that may be kept so."""
        if self.prefixes is not None:
            self.prefixes.pin(token_ids, salt, time.monotonic() + seconds)

    def release(self, row: int) -> None:
        """Free everything that a request holds; what has been published stays."""
        super().release(row)
        self._needs_slot[row] = False

    def num_in_use(self, kind: PoolKind) -> int:
        """Return how many blocks of a kind requests hold; a block that prefixes or pins hold alone is not in use."""
        return self._allocator.num_in_use(kind)

    def check_integrity(self) -> None:
        """Check what :meth:`RequestTables.check_integrity` does, and the prefix cache."""
        if self.prefixes is not None:
            self.prefixes.check_integrity()
        super().check_integrity()
