"""The automaton agrees with looking for substrings one by one, at every prefix of texts that repeat themselves."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbuffer.engine.speculative.suffix_automaton import NO_MATCH, SuffixAutomaton

# Few tokens, so that substrings recur; stretches of one token, so that they overlap themselves.
TEXTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=12).map(
    lambda runs: [token for token, length in runs for _ in range(length)]
)
CONTEXTS = st.sampled_from([1, 2, 3, 7, 100])


def followers(text: list[int], context: list[int]) -> dict[int, int]:
    """What followed each occurrence of ``context``."""
    size = len(context)
    ends = [end for end in range(size, len(text)) if text[end - size : end] == context]
    return dict(Counter(text[end] for end in ends))


def longest_suffix(text: list[int], other: list[int], limit: int) -> int:
    """Length of the longest suffix of ``other``, up to ``limit``, that occurs in ``text``; 0 if there is none."""
    joined = [text[i : i + n] for n in range(limit + 1) for i in range(len(text) - n + 1)]
    return max(n for n in range(min(limit, len(other)) + 1) if other[len(other) - n :] in joined)


@given(TEXTS, CONTEXTS)
def test_the_repeat_and_what_followed_it(text: list[int], max_context: int) -> None:
    automaton = SuffixAutomaton(max_context)
    for end, token in enumerate(text, 1):
        automaton.extend([token])
        known, repeat = text[:end], automaton.repeat()
        assert repeat.length == longest_suffix(known[:-1], known, max_context)
        assert automaton.followers(repeat) == followers(known, known[end - repeat.length :])


@given(TEXTS, TEXTS, st.data())
def test_a_text_is_matched_against_another_that_grows(text: list[int], other: list[int], data: st.DataObject) -> None:
    """The states that a match refers to are split under it."""
    max_context = data.draw(CONTEXTS)
    automaton, match, known = SuffixAutomaton(max_context), NO_MATCH, 0
    for end, token in enumerate(other, 1):
        added = data.draw(st.integers(0, len(text) - known))
        automaton.extend(text[known : known + added])
        known += added
        # A match does not lengthen by itself when the text grows, so it need not be the longest.
        match = automaton.step(match, token)
        assert match.length <= longest_suffix(text[: known - 1], other[:end], max_context)
        assert automaton.followers(match) == followers(text[:known], other[end - match.length : end])


@given(TEXTS, TEXTS, CONTEXTS)
def test_a_text_is_matched_against_another(text: list[int], other: list[int], max_context: int) -> None:
    automaton, match = SuffixAutomaton(max_context), NO_MATCH
    automaton.extend(text)
    for end, token in enumerate(other, 1):
        match = automaton.step(match, token)
        assert match.length == longest_suffix(text[:-1], other[:end], max_context)


@given(TEXTS, st.lists(st.integers(0, 3), max_size=9), st.integers(1, 4))
def test_counts_along_a_continuation(text: list[int], draft: list[int], max_context: int) -> None:
    """Walking on from a repeat, the context's first tokens are dropped so that counts stay exact."""
    automaton = SuffixAutomaton(max_context)
    automaton.extend(text)
    match, walked = automaton.repeat(), list(text)
    for token in draft:
        if token not in automaton.followers(match):
            break
        match = automaton.step(match, token)
        walked.append(token)
        assert automaton.followers(match) == followers(text, walked[len(walked) - match.length :])


def test_the_empty_text() -> None:
    automaton = SuffixAutomaton(4)
    assert automaton.repeat() == NO_MATCH
    assert automaton.followers(NO_MATCH) == {}
    assert automaton.step(NO_MATCH, 3) == NO_MATCH


@pytest.mark.parametrize("period", [1, 3, 1 << 30], ids=["one token", "a loop", "no repeats"])
def test_appending_takes_constant_time(period: int) -> None:
    """Texts that loop are where counting every repeated substring would take quadratic time."""

    def seconds(length: int) -> float:
        automaton = SuffixAutomaton(16)
        began = time.process_time()
        automaton.extend(i % period for i in range(length))
        return time.process_time() - began

    short = min(seconds(2_000) for _ in range(3))
    assert seconds(16_000) < 3 * 8 * short
