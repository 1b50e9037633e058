"""Which tokens of which requests are computed in the next step.

There are no phases. A request has computed some of its tokens and wants to reach all that are known; a token budget per
step shares that out: first one token for each request that decodes, then prompts. A prompt that does not fit is split
at a multiple of the chunk length, which changes nothing in its result. Nothing starves: every request that decodes gets
its token, and however many they are, one chunk of a prompt is let in beside them.

The last tokens of a prompt are not folded into its state but go into the buffer, so that the state before them stays at
hand, as do the convolutions' inputs there: later requests leave the prompt at these tokens.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import BUFFER_SLACK, PROMPT_TAIL
from kvbuffer.cache.prefix import Origin, checkpoint_positions
from kvbuffer.engine.forms import FormPolicy, folds_due
from kvbuffer.engine.queue import WaitingQueue
from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import NO_DRAFT, Draft
from kvbuffer.ops.batch import LinearForm
from kvbuffer.ops.chunked import CHUNK

logger = logging.getLogger(__name__)

# Prompt tokens that are scored in one step, and no more: each has logits over the whole vocabulary.
_MAX_SCORED_TOKENS = 4 * CHUNK


class Segment(NamedTuple):
    """A share of a step: the next uncomputed tokens of a request.

    Attributes:
        request: whose tokens.
        num_tokens: how many, drafts included.
        form: how the linear-attention layers compute them.
        fold: the records of before are folded into the state first.
        draft: guesses of what follows the last known token, which is then the only other one.
        kept: after so many of its tokens, the convolutions' inputs are left in the request's kept ring; 0 for never.
    """

    request: Request
    num_tokens: int
    form: LinearForm
    fold: bool = False
    draft: Draft = NO_DRAFT
    kept: int = 0


class Scheduler:
    """Admits, shares out and preempts.

    Args:
        memory: where requests live.
        forms: how the linear-attention layers decode.
        max_num_batched_tokens: token budget of a step, exceeded only so that nothing starves.
        max_queue_len: requests that may wait; None for any number.

    Attributes:
        waiting: requests without memory.
        running: requests with memory, oldest first.
        num_preemptions: requests sent back to the queue because memory ran out.
        num_folds: buffers folded into states so far.
        delays: steps in which the next request could not start, by what was missing.
    """

    def __init__(
        self,
        memory: RequestMemory,
        forms: FormPolicy,
        max_num_batched_tokens: int,
        max_queue_len: int | None = None,
    ) -> None:
        self.memory, self.forms = memory, forms
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting = WaitingQueue(max_queue_len)
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_folds = 0
        self.delays: Counter[str] = Counter()

    def add(self, request: Request) -> None:
        """Queue a request; raise :class:`~kvbuffer.errors.QueueFullError` if too many wait."""
        self.waiting.push(request)

    @property
    def decoding(self) -> list[Request]:
        """Running requests all of whose tokens but the last are computed, unless they have just been admitted."""
        return [request for request in self.running if not request.is_prefilling]

    def schedule(self, drafts: Mapping[Request, Draft] | None = None) -> list[Segment]:
        """Return the next step, sorted by form. Memory is taken for all of it.

        Args:
            drafts: guesses for decoding requests; they are left out where memory is short.
        """
        batch = self._schedule(drafts or {})
        if not batch and len(self.waiting) and not self.running and self.memory.prefixes is not None:
            # What keeps the next request from starting can only be prefixes that are pinned.
            self.memory.prefixes.unpin()
            batch = self._schedule({})
        return batch

    def _schedule(self, drafts: Mapping[Request, Draft]) -> list[Segment]:
        batch = list(self._decodes(drafts))
        budget = max(CHUNK, self.max_num_batched_tokens - sum(segment.num_tokens for segment in batch))
        unscored = _MAX_SCORED_TOKENS
        for request in self._prefilling():
            segments = self._prefill(request, min(budget, unscored) if request.scores_prompt else budget)
            if not segments:
                break
            batch += segments
            num_tokens = sum(segment.num_tokens for segment in segments)
            budget -= num_tokens
            unscored -= num_tokens if request.scores_prompt else 0
        return sorted(batch, key=lambda segment: segment.form)

    def commit(self, batch: list[Segment]) -> list[int]:
        """Move the cursors of a step that has been computed, over the tokens that were known.

        Returns:
            The places in the batch of the segments after which all known tokens of their requests are computed.
        """
        complete = []
        for place, segment in enumerate(batch):
            request, form = segment.request, segment.form
            num_tokens = segment.num_tokens - len(segment.draft.token_ids)
            assert request.row is not None
            request.num_computed_tokens += num_tokens
            if segment.fold:
                self.memory.folded(request.row)
                self.num_folds += 1
            elif form in (LinearForm.BUFFERED, LinearForm.APPENDED, LinearForm.VERIFIED):
                self.memory.fill[request.row] += num_tokens
            if request.num_computed_tokens == len(request.token_ids):
                complete.append(place)
        for request in {segment.request for segment in batch if segment.form is LinearForm.CHUNKED}:
            self._leave_checkpoint(request)
        return complete

    def accept(self, request: Request, accepted: Sequence[int]) -> None:
        """Move a request's cursor over the drafts that were accepted, whose tokens it has been given.

        Args:
            request: one whose draft has just been verified.
            accepted: which of the draft's tokens, a path from the known token.
        """
        assert request.row is not None
        self.memory.accept(request.row, request.num_computed_tokens, accepted)
        request.num_computed_tokens += len(accepted)

    def finish(self, request: Request, *, publish: bool = True) -> None:
        """Forget a request and free its memory; what it computed is kept for later requests while there is room.

        Args:
            request: one that waits or runs.
            publish: whether what it computed is any good.
        """
        if request.row is None:
            self.waiting.remove(request)
            return
        if publish:
            self.publish(request, "output")
            if request.options.cache_ttl_s:
                computed = request.token_ids[: request.num_computed_tokens]
                self.memory.pin(computed, request.options.cache_salt, request.options.cache_ttl_s)
        self.running.remove(request)
        self.memory.release(request.row)
        request.row = None

    def publish(self, request: Request, origin: Origin) -> None:
        """Offer what a request has computed to later requests; after its ``"output"`` it gives up its memory."""
        assert request.row is not None
        computed = request.token_ids[: request.num_computed_tokens]
        self.memory.publish(request.row, computed, request.options.cache_salt, origin)

    def _leave_checkpoint(self, request: Request) -> None:
        """Offer the part of a prompt that has been computed to later requests, if a checkpoint was due."""
        computed = request.num_computed_tokens
        is_due = bool(request.checkpoints) and request.checkpoints[0] <= computed
        # Other than where the text left an earlier one it is a guess, for which no other prefix is given up.
        at_branch = computed == request.branch
        if is_due and request.is_prefilling and (at_branch or self.memory.pools.room("slots") > 1):
            self.publish(request, "branch" if at_branch else "chunk")
        request.checkpoints = [position for position in request.checkpoints if position > computed]

    def _decodes(self, drafts: Mapping[Request, Draft]) -> Iterator[Segment]:
        """Take memory for the next token of every decoding request, oldest first; preempt the youngest if need be."""
        decoding = self.decoding
        rows = np.array([request.row for request in decoding], np.int32)
        num_states = int(np.count_nonzero(self.memory.slot[rows] >= 0))
        recurrent, has_state = self.forms.buffer_len(num_states) == 0, self.memory.slot[rows] >= 0
        num_records = np.array([1 + len(drafts.get(request, NO_DRAFT).token_ids) for request in decoding])
        # Whoever drafts nothing is served as if nobody did. Where that is by the recurrence, a fold of the records that
        # verification has left is a pass of its own, which can wait.
        verifies = num_records > 1
        if recurrent:
            verifies |= np.array([request.num_draft_tokens > 0 for request in decoding], bool)
        lengths = np.where(verifies, self.forms.verify_len(num_states), self.forms.buffer_len(num_states))
        limits = np.where(has_state, lengths, self.forms.kv_only_len)
        due = folds_due(self.memory.fill[rows] - limits, float(np.sum(num_records / np.maximum(lengths, 1))))
        left = np.flatnonzero(has_state & (self.memory.fill[rows] > 0)).tolist()
        if recurrent and 2 * len(left) < num_states:
            # The records that verification has left to a few requests are not worth another call in every layer.
            due |= {i for i in left if decoding[i] not in drafts}
        for i, request in enumerate(decoding):
            segment, draft = None, drafts.get(request, NO_DRAFT)
            while request.row is not None and segment is None:
                segment = self._decode(request, recurrent, i in due, draft)
                if segment is None and draft.token_ids:
                    draft = NO_DRAFT
                    continue
                if segment is None:
                    self._preempt(self.running[-1])
            if segment is not None:
                yield segment

    def _decode(self, request: Request, recurrent: bool, due: bool, draft: Draft) -> Segment | None:
        """Take memory for one token of a request and its draft; None if there is too little."""
        memory, row, num_drafts = self.memory, request.row, len(draft.token_ids)
        assert row is not None
        tokens, records = len(request.token_ids) + num_drafts, 1 + num_drafts
        fill, has_state = int(memory.fill[row]), memory.slot[row] >= 0
        due = due and fill > 0
        # Records that verification has left are folded when that is due, not at once.
        recurrent = recurrent and has_state and not num_drafts and (due or not fill)
        if due and not (recurrent or num_drafts) and memory.folds_in_place(row):
            return Segment(request, 1, LinearForm.BUFFERED, True) if memory.extend(row, tokens, fill) else None
        full = fill + records > memory.plan.max_records
        if due or recurrent or full:
            if memory.own_state(row):
                self.num_folds += fill > 0
                fill = 0
            elif full:
                return None
        if recurrent and not fill:
            return Segment(request, 1, LinearForm.RECURRENT) if memory.extend(row, tokens, 0) else None
        if not memory.extend(row, tokens, fill + records):
            # If it is record pages that have run short, a fold makes room.
            if not (fill and memory.own_state(row)):
                return None
            self.num_folds += 1
            if not memory.extend(row, tokens, records):
                return None
        form = LinearForm.VERIFIED if num_drafts else LinearForm.BUFFERED
        return Segment(request, records, form, draft=draft)

    def _prefilling(self) -> Iterator[Request]:
        """Yield running requests that prefill, then waiting ones for as long as the next one can be admitted."""
        yield from [request for request in self.running if request.is_prefilling]
        while (request := self.waiting.peek(self._num_cached_tokens)) is not None and self._admit(request):
            yield request

    def _is_being_computed(self, request: Request) -> bool:
        """Return whether a running request computes the same prompt, and will leave all but its last token to share."""
        return (
            not request.scores_prompt
            and self.memory.prefixes is not None
            and any(
                other.num_computed_tokens < other.num_prefill_tokens - 1
                and other.token_ids == request.token_ids
                and other.options.cache_salt == request.options.cache_salt
                for other in self.running
            )
        )

    def _num_cached_tokens(self, request: Request) -> int:
        if request.scores_prompt:
            return 0
        return self.memory.num_cached_tokens(request.token_ids, request.options.cache_salt)

    def _admit(self, request: Request) -> bool:
        if self._is_being_computed(request):
            return False
        admission = self.memory.admit(
            request.token_ids, request.options.cache_salt, request.max_len, reuse=not request.scores_prompt
        )
        if isinstance(admission, str):
            if not self.delays[admission]:
                logger.info("Requests wait for want of %s; metrics count for how many steps.", admission)
            self.delays[admission] += 1
            return False
        self.waiting.pop()
        match = admission.match
        request.row, request.num_computed_tokens = admission.row, match.num_tokens
        request.branch = match.branch
        if self.memory.prefixes is not None:
            request.checkpoints = checkpoint_positions(
                match, len(request.token_ids), self.memory.pools.room("slots"), chunk=self.max_num_batched_tokens
            )
        request.num_prefill_tokens = len(request.token_ids)
        if not request.scheduled_at:
            request.scheduled_at, request.num_cached_tokens = time.monotonic(), request.num_computed_tokens
            self.waiting.charge(request, prompt=request.num_prompt_tokens - request.num_cached_tokens)
        self.running.append(request)
        return True

    def _prefill(self, request: Request, budget: int) -> list[Segment]:
        """Return the next tokens of a prompt, at most ``budget``: in chunks, its last ones into the buffer."""
        memory, row = self.memory, request.row
        assert row is not None
        known, computed, fill = len(request.token_ids), request.num_computed_tokens, int(memory.fill[row])
        remaining, border = known - computed, known - PROMPT_TAIL
        if memory.slot[row] < 0 or (computed and fill + remaining <= memory.plan.buffer_len + BUFFER_SLACK):
            count = min(remaining, budget)
            if count and memory.extend(row, known, fill + count):
                return [Segment(request, count, LinearForm.APPENDED, kept=self._kept(request, border, count))]
            # Only a state makes do with the record pages that were taken at admission.
            if not count or memory.slot[row] < 0:
                return []
        if not memory.own_state(row):
            return []
        self.num_folds += fill > 0
        chunk, tail = max(0, border - computed), known - max(border, computed)
        if request.branch in request.checkpoints and computed < request.branch < min(border, computed + budget):
            chunk, tail = request.branch - computed, 0
        elif chunk + tail > budget:
            chunk, tail = min(chunk, budget // CHUNK * CHUNK), 0
        if not memory.extend(row, known, tail):
            return []
        segments = []
        if chunk:
            kept = self._kept(request, border, chunk)
            segments.append(Segment(request, chunk, LinearForm.CHUNKED, kept=kept))
        if tail:
            segments.append(Segment(request, tail, LinearForm.APPENDED))
        return segments

    def _kept(self, request: Request, border: int, num_tokens: int) -> int:
        """Return after how many of a prompt's next tokens its convolutions' inputs are kept; 0 for never.

        Args:
            request: whose prompt.
            border: tokens before its last ones.
            num_tokens: how many tokens are next.
        """
        assert request.row is not None
        place = border - request.num_computed_tokens
        return place if 0 < place <= num_tokens and self.memory.keep_ring(request.row) else 0

    def _preempt(self, request: Request) -> None:
        """Free a request's memory and queue it first; what it computed is kept while there is room."""
        assert request.row is not None
        self.publish(request, "output")
        self.running.remove(request)
        self.memory.release(request.row)
        request.row = None
        request.num_computed_tokens = request.num_prefill_tokens = 0
        self.waiting.push_front(request)
        self.num_preemptions += 1
