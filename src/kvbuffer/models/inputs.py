"""What one step hands to the model: a ragged batch of tokens and where each request's memory lies.

A request's share of a step is one segment, or two: most of a prompt in chunks, its last tokens into the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class LinearForm(IntEnum):
    """How the linear-attention layers compute a segment; the segments of a batch are sorted by it."""

    RECURRENT = 0
    """One token; the state is read and rewritten."""
    BUFFERED = 1
    """One token; its record is appended, after a fold of the others where asked for."""
    CHUNKED = 2
    """Tokens of a prompt, into the state."""
    APPENDED = 3
    """Any number of tokens, whose records are appended: the end of a prompt, or a whole one without a state."""
    VERIFIED = 4
    """A token and drafts of what follows it, whose records are appended; those of rejected drafts are overwritten."""


@dataclass(frozen=True)
class LinearSection:
    """The segments of a batch that the linear-attention layers compute in one call. S segments.

    Attributes:
        form: how.
        tokens: which tokens of the batch.
        cu_seqlens: [S + 1] int32, borders of the segments among these tokens.
        slots: [S] int32, each request's state; -1 for none (KV only).
        page_table: [S, P] int32, record pages.
        fill: [S] int32, records in the buffer before this step.
        fold: [S] uint8, fold those records into the state first (buffered form).
        fresh: [S] uint8, nothing came before: the state starts at zero (chunked form).
        parents: the rows of :attr:`ModelInputs.parents` (verified form).
    """

    form: LinearForm
    tokens: slice
    cu_seqlens: Tensor
    slots: Tensor
    page_table: Tensor
    fill: Tensor
    fold: Tensor
    fresh: Tensor
    parents: Tensor | None = None


@dataclass(frozen=True)
class ModelInputs:
    """A ragged batch: N tokens of S segments, one after the other.

    Attributes:
        token_ids: [N] int64.
        positions: [N] int32, how many tokens are before each one in its text.
        cu_seqlens: [S + 1] int32, borders of the segments among the tokens.
        context_lens: [S] int32, tokens of each segment's request before it.
        attention_page_table: [S, P] int32, pages of keys and values.
        rings: [S] int32, where the convolutions keep each request's last inputs.
        logits_rows: [R] int64, tokens whose next-token logits are wanted.
        sections: the segments by form, together all of them.
        parents: [N] int32, the token of its segment that each one follows, -1 for what was before; None where all are
            chains.
        kept_rings: [M, 3] int32, further rings that the convolutions leave their inputs in, as
            :func:`~kvbuffer.ops.conv.causal_conv` takes them; None for none.
    """

    token_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    context_lens: Tensor
    attention_page_table: Tensor
    rings: Tensor
    logits_rows: Tensor
    sections: tuple[LinearSection, ...]
    parents: Tensor | None = None
    kept_rings: Tensor | None = None

    @property
    def decodes(self) -> bool:
        """Whether the batch is one token of each request, all in the same form."""
        return len(self.sections) == 1 and self.sections[0].form in (LinearForm.RECURRENT, LinearForm.BUFFERED)

    @property
    def fold(self) -> Tensor | None:
        """Which requests of such a batch fold their records; None for the recurrence, which has none."""
        part = self.sections[0]
        return part.fold if part.form is LinearForm.BUFFERED else None
