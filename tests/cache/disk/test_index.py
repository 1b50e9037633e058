"""A prompt finds the entry that serves the most of it. The oracle compares it with every entry, token by token."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvbuffer.cache.disk.entry import Head
from kvbuffer.cache.disk.index import DiskIndex, DiskMatch, Entry, encode_tokens
from tests.cache.disk.saved import geometry

#: Texts of few runs over two tokens: they share beginnings of all lengths, whole pages and parts of pages.
TEXTS = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 20)), min_size=1, max_size=4).map(
    lambda runs: [token for token, length in runs for _ in range(length)]
)
SALTS = st.sampled_from(["one", "two"])


class Saved:
    """An entry and what it was made from."""

    def __init__(self, number: int, salt: str, tokens: list[int], start: int, num_bytes: int) -> None:
        self.salt, self.tokens, self.start = salt, tokens, start
        head = Head("model", salt, geometry(start, len(tokens)), num_bytes, encode_tokens(tokens))
        self.entry = Entry(str(number), num_bytes, head)

    def serves(self, prompt: list[int], salt: str, max_tokens: int) -> int:
        """How many tokens of a prompt, the definition."""
        if salt != self.salt:
            return 0
        agreeing = 0
        for mine, theirs in zip(self.tokens, prompt[:max_tokens], strict=False):
            if mine != theirs:
                break
            agreeing += 1
        return agreeing if agreeing >= self.start else 0


@st.composite
def entries(draw: st.DrawFn) -> list[Saved]:
    saved = []
    for number in range(draw(st.integers(0, 8))):
        tokens = draw(TEXTS)
        start = draw(st.integers(0, len(tokens)) | st.just(len(tokens)))
        saved.append(Saved(number, draw(SALTS), tokens, start, draw(st.integers(1, 5))))
    return saved


@given(saved=entries(), prompt=TEXTS, salt=SALTS, max_tokens=st.integers(0, 90), gone=st.sets(st.integers(0, 7)))
def test_the_match_is_the_longest_and_of_the_longest_the_smallest(
    saved: list[Saved], prompt: list[int], salt: str, max_tokens: int, gone: set[int]
) -> None:
    index = DiskIndex()
    for one in saved:
        index.add(one.entry)
    for number, one in enumerate(saved):
        if number in gone:
            (index.retire if number % 2 else index.remove)(one.entry)
    left = [one for number, one in enumerate(saved) if number not in gone]

    match = index.match(prompt, salt, max_tokens)
    best = max((one.serves(prompt, salt, max_tokens) for one in left), default=0)
    if best == 0:
        assert match is None
        return
    equals = [one.entry for one in left if one.serves(prompt, salt, max_tokens) == best]
    assert match is not None
    assert match.num_tokens == best
    assert match.entry in equals
    assert match.num_bytes == match.entry.num_bytes == min(entry.num_bytes for entry in equals)
    assert match.geometry.start <= match.num_tokens <= match.geometry.end


@given(saved=entries(), touched=st.lists(st.integers(0, 7)), bound=st.integers(0, 30))
def test_eviction_goes_by_last_use(saved: list[Saved], touched: list[int], bound: int) -> None:
    index = DiskIndex()
    for one in saved:
        index.add(one.entry)
    order = [one.entry for one in saved]
    for number in touched:
        index.touch(str(number))
        if number < len(saved):
            order.remove(saved[number].entry)
            order.append(saved[number].entry)
    evicted = index.evict(bound)
    assert evicted == order[: len(evicted)]
    kept = order[len(evicted) :]
    assert index.num_bytes == sum(entry.num_bytes for entry in kept) <= bound
    assert not evicted or index.num_bytes + evicted[-1].num_bytes > bound
    assert len(index) == len(kept)


def test_an_emptied_index_holds_nothing() -> None:
    index = DiskIndex()
    for number in range(3):
        index.add(Saved(number, "one", [number] * 40, 5, 7).entry)
    index.evict(0)
    assert (len(index), index.num_bytes, index._nodes) == (0, 0, {})


def test_an_entry_takes_the_place_of_one_of_the_same_name() -> None:
    index = DiskIndex()
    old, new = (Saved(0, "one", [token] * 20, 3, size).entry for token, size in ((1, 7), (2, 9)))
    index.add(old)
    index.add(new)
    assert index.match([1] * 20, "one", 20) is None
    assert index.match([2] * 20, "one", 20) == DiskMatch(20, geometry(3, 20), 9, new, [2] * 20)
    assert (len(index), index.num_bytes) == (1, 9)


def test_what_is_not_to_be_matched_still_takes_room() -> None:
    index = DiskIndex()
    entry = Saved(0, "one", [1] * 20, 3, 7).entry
    index.add(entry)
    assert index.holds("0")
    index.retire(entry)
    assert not index.holds("0")
    assert index.match([1] * 20, "one", 20) is None
    assert index.num_bytes == 7
    assert index.evict(0) == [entry]
