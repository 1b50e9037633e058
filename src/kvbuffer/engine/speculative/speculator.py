"""Asks the drafter, and keeps count of what became of its drafts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvbuffer.engine.request import Request
from kvbuffer.engine.scheduler import Segment
from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.engine.speculative.drafter import Committed, Draft, Drafter


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

    Attributes:
        drafter: what proposes.
        stats: what became of it.
    """

    def __init__(self, config: SpeculativeConfig, drafter: Drafter) -> None:
        self.drafter = drafter
        self._most = config.num_speculative_tokens
        self.stats = SpeculativeStats(num_accepted_tokens_per_pos=[0] * self._most)

    def draft(self, requests: Iterable[Request]) -> dict[Request, Draft]:
        """Return drafts for those of the decoding ``requests`` for which there is something to propose."""
        began = time.perf_counter()
        # The token that is sampled behind a draft must still fit.
        limits = {request: min(self._most, request.max_len - len(request.token_ids) - 1) for request in requests}
        chosen = [request for request, limit in limits.items() if limit > 0]
        drafts = self.drafter.propose(chosen, [limits[request] for request in chosen]) if chosen else []
        self.stats.draft_seconds += time.perf_counter() - began
        return {request: draft for request, draft in zip(chosen, drafts, strict=True) if draft.token_ids}

    def observe(
        self, batch: Sequence[Segment], accepted: Mapping[Request, list[int]], hidden: Tensor | None, seconds: float
    ) -> None:
        """Take note of a step before its requests end, and let the drafter see what it has computed.

        Args:
            batch: the step.
            accepted: for each request that got tokens, which of its draft's tokens are among them.
            hidden: the hidden states of all tokens, if the drafter needs them.
            seconds: how long the step took.
        """
        drafts = [segment for segment in batch if segment.draft.token_ids]
        for segment in drafts:
            self._count(segment.request, segment.draft, len(accepted[segment.request]))
        if drafts:
            self.stats.verify_seconds += seconds
        began = time.perf_counter()
        self.drafter.observe(_committed(batch, accepted), hidden)
        self.stats.draft_seconds += time.perf_counter() - began

    def _count(self, request: Request, draft: Draft, num_accepted: int) -> None:
        request.num_draft_tokens += len(draft.token_ids)
        request.num_accepted_tokens += num_accepted
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += len(draft.token_ids)
        self.stats.num_accepted_tokens += num_accepted
        for place in range(num_accepted):
            self.stats.num_accepted_tokens_per_pos[place] += 1


def _committed(batch: Sequence[Segment], accepted: Mapping[Request, list[int]]) -> list[Committed]:
    """Return which tokens of a step count, and in which rows they were."""
    rows: dict[Request, list[int]] = {}
    row = 0
    for segment in batch:
        end = row + segment.num_tokens
        drafts = end - len(segment.draft.token_ids)
        rows.setdefault(segment.request, []).extend(range(row, drafts))
        if drafts < end:
            rows[segment.request].extend(drafts + place for place in accepted[segment.request])
        row = end
    return [Committed(request, request.num_computed_tokens - len(own), own) for request, own in rows.items()]
