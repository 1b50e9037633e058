"""The parts of a chat's answer, told apart as it comes: what the model thought, what it says, what it calls."""

from __future__ import annotations

from typing import NamedTuple

from kvbuffer.server.tools import Call, CallReader, Toolbox, overlap
from kvbuffer.tokenizer import END_OF_THINKING


class Piece(NamedTuple):
    """What more of an answer has brought.

    Attributes:
        reasoning: thoughts.
        content: text.
        calls: of tools.
    """

    reasoning: str
    content: str
    calls: list[Call]


class AnswerReader:
    """Reads one answer.

    Args:
        is_thinking: whether the answer begins with thoughts, up to ``</think>``.
        tools: the functions on offer, or None.
    """

    def __init__(self, is_thinking: bool, tools: Toolbox | None) -> None:
        self._is_thinking = self._at_start = is_thinking
        self._calls = None if tools is None else CallReader(tools)
        self._pending = ""

    @property
    def num_calls(self) -> int:
        """Calls so far."""
        return 0 if self._calls is None else self._calls.num_calls

    def read(self, text: str, last: bool) -> Piece:
        """Return what more of the answer, perhaps its end, has brought."""
        thoughts = ""
        if self._is_thinking:
            thoughts, text = self._think(self._pending + text, last)
        if self._at_start and not self._is_thinking:
            text = text.lstrip("\n")  # sets the answer apart from the thoughts
            self._at_start = not text
        if self._calls is None:
            return Piece(thoughts, text, [])
        return Piece(thoughts, *self._calls.read(text, last))

    def _think(self, text: str, last: bool) -> tuple[str, str]:
        """Return thoughts, and what comes after them."""
        thoughts, end, rest = text.partition(END_OF_THINKING)
        if end:
            self._is_thinking = False
            return thoughts, rest
        cut = len(text) - (0 if last else overlap(text, END_OF_THINKING))
        self._pending = text[cut:]
        return text[:cut], ""
