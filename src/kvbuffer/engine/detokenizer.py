"""Turning a request's output tokens into text as they come, and finding stop strings in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvbuffer.engine.sampling_params import SamplingParams

_REPLACEMENT = "\ufffd"
#: Tokens kept as context when the window is cut: more than the bytes of two unfinished characters.
_KEPT_TOKENS = 8
#: A window this long is cut as soon as its text ends cleanly; at four times this length, regardless.
_LONG_WINDOW = 16
#: An unfinished UTF-8 character has at most 3 bytes, hence shows as at most 3 replacement characters.
_MAX_UNFINISHED = 3


class Decoder(Protocol):
    """The part of a tokenizer that detokenization needs.

    ``decode`` must not rewrite text across tokens (no clean-up of spaces): deltas could not add up to that.
    """

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of ``ids``, with U+FFFD for bytes that are not UTF-8."""
        ...

    def whole_text(self, token_id: int, skip_special_tokens: bool) -> str | None:
        """Return the text that a token adds after any text of whole characters; None if that depends on others."""
        ...


class IncrementalDetokenizer:
    """Turns one request's tokens into text deltas, cut at the first stop string.

    The deltas and the final :meth:`flush` add up to ``decode(all tokens)``, or to the part of it before (with
    ``include_stop_str_in_output``: through) the stop string that is complete first; of several complete at
    the same character, the longest. One that is complete within the first ``min_tokens`` does not count.

    Attributes:
        num_tokens: tokens consumed so far; after a stop, those up to the one that completed the stop string.
    """

    def __init__(self, tokenizer: Decoder, params: SamplingParams) -> None:
        self.num_tokens = 0
        self._min_tokens = params.min_tokens
        self._text = _TextStream(tokenizer, params.skip_special_tokens)
        self._stops = _StopStrings(params.stop, params.include_stop_str_in_output)

    def append(self, token_ids: Sequence[int]) -> tuple[str, str | None]:
        """Consume new output tokens, in order, up to a stop string.

        A stop token that shall not show in the text must not be passed.

        Returns:
            The new text that is certain, and the stop string that ended the text, or None.
        """
        deltas = []
        for token_id in token_ids:
            if self._stops.matched is not None:
                break
            self.num_tokens += 1
            text = self._text.append(token_id)
            deltas.append(self._stops.feed(text, search=self.num_tokens > self._min_tokens))
        return "".join(deltas), self._stops.matched

    def flush(self) -> str:
        """Return the text still held back, when no more tokens will come. After a stop string: nothing."""
        if self._stops.matched is not None:
            return ""
        text = self._stops.feed(self._text.flush(), search=self.num_tokens > self._min_tokens)
        return text + self._stops.flush()


class _TextStream:
    """Decodes a growing list of tokens at constant cost per token.

    Most tokens of most tokenizers have a text of their own, which is looked up. Otherwise a short window of the last
    tokens is decoded anew for each token. What lies before it never changes again, and the window reaches far enough
    back for its end to decode as it does in the whole.
    """

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._window_text = ""
        self._num_sent = 0  # characters of _window_text already returned

    def append(self, token_id: int) -> str:
        """Return the text that became certain: all but U+FFFD at the end, which may be unfinished."""
        if self._num_sent == len(self._window_text):
            own = self._tokenizer.whole_text(token_id, self._skip_special_tokens)
            if own is not None:
                self._window, self._window_text, self._num_sent = [], "", 0
                return own
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._window_text and self._decode([token_id, token_id]) == "":
            self._window.pop()  # invisible, as a skipped special token: must not crowd out the context
            return ""
        self._window_text = text
        num_held = len(text) - len(text.rstrip(_REPLACEMENT))
        overlong = len(self._window) >= 4 * _LONG_WINDOW
        if overlong:
            num_held = min(num_held, _MAX_UNFINISHED)
        delta = self._take(len(text) - num_held)
        if overlong:
            self._cut(_KEPT_TOKENS)
        elif num_held == 0 and len(self._window) >= _LONG_WINDOW:
            # A window that begins inside a character may decode differently; one of four cuts begins at one.
            for num_tokens in range(_KEPT_TOKENS, _KEPT_TOKENS + 4):
                if self._window_text.endswith(self._decode(self._window[-num_tokens:])):
                    self._cut(num_tokens)
                    break
        return delta

    def flush(self) -> str:
        """Return the rest, unfinished characters included."""
        return self._take(len(self._window_text))

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _take(self, end: int) -> str:
        delta = self._window_text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return delta

    def _cut(self, num_tokens: int) -> None:
        """Keep the last ``num_tokens``. The text ends as before, so what is unsent counts from there."""
        num_unsent = len(self._window_text) - self._num_sent
        self._window = self._window[-num_tokens:]
        self._window_text = self._decode(self._window)
        self._num_sent = len(self._window_text) - num_unsent


class _StopStrings:
    """Passes text through, holding back what may yet become a stop string, until one is complete."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self.matched: str | None = None
        self._stops = stops
        self._include = include
        self._held = ""

    def feed(self, text: str, search: bool) -> str:
        """Return the text that is certain to precede any stop string.

        Args:
            text: what follows the text fed so far.
            search: whether a stop string that is complete with ``text`` counts.
        """
        num_held, text = len(self._held), self._held + text
        matches = self._matches(text, num_held) if search else []
        if matches:
            end, start, self.matched = min(matches)
            self._held = ""
            return text[: end if self._include else start]
        certain = min((self._partial_match(text, stop) for stop in self._stops), default=len(text))
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Return what is held back."""
        text, self._held = self._held, ""
        return text

    def _matches(self, text: str, num_searched: int) -> list[tuple[int, int, str]]:
        """Return (end, start, stop) of the first occurrence of each stop that ends after ``num_searched``."""
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_searched - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return found

    @staticmethod
    def _partial_match(text: str, stop: str) -> int:
        """Return where the longest end of ``text`` that begins ``stop`` starts; without one, its length."""
        start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
        while start >= 0 and not stop.startswith(text[start:]):
            start = text.find(stop[0], start + 1)
        return start if start >= 0 else len(text)
