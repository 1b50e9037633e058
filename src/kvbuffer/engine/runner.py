"""Runs one scheduled step through the model: does the work that memory needs first, builds the ragged batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import attention_pages, record_pages
from kvbuffer.cache.residency import Residency
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.cache.work import do_work
from kvbuffer.engine.scheduler import Segment
from kvbuffer.models.decoder import Decoder
from kvbuffer.ops.batch import LinearForm, LinearSection, ModelInputs

Int32 = npt.NDArray[np.int32]


class StepOutput(NamedTuple):
    """What a step computed.

    Attributes:
        logits: [R, vocab_size], in the batch's order.
        num_logits: how many of them are each segment's: one after the last known token of its request, if that is now
            computed, and one after each token of its draft; where a prompt is scored, one after each token that has
            none yet.
        hidden: [N, hidden_size], of all tokens after the final norm; None unless needed.
    """

    logits: Tensor
    num_logits: list[int]
    hidden: Tensor | None = None


class Runner:
    """The model and its memory.

    Args:
        model: the decoder.
        caches: its layers' memory.
        memory: which of it belongs to whom.
        needs_hidden: whether steps return the hidden states.
    """

    def __init__(
        self,
        model: Decoder,
        caches: Sequence[LinearCache | AttentionCache],
        memory: RequestMemory,
        needs_hidden: bool = False,
    ) -> None:
        self.model, self.caches, self.memory, self.needs_hidden = model, caches, memory, needs_hidden
        self.residency = Residency(memory.pools, memory.plan, caches)

    def do_memory_work(self) -> None:
        """Do the copies and folds that memory has noted."""
        work, self.memory.work = self.memory.work, []
        do_work(work, self.caches)

    def run(self, batch: Sequence[Segment]) -> StepOutput:
        """Compute the scheduled tokens.

        Args:
            batch: at least one segment, sorted by form; a request's segments in the order of its tokens.
        """
        self.do_memory_work()
        self.residency.settle()
        inputs, num_logits = self._inputs(batch)
        if self.needs_hidden:
            logits, hidden = self.model.forward_with_hidden(inputs, self.caches)
            return StepOutput(logits, num_logits, hidden)
        return StepOutput(self.model.forward(inputs, self.caches), num_logits)

    def _inputs(self, batch: Sequence[Segment]) -> tuple[ModelInputs, list[int]]:
        """Return the ragged batch, and after how many tokens of each segment logits are wanted."""
        memory = self.memory
        rows = np.fromiter((segment.request.row for segment in batch), np.int32, len(batch))
        counts = np.fromiter((segment.num_tokens for segment in batch), np.int32, len(batch))
        context, fill = self._cursors(batch, rows)
        borders = np.zeros(len(batch) + 1, np.int32)
        np.cumsum(counts, out=borders[1:])
        token_ids = itertools.chain.from_iterable(
            itertools.chain(segment.request.token_ids[begin : begin + segment.num_tokens], segment.draft.token_ids)
            for segment, begin in zip(batch, context, strict=True)
        )
        # Where a token lies among its request's = context of its segment + its place in it.
        slots = np.arange(borders[-1], dtype=np.int32) + np.repeat(context - borders[:-1], counts)
        first_logits = np.fromiter((segment.request.first_logits for segment in batch), np.int32, len(batch))
        wanted = slots >= np.repeat(first_logits, counts)
        parents, positions = _trees(batch, slots, borders)
        pages = attention_pages(int((context + counts).max()))
        kept = [
            (memory.kept_ring[segment.request.row], i, segment.kept) for i, segment in enumerate(batch) if segment.kept
        ]
        inputs = ModelInputs(
            token_ids=torch.from_numpy(np.fromiter(token_ids, np.int64, borders[-1])),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(borders),
            context_lens=torch.from_numpy(context),
            attention_page_table=torch.from_numpy(memory.attention_table[rows, :pages]),
            rings=torch.from_numpy(memory.ring[rows]),
            logits_rows=torch.from_numpy(np.flatnonzero(wanted)),
            sections=tuple(self._sections(batch, rows, context, fill, borders, parents)),
            parents=None if parents is None else torch.from_numpy(parents),
            kept_rings=torch.from_numpy(np.array(kept, np.int32)) if kept else None,
        )
        return inputs, np.add.reduceat(wanted, borders[:-1], dtype=np.int64).tolist()

    def _cursors(self, batch: Sequence[Segment], rows: Int32) -> tuple[Int32, Int32]:
        """Return the tokens and the records before each segment, those of the same step included."""
        context = np.fromiter((segment.request.num_computed_tokens for segment in batch), np.int32, len(batch))
        chunks = {s.request.request_id: s.num_tokens for s in batch if s.form is LinearForm.CHUNKED}
        if chunks:
            # The end of a prompt whose beginning is in this step, too.
            for i, segment in enumerate(batch):
                if segment.form is LinearForm.APPENDED:
                    context[i] += chunks.get(segment.request.request_id, 0)
        return context, self.memory.fill[rows]

    def _sections(
        self,
        batch: Sequence[Segment],
        rows: Int32,
        context: Int32,
        fill: Int32,
        borders: Int32,
        parents: Int32 | None,
    ) -> list[LinearSection]:
        memory, sections, begin = self.memory, [], 0
        for form, group in itertools.groupby(batch, key=lambda segment: segment.form):
            folds = [segment.fold for segment in group]
            end = begin + len(folds)
            own, own_fill = rows[begin:end], fill[begin:end]
            width = record_pages(int(own_fill.max()) + int(np.diff(borders[begin : end + 1]).max()))
            tokens = slice(int(borders[begin]), int(borders[end]))
            in_trees = parents if form is LinearForm.VERIFIED else None
            sections.append(
                LinearSection(
                    form=form,
                    tokens=tokens,
                    cu_seqlens=torch.from_numpy(borders[begin : end + 1] - borders[begin]),
                    slots=torch.from_numpy(memory.slot[own]),
                    page_table=torch.from_numpy(memory.record_table[own, : max(1, width)]),
                    fill=torch.from_numpy(own_fill),
                    fold=torch.tensor(folds, dtype=torch.uint8),
                    fresh=torch.from_numpy((context[begin:end] == 0).astype(np.uint8)),
                    parents=None if in_trees is None else torch.from_numpy(in_trees[tokens]),
                )
            )
            begin = end
        return sections


def _trees(batch: Sequence[Segment], slots: Int32, borders: Int32) -> tuple[Int32 | None, Int32]:
    """Return the token of its segment that each token follows, None where all are chains; and the tokens' positions.

    Args:
        batch: the segments.
        slots: [N], where each token lies among its request's: its position, if it is in a chain.
        borders: [S + 1], of the segments.
    """
    if all(segment.draft.parents is None for segment in batch):
        return None, slots
    positions = slots.copy()
    parents = np.arange(borders[-1], dtype=np.int32) - np.repeat(borders[:-1], np.diff(borders)) - 1
    for segment, end in zip(batch, borders[1:].tolist(), strict=True):
        if segment.draft.parents is not None:
            # The token before the draft is the segment's first.
            begin = end - len(segment.draft.parents)
            for i, parent in enumerate(segment.draft.parents, begin):
                parents[i] = parent + 1
                positions[i] = positions[begin + parent] + 1
    return parents, positions
