"""Which backend runs: compiled CPU kernels, or portable PyTorch.

The choice can explain itself: ``kvbuffer info`` prints :func:`explain`, and the first fall-back of each kind is logged
once.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib import import_module
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from kvbuffer.ops.cpu.build import library
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import UpdateRule

logger = logging.getLogger(__name__)

#: Codes by which the C interface names an element type.
DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}

# Modules that are a Backend, asked in this order; ops/portable takes what they do not.
_BACKENDS = ("kvbuffer.ops.cpu.backend",)


class Call(NamedTuple):
    """What a backend has to cover.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        rule: the family.
        key_dim: K.
        value_dim: V.
        state_dtype: of the states.
        record_dtype: of the records' keys and values; None for operators without records.
    """

    device: str
    rule: UpdateRule
    key_dim: int
    value_dim: int
    state_dtype: torch.dtype
    record_dtype: torch.dtype | None


class Operators(Protocol):
    """The operators of :mod:`kvbuffer.ops.buffered` and :mod:`kvbuffer.ops.chunked`, where they are described."""

    def buffered_decode(
        self,
        rule: UpdateRule,
        tokens: Tokens,
        states: StatePool,
        slots: Tensor,
        records: RecordPages,
        page_table: Tensor,
        fill: Tensor,
        fold: Tensor,
    ) -> Tensor:
        """Decode one token per request."""
        ...

    def buffered_verify(
        self,
        rule: UpdateRule,
        tokens: Tokens,
        states: StatePool,
        slots: Tensor,
        records: RecordPages,
        page_table: Tensor,
        fill: Tensor,
        cu_seqlens: Tensor,
        parents: Tensor | None,
    ) -> Tensor:
        """Run new tokens against states and buffers."""
        ...

    def fold_records(
        self,
        rule: UpdateRule,
        states: StatePool,
        slots: Tensor,
        records: RecordPages,
        page_table: Tensor,
        count: Tensor,
        target_slots: Tensor,
    ) -> None:
        """Fold records into states."""
        ...

    def recurrent_decode(self, rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor) -> Tensor:
        """Decode one token per request without a buffer."""
        ...

    def chunked_prefill(
        self, rule: UpdateRule, tokens: Tokens, states: StatePool, slots: Tensor, cu_seqlens: Tensor, fresh: Tensor
    ) -> Tensor:
        """Run whole prompts."""
        ...


class Backend(Operators, Protocol):
    """Operators that cover some calls."""

    def supports(self, call: Call) -> tuple[bool, str]:
        """Return whether a call is covered, and if not, why."""
        ...


def backend_for(
    rule: UpdateRule, tokens: Tokens | None, states: StatePool, records: RecordPages | None = None
) -> Operators:
    """Return the backend for an operator on these tensors."""
    _, _, key_dim, value_dim = states.data.shape
    record_dtype = None if records is None else records.keys.dtype
    call = Call(states.data.device.type, rule, key_dim, value_dim, states.data.dtype, record_dtype)
    reasons = []
    for name in _BACKENDS:
        backend = cast(Backend, import_module(name))
        ok, reason = backend.supports(call)
        if ok:
            return backend
        reasons.append(reason)
    _log_fallback(call, "; ".join(reasons))
    return cast(Operators, import_module("kvbuffer.ops.portable"))


@cache
def _log_fallback(call: Call, reason: str) -> None:
    logger.info("portable PyTorch runs %s: %s", call, reason)


@cache
def cpu_kernels() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None when portable PyTorch is to be used instead."""
    lib, detail = library()
    if lib is None:
        logger.warning("CPU kernels are off, using portable PyTorch, which is much slower: %s", detail)
    return lib


def explain() -> str:
    """Return one line that says which backend runs and why."""
    lib, detail = library()
    return f"cpu kernels: {detail}" if lib is not None else f"portable PyTorch: {detail}"
