"""Snapshots are left where texts branch, and elsewhere only in slots that nobody uses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbuffer.cache.prefix import PrefixMatch, checkpoint_positions


def match(num_tokens: int, branch: int) -> PrefixMatch:
    return PrefixMatch(num_tokens, (), None, None, branch, 10_000)


def test_where_the_text_leaves_what_is_cached() -> None:
    assert checkpoint_positions(match(100, 700), 1000, 0, chunk=512) == [700]
    assert checkpoint_positions(match(100, 700), 1000, 0, chunk=512, split=64) == [640]


def test_not_where_it_would_save_little_or_the_prompt_ends() -> None:
    assert checkpoint_positions(match(640, 700), 1000, 0, chunk=512) == []
    assert checkpoint_positions(match(100, 700), 700, 0, chunk=512) == []
    assert checkpoint_positions(match(0, 0), 1000, 0, chunk=512) == []


def test_at_borders_of_chunks_as_far_as_slots_are_free() -> None:
    assert checkpoint_positions(match(0, 0), 2049, 9, chunk=512) == [512, 1024, 1536, 2048]
    assert checkpoint_positions(match(0, 0), 2049, 2, chunk=512) == [1024, 2048]
    assert checkpoint_positions(match(1000, 1000), 2049, 9, chunk=512) == [1536, 2048]
    assert checkpoint_positions(match(0, 600), 2049, 1, chunk=512) == [600]
    assert checkpoint_positions(match(0, 1024), 2049, 2, chunk=512) == [1024, 2048]


@given(
    start=st.integers(0, 3000),
    known=st.integers(0, 3000),
    length=st.integers(1, 4000),
    free=st.integers(0, 20),
    chunk=st.integers(1, 700),
    split=st.sampled_from([1, 16, 64]),
)
def test_positions_are_ahead_can_be_stopped_at_and_only_the_branch_may_need_eviction(
    start: int, known: int, length: int, free: int, chunk: int, split: int
) -> None:
    found = match(start, start + known)
    positions = checkpoint_positions(found, length, free, chunk=chunk, split=split)
    assert positions == sorted(set(positions))
    assert all(start + 64 <= position < length and position % split == 0 for position in positions)
    assert len(positions) <= max(free, found.branch // split * split in positions)
