"""Drafts from a separate, smaller model, which follows every request in KV buffers of its own.

What it guesses are records like any others. Where the model says something else, a cursor moves back here, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import PROMPT_TAIL, MemoryPlan, plan_memory, typical_request_bytes
from kvbuffer.cache.shapes import CacheShape
from kvbuffer.cache.store import reserve
from kvbuffer.engine.request import Request
from kvbuffer.engine.runner import Runner
from kvbuffer.engine.scheduler import Segment
from kvbuffer.engine.speculative.drafter import Committed, Draft, Drafter
from kvbuffer.errors import ConfigError
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.weights import resolve_model
from kvbuffer.ops.batch import LinearForm
from kvbuffer.ops.chunked import CHUNK
from kvbuffer.tokenizer import Tokenizer


@dataclass(frozen=True)
class DraftModel:
    """A checkpoint that drafts for another.

    Attributes:
        folder: where it is.
        config: its configuration.
        budget: bytes for its states, buffers and attention pages.
    """

    folder: Path
    config: ModelConfig
    budget: int = 0

    @classmethod
    def find(cls, model: str, target: ModelConfig, tokenizer: Tokenizer) -> DraftModel:
        """Return the checkpoint of a name.

        Args:
            model: checkpoint folder, hub id, or ``demo``.
            target: what it drafts for.
            tokenizer: the target's.

        Raises:
            ModelError: there is no such checkpoint, or it is of an unsupported kind.
            ConfigError: its tokens are not the target's.
        """
        folder = resolve_model(model)
        config = ModelConfig.from_folder(folder)
        if config.vocab_size != target.vocab_size or not Tokenizer(folder).has_same_tokens(tokenizer):
            raise ConfigError(
                f"speculative_config: the draft model {model} has other tokens than the model ({config.vocab_size} and "
                f"{target.vocab_size}): choose one with the same tokenizer, of the same family"
            )
        return cls(folder, config)

    def with_share(self, budget: int, target: CacheShape, **dtypes_and_lengths: Any) -> DraftModel:
        """Give it the share of ``budget`` bytes that lets it follow as many requests as the target has room for.

        Args:
            budget: bytes for both models together.
            target: what the target remembers.
            dtypes_and_lengths: what else :func:`~kvbuffer.cache.plan.typical_request_bytes` takes.
        """
        own, other = (typical_request_bytes(shape, **dtypes_and_lengths) for shape in (self.config.cache_shape, target))
        return dataclasses.replace(self, budget=budget * own // (own + other))

    def plan(self, target: MemoryPlan) -> MemoryPlan:
        """Make the plan of its budget, for requests as long as the target's where they fit.

        Raises:
            CapacityError: the budget is too small.
        """
        longest = self._plan(None, target)
        if longest.max_model_len <= target.max_model_len:
            return longest
        return self._plan(target.max_model_len, target)

    def _plan(self, max_model_len: int | None, target: MemoryPlan) -> MemoryPlan:
        return plan_memory(
            self.config.cache_shape,
            budget=self.budget,
            max_model_len=max_model_len,
            max_num_seqs=target.max_num_seqs,
            buffer_len=target.buffer_len,
            kv_only_len=target.kv_only_len,
            dtype=target.dtype,
            state_dtype=target.state_dtype,
            record_dtype=target.record_dtype,
            # Beside a draft, the buffer holds what has been accepted of the last one.
            num_draft_tokens=2 * target.num_draft_tokens,
        )


@dataclass
class _Follower:
    """A request as the draft model has it.

    Attributes:
        shadow: its tokens, then guesses; with the memory that it has there.
        num_known: how many of these tokens are the request's own.
    """

    shadow: Request
    num_known: int


class DraftModelDrafter(Drafter):
    """Lets the draft model guess one token after the other, each time the most likely.

    A request that its memory has no room for gets no drafts.

    Args:
        model: the draft model.
        plan: of its memory.
        prefix_caching: keep the memory of requests that have ended for later ones.
        max_num_batched_tokens: most tokens of one request that it computes at once.
    """

    def __init__(self, model: Decoder, plan: MemoryPlan, prefix_caching: bool, max_num_batched_tokens: int) -> None:
        plan, caches = reserve(model.config.cache_shape, plan)
        self.memory = RequestMemory(plan, prefix_caching)
        self.runner = Runner(model, caches, self.memory)
        self.max_num_batched_tokens = max_num_batched_tokens
        self._followers: dict[Request, _Follower] = {}

    def observe(self, committed: Iterable[Committed], hidden: Tensor | None) -> None:
        """Compute prompts as the model does, but for their last tokens."""
        batch = []
        for request, begin, rows in committed:
            if begin >= request.num_prefill_tokens or (shadow := self._follow(request)) is None:
                continue
            end = min(begin + len(rows), len(request.token_ids) - PROMPT_TAIL)
            count = min(end - shadow.num_computed_tokens, self.max_num_batched_tokens // CHUNK * CHUNK)
            # Where records do without a state, they wait for the first draft.
            row = shadow.row
            assert row is not None
            if count > 0 and self.memory.slot[row] >= 0 and self.memory.own_state(row):
                batch.append(Segment(shadow, count, LinearForm.CHUNKED))
        if batch:
            self._run(batch)

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Guess a chain for each request."""
        lengths, batch = {}, []
        for request, limit in zip(requests, limits, strict=True):
            if (shadow := self._follow(request)) is not None:
                lengths[shadow] = len(request.token_ids) + limit
                batch += self._segments(shadow, len(request.token_ids), limit)
        while batch:
            guessed = self._run(sorted(batch, key=lambda segment: segment.form))
            batch = [
                Segment(shadow, 1, LinearForm.BUFFERED) for shadow in guessed if len(shadow.token_ids) < lengths[shadow]
            ]
        return [self._guesses(request) for request in requests]

    def _guesses(self, request: Request) -> Draft:
        follower = self._followers.get(request)
        return Draft([] if follower is None else follower.shadow.token_ids[follower.num_known :])

    def _follow(self, request: Request) -> Request | None:
        """Return a request's shadow, rolled back to where the two agree; None if there is no memory for it."""
        follower = self._followers.get(request)
        if follower is not None:
            self._roll_back(follower, request.token_ids)
            return follower.shadow
        if request.max_len > self.memory.plan.max_model_len:
            return None
        admission = self.memory.admit(request.token_ids, request.options.cache_salt, request.max_len)
        if isinstance(admission, str):
            return None
        shadow = dataclasses.replace(
            request,
            token_ids=list(request.token_ids),
            row=admission.row,
            num_computed_tokens=admission.match.num_tokens,
        )
        self._followers[request] = _Follower(shadow, len(request.token_ids))
        return shadow

    def _roll_back(self, follower: _Follower, token_ids: Sequence[int]) -> None:
        shadow, begin = follower.shadow, follower.num_known
        guesses, said = shadow.token_ids[begin:], token_ids[begin:]
        pairs = enumerate(zip(guesses, said, strict=False), begin)
        same = next((i for i, (guess, token) in pairs if guess != token), begin + min(len(guesses), len(said)))
        computed = min(shadow.num_computed_tokens, same, len(token_ids) - 1)
        # Guesses are never folded, so all of those that were computed are records.
        self.memory.fill[shadow.row] -= shadow.num_computed_tokens - computed
        shadow.token_ids[same:] = token_ids[same:]
        shadow.num_computed_tokens, follower.num_known = computed, len(token_ids)

    def _segments(self, shadow: Request, end: int, limit: int) -> list[Segment]:
        """Take memory for the tokens before ``end`` and ``limit`` guesses; none if there is too little.

        Many tokens are computed in chunks, so many at most that there is nothing to guess from yet; the last ones, and
        what is appended to a buffer that has room for it, are records.
        """
        memory, row = self.memory, shadow.row
        assert row is not None
        computed, fill = shadow.num_computed_tokens, int(memory.fill[row])
        records = fill + end - computed
        if (computed or memory.slot[row] < 0) and records + limit <= memory.plan.max_records:
            fits = memory.extend(row, end + limit, records + limit)
            return [Segment(shadow, end - computed, LinearForm.APPENDED)] if fits else []
        if not memory.own_state(row):
            return []
        border = max(computed, end - PROMPT_TAIL)
        chunk, tail = border - computed, end - border
        if chunk > self.max_num_batched_tokens:
            chunk, tail, limit = self.max_num_batched_tokens // CHUNK * CHUNK, 0, 0
        if not memory.extend(row, end + limit, tail + limit):
            return []
        parts = ((chunk, LinearForm.CHUNKED), (tail, LinearForm.APPENDED))
        return [Segment(shadow, count, form) for count, form in parts if count]

    def _run(self, batch: Sequence[Segment]) -> list[Request]:
        """Compute a batch; return the shadows whose tokens are now all computed, each with one more guess."""
        logits = self.runner.run(batch).logits
        complete = []
        for segment in batch:
            shadow = segment.request
            shadow.num_computed_tokens += segment.num_tokens
            if segment.form is not LinearForm.CHUNKED:
                self.memory.fill[shadow.row] += segment.num_tokens
                complete.append(shadow)
        for shadow, token in zip(complete, logits.argmax(1).tolist(), strict=True):
            shadow.token_ids.append(token)
        return complete

    def forget(self, request: Request, publish: bool) -> None:
        """Free its memory; what was computed of its text is kept for later requests."""
        follower = self._followers.pop(request, None)
        if follower is None:
            return
        self._roll_back(follower, request.token_ids)
        shadow = follower.shadow
        assert shadow.row is not None
        if publish:
            computed = shadow.token_ids[: shadow.num_computed_tokens]
            self.memory.publish(shadow.row, computed, request.options.cache_salt, "output")
        self.memory.release(shadow.row)
