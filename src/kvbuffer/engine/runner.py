"""Runs one scheduled step through the model: builds the ragged batch, keeps the buffers' fills."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import attention_pages
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.engine.scheduler import ScheduledRequest
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.inputs import BufferView, ModelInputs


class Runner:
    """The model and its memory.

    Args:
        model: the decoder.
        caches: its layers' memory.
        memory: which of it belongs to whom.

    Attributes:
        num_folds: buffers folded into their states so far, counted per request.
    """

    def __init__(self, model: Decoder, caches: list[LinearCache | AttentionCache], memory: RequestMemory) -> None:
        self.model, self.caches, self.memory = model, caches, memory
        self.num_folds = 0

    def run(self, batch: Sequence[ScheduledRequest]) -> Tensor:
        """Compute the scheduled tokens and advance each request.

        Args:
            batch: at least one request, decoding ones first.

        Returns:
            Logits [R, vocab_size] of the requests whose known tokens are now all computed, in the batch's order.
        """
        inputs = self._inputs(batch)
        logits = self.model.forward(inputs, self.caches)
        view = inputs.buffer
        decoded, folded = view.slots.numpy()[: view.num_decodes], view.fold.numpy()[: view.num_decodes]
        self.memory.fill[decoded] = np.where(folded, 1, self.memory.fill[decoded] + 1)
        self.num_folds += int(folded.sum())
        for request, count in batch:
            request.num_computed_tokens += count
        return logits

    def _inputs(self, batch: Sequence[ScheduledRequest]) -> ModelInputs:
        memory = self.memory
        slots = np.fromiter((request.slot for request, _ in batch), np.int32, len(batch))
        counts = np.fromiter((count for _, count in batch), np.int32, len(batch))
        context = np.fromiter((request.num_computed_tokens for request, _ in batch), np.int32, len(batch))
        borders = np.zeros(len(batch) + 1, np.int32)
        np.cumsum(counts, out=borders[1:])
        token_ids = itertools.chain.from_iterable(
            request.token_ids[request.num_computed_tokens : request.num_computed_tokens + count]
            for request, count in batch
        )
        # Position of a token = context of its request + its place among the request's new tokens.
        positions = np.arange(borders[-1], dtype=np.int32) + np.repeat(context - borders[:-1], counts)
        complete = [
            border - 1
            for border, (request, count) in zip(borders[1:], batch, strict=True)
            if request.num_computed_tokens + count == len(request.token_ids)
        ]
        pages = attention_pages(int((context + counts).max()))
        fill = memory.fill[slots]
        return ModelInputs(
            token_ids=torch.from_numpy(np.fromiter(token_ids, np.int64, borders[-1])),
            positions=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(borders),
            context_lens=torch.from_numpy(context),
            attention_page_table=torch.from_numpy(memory.attention_table[slots, :pages]),
            logits_rows=torch.tensor(complete, dtype=torch.int64),
            buffer=BufferView(
                num_decodes=sum(not request.is_prefilling for request, _ in batch),
                slots=torch.from_numpy(slots),
                page_table=torch.from_numpy(memory.record_table[slots]),
                fill=torch.from_numpy(fill),
                fold=torch.from_numpy((fill == memory.plan.buffer_len).astype(np.uint8)),
                fresh=torch.from_numpy((context == 0).astype(np.uint8)),
            ),
        )
