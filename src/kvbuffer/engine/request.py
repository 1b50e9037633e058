"""A request inside the engine, and what a step reports about it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvbuffer.engine.detokenizer import IncrementalDetokenizer
    from kvbuffer.engine.sampling_params import SamplingParams
    from kvbuffer.engine.sampling_state import SamplingState


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability of one output token under the model, before temperature, penalties and filters.

    Attributes:
        token_id: the sampled token.
        logprob: its natural log-probability.
        rank: its place among all tokens, 1 being the most likely; equals are ordered by token id.
        top: the most likely tokens and their log-probabilities, best first, as many as the request asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(slots=True)
class CompletionDelta:
    """What one step adds to one request.

    Attributes:
        request_id: the request.
        text: new text; may be empty while a character or a possible stop string is incomplete.
        token_ids: new output tokens.
        logprobs: one entry per new token, or None when not asked for.
        finish_reason: why the request ended with this delta, or None while it goes on.
        stop_reason: the stop string or stop token id that matched, if one did.
        num_prompt_tokens: length of the prompt.
        num_output_tokens: output tokens so far, this delta's included.
        num_cached_tokens: prompt tokens whose computation was reused from the prefix cache.
        scheduled_at: when the request was first scheduled, in seconds of ``time.monotonic``.
    """

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    scheduled_at: float


@dataclass(slots=True, eq=False)
class Request:
    """One request from admission to its last token.

    Attributes:
        request_id: the caller's name for it.
        params: how to sample and when to end.
        token_ids: the prompt and the output so far.
        num_prompt_tokens: length of the prompt.
        max_len: tokens at which the request ends, by ``max_tokens`` and the context.
        sampling: what the sampler remembers.
        detokenizer: turns output tokens into text.
        arrival: when it was added, in seconds of ``time.monotonic``.
        scheduled_at: when it was first scheduled, 0 before.
        slot: its memory, None while it waits.
        num_computed_tokens: tokens whose state, keys and values exist.
        num_prefill_tokens: tokens known when its memory was taken; beyond these it decodes.
    """

    request_id: str
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    max_len: int
    sampling: SamplingState
    detokenizer: IncrementalDetokenizer
    arrival: float = field(default_factory=time.monotonic)
    scheduled_at: float = 0.0
    slot: int | None = None
    num_computed_tokens: int = 0
    num_prefill_tokens: int = 0

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens that were known at admission are still to be computed."""
        return self.num_computed_tokens < self.num_prefill_tokens
