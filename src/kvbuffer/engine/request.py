"""A request inside the engine, and what a step reports about it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from kvbuffer.errors import InvalidRequestError

if TYPE_CHECKING:
    from kvbuffer.engine.detokenizer import IncrementalDetokenizer
    from kvbuffer.engine.sampling_params import SamplingParams
    from kvbuffer.engine.sampling_state import SamplingState


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


#: Bounds of the fields of ``RequestOptions``.
MAX_PRIORITY = 2**31 - 1
MAX_NAME_LENGTH = 256
MAX_CACHE_TTL_S = 3600.0


@dataclass(frozen=True)
class RequestOptions:
    """How a request is queued and cached; nothing here changes its tokens.

    Attributes:
        priority: lower values are served first, as in vLLM.
        client: whose share of the service it uses; the empty string is the client of all that name none.
        cache_salt: requests share cached prefixes only with requests of the same salt, as in vLLM.
        cache_ttl_s: seconds for which its cached prefix is kept after its end, for the next turn of the conversation.

    Raises:
        InvalidRequestError: a value has the wrong type or is out of range.
    """

    priority: int = 0
    client: str = ""
    cache_salt: str | None = None
    cache_ttl_s: float = 0.0

    def __post_init__(self) -> None:
        if type(self.priority) is not int or abs(self.priority) > MAX_PRIORITY:
            raise InvalidRequestError(
                f"priority must be an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}, got {self.priority!r}", "priority"
            )
        if not isinstance(self.client, str) or len(self.client) > MAX_NAME_LENGTH:
            raise InvalidRequestError(f"user must be a string of at most {MAX_NAME_LENGTH} characters", "user")
        salt = self.cache_salt
        if salt is not None and not (isinstance(salt, str) and 0 < len(salt) <= MAX_NAME_LENGTH):
            raise InvalidRequestError(
                f"cache_salt must be a non-empty string of at most {MAX_NAME_LENGTH} characters; leave it out to share "
                "the cache with everyone",
                "cache_salt",
            )
        ttl = self.cache_ttl_s
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 <= ttl <= MAX_CACHE_TTL_S:
            raise InvalidRequestError(
                f"cache_ttl must be a number of seconds from 0 to {MAX_CACHE_TTL_S:.0f}, got {ttl!r}", "cache_ttl"
            )


#: What most requests say.
DEFAULT_OPTIONS = RequestOptions()


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability of one token under the model, before temperature, penalties and filters.

    Attributes:
        token_id: the token of the output or the prompt.
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
        num_draft_tokens: tokens drafted so far.
        num_accepted_tokens: those of them that were accepted.
        prompt_logprobs: one entry per token of the prompt but the first; with a request's first delta only, and if
            asked for.
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
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None


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
        options: how it is queued and cached.
        arrival: when it was added, in seconds of ``time.monotonic``.
        scheduled_at: when it was first scheduled, 0 before.
        row: its memory, None while it waits.
        num_computed_tokens: tokens whose state, keys and values exist.
        num_prefill_tokens: tokens known when its memory was taken; beyond these it decodes.
        num_cached_tokens: prompt tokens whose computation was reused from the prefix cache.
        branch: tokens after which the prompt leaves an earlier text.
        checkpoints: tokens after which its computation leaves a state for others.
        num_draft_tokens: tokens drafted for it so far.
        num_accepted_tokens: those of them that were accepted.
        prompt_logprobs: of the prompt's tokens but the first, as far as they are computed; empty unless asked for.
    """

    request_id: str
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    max_len: int
    sampling: SamplingState
    detokenizer: IncrementalDetokenizer
    options: RequestOptions = DEFAULT_OPTIONS
    arrival: float = field(default_factory=time.monotonic)
    scheduled_at: float = 0.0
    row: int | None = None
    num_computed_tokens: int = 0
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    branch: int = 0
    checkpoints: list[int] = field(default_factory=list)
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt's tokens are still to be computed."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def first_logits(self) -> int:
        """The first token after which logits are wanted: the last known one, or one of the prompt that is scored."""
        return len(self.prompt_logprobs) if self.scores_prompt else len(self.token_ids) - 1

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens that were known at admission are still to be computed."""
        return self.num_computed_tokens < self.num_prefill_tokens
