"""Asks the drafter, and keeps count of what became of its drafts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvbuffer.engine.request import Request
from kvbuffer.engine.scheduler import Segment
from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.engine.speculative.drafter import Committed, Draft, Drafter
from kvbuffer.engine.speculative.lengths import DraftLengths
from kvbuffer.ops.batch import LinearForm


@dataclass
class SpeculativeStats:
    """What became of drafts.

    Attributes:
        num_drafts: drafts verified.
        num_draft_tokens: tokens in them.
        num_accepted_tokens: tokens of them that were accepted.
        num_accepted_tokens_per_pos: drafts of which at least one token was accepted, at least two, …
        draft_seconds: time spent in the drafter.
        verify_seconds: time of the steps that verified drafts.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a step with a draft brings, the one that is sampled in any case included."""
        return 1 + self.num_accepted_tokens / max(1, self.num_drafts)


class Speculator:
    """A drafter at work.

    Args:
        config: how much to propose.
        drafter: what proposes.
        max_num_batched_tokens: most tokens of a step.

    Attributes:
        drafter: what proposes.
        stats: what became of it.
    """

    def __init__(self, config: SpeculativeConfig, drafter: Drafter, max_num_batched_tokens: int) -> None:
        self.drafter = drafter
        self.stats = SpeculativeStats(num_accepted_tokens_per_pos=[0] * config.num_speculative_tokens)
        self._most, self._budget = config.num_speculative_tokens, max_num_batched_tokens
        self._lengths = DraftLengths(self._most) if config.adaptive else None
        self._seconds = 0.0

    def draft(self, requests: Sequence[Request]) -> dict[Request, Draft]:
        """Return drafts for those of the decoding ``requests`` for which there is something to propose."""
        began = time.perf_counter()
        limits = self._limits(requests)
        drafts: dict[Request, Draft] = {}
        preparing = 0.0
        if limits:
            num_prepared = self.drafter.prepare(list(limits))
            if num_prepared and self._lengths is not None:
                preparing = time.perf_counter() - began
                self._lengths.observe_preparation(num_prepared, preparing)
            proposed = zip(limits, self.drafter.propose(list(limits), list(limits.values())), strict=True)
            drafts = {request: draft for request, draft in proposed if draft.token_ids}
        self._seconds = time.perf_counter() - began - preparing
        self.stats.draft_seconds += preparing + self._seconds
        if self._lengths is not None and limits:
            for request in limits:
                if request not in drafts:
                    self._lengths.observe_nothing_found(request)
            if not drafts:
                self._lengths.observe_search(len(limits), self._seconds)
        return drafts

    def _limits(self, requests: Sequence[Request]) -> dict[Request, int]:
        """Return the most tokens to draft for each of the requests for which any are wanted."""
        wanted = [self._most] * len(requests) if self._lengths is None else self._lengths.choose(requests)
        if not any(wanted):
            return {}
        most = self._budget // len(requests) - 1
        # The token that is sampled behind a draft must still fit.
        limits = {
            request: min(length, most, request.max_len - len(request.token_ids) - 1)
            for request, length in zip(requests, wanted, strict=True)
        }
        return {request: limit for request, limit in limits.items() if limit > 0}

    def observe(
        self, batch: Sequence[Segment], accepted: Mapping[Request, list[int]], hidden: Tensor | None, seconds: float
    ) -> None:
        """Take note of a step before its requests end, and let the drafter see what it has computed.

        Args:
            batch: the step.
            accepted: for each request that got tokens, which of its draft's tokens are among them.
            hidden: the hidden states of all tokens, if the drafter needs them.
            seconds: how long the step took, after drafting.
        """
        drafts = [segment for segment in batch if segment.draft.token_ids]
        for segment in drafts:
            self._count(segment.request, segment.draft, len(accepted[segment.request]))
        self.stats.verify_seconds += seconds if drafts else 0.0
        began = time.perf_counter()
        self.drafter.observe(_committed(batch, accepted), hidden)
        observing = time.perf_counter() - began
        self.stats.draft_seconds += observing
        if self._lengths is not None and not any(s.form in (LinearForm.CHUNKED, LinearForm.APPENDED) for s in batch):
            if drafts:
                seconds += self._seconds + observing
            num_drafted = sum(len(segment.draft.token_ids) for segment in drafts)
            num_accepted = sum(len(accepted[segment.request]) for segment in drafts)
            self._lengths.observe_step(len(batch), num_drafted, num_accepted, seconds)

    def _count(self, request: Request, draft: Draft, num_accepted: int) -> None:
        request.num_draft_tokens += len(draft.token_ids)
        request.num_accepted_tokens += num_accepted
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += len(draft.token_ids)
        self.stats.num_accepted_tokens += num_accepted
        for place in range(num_accepted):
            self.stats.num_accepted_tokens_per_pos[place] += 1
        if self._lengths is not None:
            self._lengths.observe_draft(request, draft.depth, num_accepted)

    def forget(self, request: Request, publish: bool) -> None:
        """Drop what is kept of a request that ends and still has its memory."""
        self.drafter.forget(request, publish)
        if self._lengths is not None:
            self._lengths.forget(request)


def _committed(batch: Sequence[Segment], accepted: Mapping[Request, list[int]]) -> Iterator[Committed]:
    """Yield which tokens of a step count, and in which rows they were."""
    rows: dict[Request, list[int]] = {}
    row = 0
    for segment in batch:
        end = row + segment.num_tokens
        drafts = end - len(segment.draft.token_ids)
        own = [*range(row, drafts)]
        if drafts < end:
            own += [drafts + place for place in accepted[segment.request]]
        # A prompt may have two segments.
        rows[segment.request] = [*rows[segment.request], *own] if segment.request in rows else own
        row = end
    for request, own in rows.items():
        yield Committed(request, request.num_computed_tokens - len(own), own)
