"""Drafts from the model's own multi-token-prediction head.

What the head computes for token i needs the model's hidden state after it and token i + 1. So the last token of a step
waits until the next one has been sampled, and tokens are computed together when a draft is wanted. Keys and values lie
in the request's attention pages, as one more layer's: cached prefixes, preempted requests and files have them, too. The
last token of a cached prefix has been computed with the token that followed it there.

Where no drafts are wanted for long, as they do not pay, the head sleeps: of the tokens that wait, only the last are
kept, and pages that it has computed nothing of are left out of what it attends to, as if the text went on behind them.
So it costs next to nothing until a draft is wanted, which is a little worse then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import attention_pages
from kvbuffer.cache.store import AttentionCache
from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import Committed, Draft, Drafter
from kvbuffer.models.decoder import Decoder
from kvbuffer.ops.attention import PAGE_SIZE, key_pages
from kvbuffer.ops.batch import ModelInputs

Int32 = npt.NDArray[np.int32]

#: Tokens of a request that are kept for a draft that may be wanted, and up to a page more; older ones are skipped.
_MOST_WAITING = 16


@dataclass(slots=True)
class _Waiting:
    """Tokens of a request that the model has computed and the head has not.

    Attributes:
        begin: place of the first of them.
        end: place after the last of them.
        hidden: [n, hidden_size] each, the model's hidden states after them, step by step, and which rows count.
        last: [1, hidden_size], what the head gave for the token before them; None if it is not known.
    """

    begin: int
    end: int
    hidden: list[tuple[Tensor, Sequence[int]]] = field(default_factory=list)
    last: Tensor | None = None

    def add(self, begin: int, hidden: Tensor, rows: Sequence[int]) -> None:
        """Append the hidden states of tokens from ``begin`` on; any that are there for these are dropped."""
        if begin < self.end:
            self._set(self._joined()[: begin - self.begin])
        self.hidden.append((hidden, rows))
        self.end = begin + len(rows)

    def skip(self, count: int) -> None:
        """Drop the hidden states of the first ``count`` tokens, and what the head gave before them."""
        self.begin += count
        self.last, parts = None, 0
        while parts < len(self.hidden) and count >= len(self.hidden[parts][1]):
            count -= len(self.hidden[parts][1])
            parts += 1
        del self.hidden[:parts]
        if count:
            hidden, rows = self.hidden[0]
            self.hidden[0] = hidden, rows[count:]

    def take(self, count: int) -> Tensor:
        """Take the hidden states of the first ``count`` tokens."""
        hidden = self._joined()
        self.begin += count
        self._set(hidden[count:])
        return hidden[:count]

    def _joined(self) -> Tensor:
        return torch.cat([_rows(hidden, rows) for hidden, rows in self.hidden])

    def _set(self, hidden: Tensor) -> None:
        self.hidden = [(hidden, range(len(hidden)))] if len(hidden) else []


class MtpDrafter(Drafter):
    """Lets the head guess one token after the other, each time the most likely.

    Args:
        model: with its head.
        cache: the head's memory.
        memory: which of it belongs to whom.
    """

    needs_hidden = True

    def __init__(self, model: Decoder, cache: AttentionCache, memory: RequestMemory) -> None:
        assert model.mtp is not None
        self.model, self.head, self.cache, self.memory = model, model.mtp, cache, memory
        self._waiting: dict[Request, _Waiting] = {}
        # Of each attention page, whether the head has skipped the tokens in it.
        self._skipped = np.zeros(len(cache.pages), bool)

    def observe(self, committed: Iterable[Committed], hidden: Tensor | None) -> None:
        """Keep the hidden states of decoded tokens; compute prompts, which other requests may share, at once."""
        assert hidden is not None
        prompts = []
        for part in committed:
            waiting = self._add(part, hidden)
            if part.begin < part.request.num_prefill_tokens:
                prompts.append(part.request)
            elif waiting.end - waiting.begin > _MOST_WAITING + PAGE_SIZE:
                end = waiting.end - _MOST_WAITING
                self._skip(part.request, end - end % PAGE_SIZE)
        self._catch_up(prompts)

    def prepare(self, requests: Sequence[Request]) -> int:
        """Wake up where the head has slept."""
        asleep = [request for request in requests if self._sleeps(request)]
        self._catch_up(asleep)
        return len(asleep)

    def _sleeps(self, request: Request) -> bool:
        """Return whether more tokens wait than a step with a draft leaves."""
        return self._num_waiting(request) > 1 + self.memory.plan.num_draft_tokens

    def _add(self, part: Committed, hidden: Tensor) -> _Waiting:
        request, begin, rows = part
        waiting = self._waiting.get(request)
        # A request that was preempted may compute tokens again.
        if waiting is None or not waiting.begin <= begin <= waiting.end:
            waiting = self._waiting[request] = _Waiting(begin, begin)
        waiting.add(begin, hidden, rows)
        return waiting

    def _num_waiting(self, request: Request) -> int:
        """Return how many tokens can be computed: those whose next token is known."""
        waiting = self._waiting[request]
        return min(waiting.end, len(request.token_ids) - 1) - waiting.begin

    def _skip(self, request: Request, end: int) -> None:
        """Drop tokens that wait, up to ``end``, the border of a page; where the page is not full, all of them."""
        waiting = self._waiting[request]
        first, place = divmod(waiting.begin, PAGE_SIZE)
        waiting.skip(min(end, waiting.end) - waiting.begin)
        pages = self.memory.attention_table[request.row, first : end // PAGE_SIZE].tolist()
        # Whose text goes on from these tokens is not to see what was in the pages before.
        if place:
            key_pages(self.cache.pages)[pages[0], :, place:] = 0
            self.cache.pages[pages.pop(0), 1, :, place:] = 0
        self.cache.pages[pages] = 0
        self._skipped[pages] = True

    def _catch_up(self, requests: Iterable[Request]) -> None:
        """Compute the tokens that wait."""
        behind = [request for request in requests if self._num_waiting(request) > 0]
        if not behind:
            return
        waiting = [self._waiting[request] for request in behind]
        counts = [self._num_waiting(request) for request in behind]
        begins = [each.begin for each in waiting]
        token_ids = [
            token
            for request, begin, count in zip(behind, begins, counts, strict=True)
            for token in request.token_ids[begin + 1 : begin + 1 + count]
        ]
        hidden = [each.take(count) for each, count in zip(waiting, counts, strict=True)]
        out = self._forward(behind, begins, counts, token_ids, torch.cat(hidden))
        for each, computed in zip(waiting, out.split(counts), strict=True):
            each.last = computed[-1:]

    def _forward(
        self,
        requests: Sequence[Request],
        begins: Sequence[int],
        counts: Sequence[int],
        token_ids: Sequence[int],
        hidden: Tensor,
    ) -> Tensor:
        """Run the head over ``counts`` places of each request from ``begins`` on."""
        rows = np.array([request.row for request in requests], np.int32)
        context, lengths = np.array(begins, np.int32), np.array(counts, np.int32)
        borders = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=borders[1:])
        positions = np.arange(borders[-1], dtype=np.int32) + np.repeat(context - borders[:-1], lengths)
        table, context = self._visible(rows, context, lengths)
        inputs = ModelInputs(
            token_ids=torch.tensor(token_ids),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(borders),
            context_lens=torch.from_numpy(context),
            attention_page_table=torch.from_numpy(table),
            rings=torch.from_numpy(self.memory.ring[rows]),
            logits_rows=torch.from_numpy(borders[1:] - 1).long(),
            sections=(),
        )
        return self.head.forward(hidden, inputs, self.cache)

    def _visible(self, rows: Int32, context: Int32, lengths: Int32) -> tuple[Int32, Int32]:
        """Return the pages that the head attends to or writes, and the tokens of context in them."""
        table = self.memory.attention_table[rows, : attention_pages(int((context + lengths).max()))]
        columns = np.arange(table.shape[1], dtype=np.int32)
        before = columns < (context // PAGE_SIZE)[:, None]
        self._skipped[table[~before & (columns < -(-(context + lengths) // PAGE_SIZE)[:, None])]] = False
        skipped = self._skipped[table] & before
        if not skipped.any():
            return table, context
        order = np.argsort(skipped, axis=1, kind="stable")
        return np.take_along_axis(table, order, 1), context - PAGE_SIZE * skipped.sum(1, dtype=np.int32)

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Guess a chain for each request."""
        self._catch_up(requests)
        limits = [limit if self._has_pages(r, limit) else 1 for r, limit in zip(requests, limits, strict=True)]
        drafts = [Draft([]) for _ in requests]
        chosen = list(range(len(requests)))
        out = torch.cat([last for request in requests if (last := self._waiting[request].last) is not None])
        while True:
            for i, token in zip(chosen, self.model.lm_head(out).argmax(1).tolist(), strict=True):
                drafts[i].token_ids.append(token)
            longer = [n for n, i in enumerate(chosen) if len(drafts[i].token_ids) < limits[i]]
            if not longer:
                return drafts
            chosen, out = [chosen[n] for n in longer], out[longer]
            # The guesses stand behind the last token that is known.
            begins = [len(requests[i].token_ids) - 2 + len(drafts[i].token_ids) for i in chosen]
            tokens = [drafts[i].token_ids[-1] for i in chosen]
            out = self._forward([requests[i] for i in chosen], begins, [1] * len(chosen), tokens, out)

    def _has_pages(self, request: Request, limit: int) -> bool:
        """Take pages for the keys and values of guesses; return whether there are any."""
        assert request.row is not None
        fill = int(self.memory.fill[request.row])
        return limit == 1 or self.memory.extend(request.row, len(request.token_ids) + limit, fill)

    def forget(self, request: Request, publish: bool) -> None:
        """Compute or skip what still waits, for later requests that begin with the same tokens."""
        shared = publish and self.memory.prefixes is not None and request.row is not None
        if shared and request in self._waiting and self._num_waiting(request) > 0:
            if self._sleeps(request):
                self._skip(request, PAGE_SIZE * attention_pages(self._waiting[request].end))
            else:
                self._catch_up([request])
        self._waiting.pop(request, None)


def _rows(hidden: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows; if they are neighbours, without a copy."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return hidden[rows[0] : rows[-1] + 1]
    return hidden[list(rows)]
