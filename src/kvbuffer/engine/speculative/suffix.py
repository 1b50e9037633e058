"""Suffix decoding: what most often followed the last tokens, in the request's own text and in what was served before.

After Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications", arXiv 2411.04975; no
model is needed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import NO_DRAFT, Committed, Draft, Drafter
from kvbuffer.engine.speculative.suffix_automaton import NO_MATCH, Match, SuffixAutomaton

#: Separates texts in the history; no token has this id.
_END_OF_TEXT = -1
#: Parts that the history is divided into; the oldest is dropped as a whole.
_VOLUMES = 4


class SuffixDrafter(Drafter):
    """Proposes what was most frequent after the longest match of a request's last tokens, as a chain or a tree.

    Args:
        max_context: longest match, in tokens.
        max_spec_factor: a match of n tokens lets so many times n be proposed.
        min_token_prob: a token is proposed only if it, with those before it in the draft, followed the match in at
            least this share of cases.
        max_cached_tokens: tokens of earlier outputs that are kept, about 430 bytes each.
    """

    def __init__(self, max_context: int, max_spec_factor: float, min_token_prob: float, max_cached_tokens: int) -> None:
        self.max_context, self.max_spec_factor, self.min_token_prob = max_context, max_spec_factor, min_token_prob
        self.history = History(max_context, max_cached_tokens)
        self._texts: dict[str, _Text] = {}

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Follow each request's text in itself and in the history of its salt; the more probable draft counts."""
        return [self._propose(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def _propose(self, request: Request, limit: int) -> Draft:
        best, best_rank = NO_DRAFT, (0.0, 0)
        for automaton, match in self._read(request, len(request.token_ids)).matches():
            draft, score = self._likeliest(automaton, match, min(limit, int(self.max_spec_factor * match.length)))
            if (score, match.length) > best_rank:
                best, best_rank = draft, (score, match.length)
        return best

    def _likeliest(self, automaton: SuffixAutomaton, match: Match, limit: int) -> tuple[Draft, float]:
        """Return the ``limit`` likeliest tokens, a tree; and how many of them are expected to be right.

        A token is as likely as the path to it, so the likeliest next one follows one that is there. Where that is
        always the last, the tree is a chain.
        """
        token_ids: list[int] = []
        parents: list[int] = []
        score, place, probability = 0.0, -1, 1.0
        # Of equals the earliest comes first.
        candidates: list[tuple[float, int, int, int, int, Match]] = []
        while len(token_ids) < limit:
            followers = automaton.followers(match)
            total = sum(followers.values())
            for i, (token, count) in enumerate(followers.items()):
                share = probability * count / total
                if share >= self.min_token_prob and token != _END_OF_TEXT:
                    heapq.heappush(candidates, (-share, place, i, token, place, match))
            if not candidates:
                break
            share, _, _, token, parent, match = heapq.heappop(candidates)
            place, probability = len(token_ids), -share
            token_ids.append(token)
            parents.append(parent)
            score += probability
            match = automaton.step(match, token)
        is_chain = parents == list(range(-1, len(parents) - 1))
        return Draft(token_ids, None if is_chain else parents), score

    def observe(self, committed: Iterable[Committed], hidden: Tensor | None) -> None:
        """Read prompts as they are computed, not all at once."""
        for part in committed:
            if part.begin < part.request.num_prefill_tokens:
                self._read(part.request, part.begin + len(part.rows))

    def _read(self, request: Request, num_tokens: int) -> _Text:
        text = self._texts.get(request.request_id)
        if text is None:
            text = self._texts[request.request_id] = _Text(self.history, request.options.cache_salt, self.max_context)
        text.read(request.token_ids, num_tokens)
        return text

    def forget(self, request: Request, publish: bool) -> None:
        """Add the request's output to the history."""
        if self._texts.pop(request.request_id, None) is not None and publish:
            self.history.add(request.token_ids[request.num_prompt_tokens :], request.options.cache_salt)


class _Text:
    """A request's text so far, and where its last tokens occur in the history."""

    def __init__(self, history: History, salt: str | None, max_context: int) -> None:
        self.history, self.salt = history, salt
        self.own = SuffixAutomaton(max_context)
        self._recent: list[int] = []
        self._matches: dict[SuffixAutomaton, Match] = {}

    def read(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Read on to ``num_tokens`` tokens."""
        new = token_ids[self.own.num_tokens : num_tokens]
        self.own.extend(new)
        recent = [*self._recent, *new]
        self._matches = {volume: self._match(volume, new, recent) for volume in self.history.volumes(self.salt)}
        self._recent = recent[-self.own.max_context :]

    def _match(self, volume: SuffixAutomaton, new: Sequence[int], recent: Sequence[int]) -> Match:
        match = self._matches.get(volume)
        if match is None or len(new) > volume.max_context:
            match, new = NO_MATCH, recent[-volume.max_context :]
        for token in new:
            match = volume.step(match, token)
        return match

    def matches(self) -> Iterator[tuple[SuffixAutomaton, Match]]:
        """Yield the longest match of the last tokens in the text itself, and in each part of the history."""
        yield self.own, self.own.repeat()
        yield from self._matches.items()


class History:
    """The outputs of requests that have ended, by salt: what a request is offered tells how others' outputs went on.

    Args:
        max_context: longest match, in tokens.
        max_tokens: tokens kept, over all salts; the oldest are dropped.
    """

    def __init__(self, max_context: int, max_tokens: int) -> None:
        self.max_context, self.max_tokens = max_context, max_tokens
        # Per salt, oldest first; salts in the order in which they were last added to.
        self._volumes: dict[str | None, list[SuffixAutomaton]] = {}
        self.num_tokens = 0

    def volumes(self, salt: str | None) -> Sequence[SuffixAutomaton]:
        """Return the parts of a salt's history."""
        return self._volumes.get(salt, ())

    def add(self, token_ids: Sequence[int], salt: str | None) -> None:
        """Add an output, at most the end of it that a part of the history has room for."""
        size = self.max_tokens // _VOLUMES
        text = [*token_ids[-(size - 1) :], _END_OF_TEXT]
        if not token_ids or size < 2:
            return
        volumes = self._volumes.pop(salt, [])
        self._volumes[salt] = volumes
        if not volumes or volumes[-1].num_tokens + len(text) > size:
            volumes.append(SuffixAutomaton(self.max_context))
        volumes[-1].extend(text)
        self.num_tokens += len(text)
        while self.num_tokens > self.max_tokens:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        salt, volumes = next(iter(self._volumes.items()))
        self.num_tokens -= volumes.pop(0).num_tokens
        if not volumes:
            del self._volumes[salt]
