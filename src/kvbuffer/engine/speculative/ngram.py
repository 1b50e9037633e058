"""Prompt lookup: what followed the last tokens when they came before in the same text (no model is needed)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import NO_DRAFT, Draft, Drafter

Int64 = npt.NDArray[np.int64]


class NgramDrafter(Drafter):
    """Proposes the continuation of the longest n-gram that ends a request's text and occurred in it before.

    Of several occurrences the latest counts. What followed it is repeated where it is too short, as a copy in LZ77 is.

    Args:
        min_ngram: shortest n-gram that is looked up.
        max_ngram: longest.
    """

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        self.min_ngram, self.max_ngram = min_ngram, max_ngram
        self._texts: dict[str, _Text] = {}

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Look up each request's last tokens."""
        return [self._propose(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def _propose(self, request: Request, limit: int) -> Draft:
        tokens = self._texts.setdefault(request.request_id, _Text()).update(request.token_ids)
        last = tokens.size - 1
        # Ends of all earlier occurrences of the last n tokens, for as large an n as there are any.
        ends = np.flatnonzero(tokens[:last] == tokens[last])
        length = 1
        while ends.size and length < self.max_ngram:
            longer = ends[ends >= length]
            longer = longer[tokens[longer - length] == tokens[last - length]]
            if not longer.size:
                break
            ends, length = longer, length + 1
        if not ends.size or length < self.min_ngram:
            return NO_DRAFT
        return Draft(np.resize(tokens[ends[-1] + 1 :], limit).tolist())

    def forget(self, request: Request, publish: bool) -> None:
        """Drop the copy of its text."""
        self._texts.pop(request.request_id, None)


class _Text:
    """A growing text as an array."""

    def __init__(self) -> None:
        self._tokens: Int64 = np.empty(0, np.int64)
        self._size = 0

    def update(self, token_ids: Sequence[int]) -> Int64:
        """Append what is new in ``token_ids``; return it all."""
        size = len(token_ids)
        if size > self._tokens.size:
            grown = np.empty(max(2 * self._tokens.size, size + 64), np.int64)
            grown[: self._size] = self._tokens[: self._size]
            self._tokens = grown
        self._tokens[self._size : size] = token_ids[self._size :]
        self._size = size
        return self._tokens[:size]
