"""What a request that is let in takes."""

from __future__ import annotations

from typing import NamedTuple

from kvbuffer.cache.plan import BUFFER_SLACK, PROMPT_TAIL, RECORD_PAGE_SIZE, MemoryPlan, attention_pages, record_pages
from kvbuffer.cache.prefix import PrefixMatch


class Admission(NamedTuple):
    """A request that has got memory.

    Attributes:
        row: where it is in the tables.
        match: what was cached of its text.
    """

    row: int
    match: PrefixMatch


class Need(NamedTuple):
    """What a request takes beside what is cached of it.

    Attributes:
        slot: whether it takes a state now.
        slot_later: whether it will come to need one, beyond any it shares now.
        records: records that its buffer comes to hold while its known tokens are computed.
        record_pages: pages for them, those that it shares left out.
        attention_pages: likewise.
    """

    slot: bool
    slot_later: bool
    records: int
    record_pages: int
    attention_pages: int

    @classmethod
    def of(cls, plan: MemoryPlan, match: PrefixMatch, num_tokens: int, max_len: int, owns_slot: bool) -> Need:
        """Return what a request takes.

        Args:
            plan: says from how many tokens on there is a state.
            match: what is cached.
            num_tokens: tokens that are known.
            max_len: tokens that it may come to have.
            owns_slot: whether no request but this one would hold the state in the match.
        """
        snapshot, checkpoint = match.snapshot, 0 if match.snapshot is None else match.snapshot.checkpoint
        fill = match.num_tokens - checkpoint
        records, kept_pages = num_tokens - checkpoint, fill // RECORD_PAGE_SIZE
        if snapshot is None or snapshot.slot is None:
            slot = plan.starts_with_state(num_tokens)
        else:
            slot = records > plan.buffer_len + BUFFER_SLACK
        if slot:
            records, kept_pages = min(records, PROMPT_TAIL), 0
        return cls(
            slot=slot,
            slot_later=not (slot or owns_slot) and max_len - checkpoint > plan.max_records,
            records=records,
            record_pages=record_pages(records) - kept_pages,
            attention_pages=attention_pages(num_tokens) - len(match.attention_pages),
        )
