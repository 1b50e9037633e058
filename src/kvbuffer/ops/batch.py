"""What one step hands to the model: a ragged batch of tokens and where each request's memory lies.

Operators that compute a whole layer, or all of them, take it as it is; the structs below are what their kernels see.

A request's share of a step is one segment, or two: most of a prompt in chunks, its last tokens into the buffer.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from torch import Tensor

_MOST_SHORT_TOKENS = 512


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
    def is_short(self) -> bool:
        """Whether calls from Python are a good part of its time: with more tokens, it is memory that counts."""
        return len(self.token_ids) <= _MOST_SHORT_TOKENS

    @cached_property
    def struct(self) -> BatchStruct:
        """The batch as the compiled kernels find it; the tensors have to outlive it."""
        sections = (_SectionStruct * len(self.sections))(*map(_section_struct, self.sections))
        tables = self.attention_page_table
        return BatchStruct(
            len(self.token_ids), len(self.context_lens), self.token_ids.data_ptr(), self.positions.data_ptr(),
            self.cu_seqlens.data_ptr(), self.context_lens.data_ptr(), tables.data_ptr(), tables.stride(0),
            self.rings.data_ptr(), _pointer(self.parents), _pointer(self.kept_rings),
            0 if self.kept_rings is None else len(self.kept_rings), ctypes.cast(sections, c_void_p), len(sections),
        )  # fmt: skip


class _SectionStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("form", "segments", "first_token")),
        *((name, c_void_p) for name in ("cu_seqlens", "slots", "page_table")),
        ("table_stride", c_int64),
        *((name, c_void_p) for name in ("fill", "fold", "fresh", "parents")),
    )


class BatchStruct(ctypes.Structure):
    """A batch as the C interface passes it; batch.h describes it."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "segments")),
        *((name, c_void_p) for name in ("token_ids", "positions", "cu_seqlens", "context_lens", "attention_table")),
        ("attention_stride", c_int64),
        *((name, c_void_p) for name in ("rings", "parents", "kept_rings")),
        ("num_kept", c_int64),
        ("sections", c_void_p),
        ("num_sections", c_int64),
    )


def _section_struct(section: LinearSection) -> _SectionStruct:
    table = section.page_table
    return _SectionStruct(
        section.form, len(section.slots), section.tokens.start, section.cu_seqlens.data_ptr(),
        section.slots.data_ptr(), table.data_ptr(), table.stride(0), section.fill.data_ptr(), section.fold.data_ptr(),
        section.fresh.data_ptr(), _pointer(section.parents),
    )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
