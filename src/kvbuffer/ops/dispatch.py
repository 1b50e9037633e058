"""Which backend runs: compiled CPU kernels, Triton kernels, or portable PyTorch.

The choice can explain itself: ``kvbuffer info`` prints :func:`explain` and :func:`explain_operators`, and each kind of
fall-back is logged once.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from kvbuffer.ops import portable
from kvbuffer.ops.cpu.build import library
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import FAMILIES, UpdateRule

logger = logging.getLogger(__name__)

#: Codes by which the C interface names an element type.
DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}

# Modules that are a Backend, by device, asked in this order; ops/portable takes what they do not.
_BACKENDS = {"cpu": ("kvbuffer.ops.cpu.backend",), "cuda": ("kvbuffer.ops.triton.backend",)}


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
    backend, reason = _chosen(call)
    if backend is portable:
        _log_fallback(call, reason)
    return cast(Operators, backend)


def _chosen(call: Call) -> tuple[ModuleType, str]:
    """Return the first backend that covers a call, and why those before it do not."""
    return _choose(call, _BACKENDS.get(call.device, ()), cpu_kernels() if call.device == "cpu" else None)


# Chosen once: where an operator before has emptied the caches, asking again takes as long as all other checks.
@cache
def _choose(call: Call, names: tuple[str, ...], kernels: ctypes.CDLL | None) -> tuple[ModuleType, str]:
    """See :func:`_chosen`; what backends look at beside the call is part of the key."""
    reasons: list[str] = []
    for name in names:
        backend = import_module(name)
        ok, reason = cast(Backend, backend).supports(call)
        if ok:
            return backend, "; ".join(reasons)
        reasons.append(reason)
    return portable, "; ".join(reasons) or f"no kernels for {call.device}"


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
    """Return one line that says whether the CPU kernels run, and if not, why."""
    lib, detail = library()
    return f"cpu kernels: {detail}" if lib is not None else f"portable PyTorch: {detail}"


# Short names of the operators, and whether they take records.
_FORMS = {
    "recurrent_decode": ("recurrent", False),
    "chunked_prefill": ("prefill", False),
    "buffered_decode": ("decode", True),
    "buffered_verify": ("verify", True),
    "fold_records": ("fold", True),
}


def explain_operators() -> str:
    """Return a table per device that says which backend runs each family in each form, and why where it is portable."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return "\n".join(line for device in devices for line in _table(device))


def _table(device: str) -> list[str]:
    forms = "".join(f"{form:11s}" for form, _ in _FORMS.values())
    lines = [f"{f'operators on {device}':20s}{forms}(heads of 128 x 128, float32 states and records)"]
    for rule in FAMILIES.values():
        names, reasons = zip(*(_backend_of(device, rule, operator) for operator in _FORMS), strict=True)
        row = "".join(f"{name:11s}" for name in names)
        lines.append(f"  {rule.name:17s} {row}{'; '.join(dict.fromkeys(filter(None, reasons)))}".rstrip())
    return lines


def _backend_of(device: str, rule: UpdateRule, operator: str) -> tuple[str, str]:
    """Return the name of the backend that runs an operator, and the reason if that is the portable one."""
    with_records = _FORMS[operator][1]
    call = Call(device, rule, 128, 128, torch.float32, torch.float32 if with_records else None)
    backend, reason = _chosen(call)
    if backend is portable:
        return "portable", reason
    name = backend.__name__.split(".")[-2]
    # A backend may hand single operators on.
    if getattr(backend, operator) is getattr(portable, operator):
        return "portable", f"no {name} kernel for {_FORMS[operator][0]}"
    return name, ""
