"""An online suffix automaton: every substring of a growing text, with how often each has occurred.

A state stands for the substrings that end at the same places of the text; they are suffixes of one another, with
lengths from one more than the link's length up to the state's own. A transition appends a token, the link drops tokens
from the front until the substring has occurred elsewhere, too. A text of n tokens has at most 2n states and 3n
transitions, and appending a token takes O(1) amortised time (Blumer et al. 1985, "The smallest automaton recognizing
the subwords of a text"; used for drafting in Hu et al. 2024, "SAM Decoding", arXiv 2411.10666).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

ROOT = 0


class Match(NamedTuple):
    """A substring of an automaton's text.

    Attributes:
        state: one that stood for it when the match was made; it may have been split since.
        length: tokens of the substring.
    """

    state: int = ROOT
    length: int = 0


NO_MATCH = Match()


class SuffixAutomaton:
    """The substrings of a text.

    Args:
        max_context: longest substring that is matched. Counts are exact for substrings up to one token longer; this
            bounds the time that counting takes per token.

    Attributes:
        num_tokens: length of the text.
    """

    def __init__(self, max_context: int) -> None:
        self.max_context = max_context
        self.num_tokens = 0
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._count = [0]
        self._last = ROOT
        self._end = NO_MATCH

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self._append(token)
            self._end = self._step(self._end, token, self.max_context + 1)
            state = self._end.state
            while state != ROOT:
                self._count[state] += 1
                state = self._link[state]

    def _append(self, token: int) -> None:
        self.num_tokens += 1
        new = self._add_state({}, self.num_tokens, 0)
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._link[new] = ROOT if state < 0 else self._split(state, token)
        self._last = new

    def _split(self, state: int, token: int) -> int:
        """Return the state of just the substrings of ``state`` with ``token`` appended."""
        target = self._next[state][token]
        if self._length[target] == self._length[state] + 1:
            return target
        clone = self._add_state(self._next[target].copy(), self._length[state] + 1, self._count[target])
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _add_state(self, following: dict[int, int], length: int, count: int) -> int:
        self._next.append(following)
        self._link.append(ROOT)
        self._length.append(length)
        self._count.append(count)
        return len(self._link) - 1

    def repeat(self) -> Match:
        """Return the longest suffix of the text, up to ``max_context``, that also occurs before its end."""
        state, length = self._end
        while state != ROOT and self._count[state] == 1:
            state = self._link[state]
            length = self._length[state]
        return self._settle(state, min(length, self.max_context))

    def step(self, match: Match, token: int) -> Match:
        """Return the longest suffix of a match with ``token`` appended, to ``max_context``, that has been followed."""
        state, length = self._step(match, token, self.max_context)
        if state == self._last and state != ROOT:
            # All of it occurs only at the end of the text.
            state = self._link[state]
            length = self._length[state]
        return self._settle(state, min(length, self.max_context))

    def _step(self, match: Match, token: int, longest: int) -> Match:
        state, length = self._settle(*match)
        while state >= 0 and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state]
        if state < 0:
            return NO_MATCH
        return self._settle(self._next[state][token], min(length + 1, longest))

    def _settle(self, state: int, length: int) -> Match:
        while state != ROOT and self._length[self._link[state]] >= length:
            state = self._link[state]
        return Match(state, length)

    def followers(self, match: Match) -> dict[int, int]:
        """Return the tokens that have followed a match, and how often each has."""
        state, _ = self._settle(*match)
        return {token: self._count[target] for token, target in self._next[state].items()}
