"""A text through a model's layers, grouped in any way, to see what a grouping costs in quality."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.cache.plan import MemoryPlan, attention_pages, plan_memory
from kvbuffer.cache.shapes import run_order
from kvbuffer.cache.store import allocate
from kvbuffer.cqil.reference import naive_group
from kvbuffer.errors import ConfigError
from kvbuffer.models.decoder import Decoder, DecoderLayer
from kvbuffer.ops.batch import LinearForm, LinearSection, ModelInputs
from kvbuffer.ops.norm import add_rms_norm
from kvbuffer.tokenizer import Tokenizer

# Rows whose logits are computed at a time.
_ROWS = 256


class Quality(NamedTuple):
    """How far a grouping leads from the model, over a text.

    Attributes:
        loss: mean negative log-likelihood of the text's tokens, nats.
        kl: mean divergence of the grouping's next-token distributions from the model's own, nats.
        agreement: share of tokens after which both find the same next token likeliest.
        accuracy: share of tokens after which the text goes on with the token that is likeliest.
    """

    loss: float
    kl: float
    agreement: float
    accuracy: float


class Tally:
    """Sums up the quality of rows of logits."""

    def __init__(self) -> None:
        self._sums, self._rows, self._targets = torch.zeros(4, dtype=torch.float64), 0, 0

    def add(self, own: Tensor, other: Tensor, targets: Tensor) -> None:
        """Count rows [N, vocab_size] of logits: the model's own, another's, and what comes next [N], -1 if nothing."""
        own, other = own.log_softmax(-1), other.log_softmax(-1)
        likeliest = other.argmax(-1)
        parts = (
            F.nll_loss(other, targets, ignore_index=-1, reduction="sum"),
            F.kl_div(other, own, reduction="sum", log_target=True),
            (own.argmax(-1) == likeliest).sum(),
            (targets == likeliest).sum(),
        )
        self._sums += torch.stack([part.double() for part in parts])
        self._rows += len(targets)
        self._targets += int((targets >= 0).sum())

    def quality(self) -> Quality:
        """Return the means."""
        loss, kl, agreement, accuracy = self._sums.tolist()
        return Quality(
            loss / self._targets, max(0.0, kl / self._rows), agreement / self._rows, accuracy / self._targets
        )


class TextModel:
    """A model with each layer's own memory, and windows of a text.

    Args:
        model: without groups.
        token_ids: [B, T] int64, B windows of the text.

    Attributes:
        model: as given.
        targets: [B * T] int64, what comes after each token and counts for loss and accuracy; -1 for nothing.
    """

    def __init__(self, model: Decoder, token_ids: Tensor) -> None:
        self.model = model
        self.targets = F.pad(token_ids[:, 1:], (0, 1), value=-1).flatten()
        plan = memory_for(model, *token_ids.shape)
        self._caches = allocate(model.config.cache_shape, plan)
        self._inputs = batch_of(token_ids, 0, plan)
        self._own = self.hidden()
        self._found: dict[tuple[tuple[tuple[int, ...], ...], int], Quality] = {}

    @torch.inference_mode()
    def hidden(
        self,
        groups: Sequence[tuple[int, ...]] = (),
        bypass: int = 0,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            groups: layers that are computed at once.
            bypass: D.
            observe: called with the index and the input [B * T, hidden] of each layer or group, by its first layer, and
                at last with the number of layers and what leaves them.

        Returns:
            [B * T, hidden] float32.
        """
        model, x = self.model, None
        residual = model.embed(self._inputs.token_ids)
        for unit in run_order(model.config.num_layers, groups):
            layers = [model.layers[index] for index in unit]
            caches = [self._caches[index] for index in unit]
            if observe is not None:
                observe(unit[0], residual if x is None else residual + x)
            if len(unit) == 1:
                x = layers[0].forward(x, residual, self._inputs, caches[0])
            else:
                x = naive_group(_alone(layers), bypass, x, residual, self._inputs, caches)
        hidden = add_rms_norm(x, residual, model.norm, model.config.rms_norm_eps)
        if observe is not None:
            observe(model.config.num_layers, residual)
        return hidden

    def quality(self, groups: Sequence[tuple[int, ...]], bypass: int = 0) -> Quality:
        """Return what a grouping does to the text's loss and to the model's distributions; measured once."""
        reach = min(bypass, max(map(len, groups), default=1) - 1)
        if (key := (tuple(groups), reach)) not in self._found:
            self._found[key] = self.compare(self.hidden(groups, reach) if groups else self._own)
        return self._found[key]

    @torch.inference_mode()
    def compare(self, hidden: Tensor) -> Quality:
        """Return the quality of hidden states [B * T, hidden] after the final norm, wherever they come from."""
        tally = Tally()
        for rows in torch.arange(len(hidden)).split(_ROWS):
            tally.add(self.model.lm_head(self._own[rows]), self.model.lm_head(hidden[rows]), self.targets[rows])
        return tally.quality()


def read_windows(path: Path, tokenizer: Tokenizer, tokens: int, window: int) -> Tensor:
    """Return the beginning of a text file as windows of tokens.

    Args:
        path: UTF-8 text.
        tokenizer: the model's.
        tokens: at most so many in all.
        window: tokens of a window.

    Returns:
        [B, window] int64.

    Raises:
        ConfigError: the file cannot be read, or has less than one window.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the text {path}: {error}") from None
    ids = tokenizer.encode(text)[:tokens]
    if len(ids) < window:
        raise ConfigError(f"{path} has {len(ids)} tokens, fewer than a window of {window}: give a longer text")
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)


def memory_for(model: Decoder, requests: int, tokens: int) -> MemoryPlan:
    """Return a plan with a state and attention pages for each of so many requests of so many tokens."""
    plan = plan_memory(
        model.config.cache_shape, budget=1 << 46, max_model_len=tokens, max_num_seqs=requests, buffer_len=1,
        kv_only_len=0, dtype=model.dtype, state_dtype=torch.float32, record_dtype=torch.float32,
    )  # fmt: skip
    return dataclasses.replace(
        plan,
        num_slots=requests,
        num_rings=requests,
        num_record_pages=requests,
        num_attention_pages=requests * attention_pages(tokens),
    )


def batch_of(token_ids: Tensor, context: int, plan: MemoryPlan) -> ModelInputs:
    """Return the next tokens of requests that have memory of their own, each as much, by :func:`memory_for`.

    Args:
        token_ids: [B, T] int64. In chunks into the states where nothing came before; T = 1 is decoded.
        context: tokens that each request has so far; 0 unless T = 1.
        plan: the memory.

    Returns:
        A batch that asks for the logits of all tokens.
    """
    requests, count = token_ids.shape
    numbers = torch.arange(requests, dtype=torch.int32)
    pages = plan.num_attention_pages // requests
    borders = torch.arange(requests + 1, dtype=torch.int32) * count
    section = LinearSection(
        form=LinearForm.RECURRENT if context else LinearForm.CHUNKED,
        tokens=slice(0, requests * count),
        cu_seqlens=borders,
        slots=numbers,
        page_table=torch.zeros(requests, 1, dtype=torch.int32),
        fill=torch.zeros(requests, dtype=torch.int32),
        fold=torch.zeros(requests, dtype=torch.uint8),
        fresh=torch.full((requests,), context == 0, dtype=torch.uint8),
    )
    return ModelInputs(
        token_ids=token_ids.flatten(),
        positions=(context + torch.arange(count, dtype=torch.int32)).repeat(requests),
        cu_seqlens=borders,
        context_lens=torch.full((requests,), context, dtype=torch.int32),
        attention_page_table=(numbers[:, None] * pages + torch.arange(pages, dtype=torch.int32)).contiguous(),
        rings=numbers,
        logits_rows=torch.arange(requests * count),
        sections=(section,),
    )


def _alone(layers: Sequence[object]) -> list[DecoderLayer]:
    return [layer for layer in layers if isinstance(layer, DecoderLayer)]
