"""Checks of the operators' arguments: what would crash a kernel gets an error that names the argument.

Shapes, dtypes, devices and strides only. Values are trusted: to look at slots, pages, fills or borders would cost a
pass over them, and on a GPU a wait for it. All functions raise

    TypeError: an argument is missing, is none that the family takes, or has another dtype.
    ValueError: an argument's shape, device or strides do not fit the other arguments.

The checks of ``buffered_decode`` take about 10 us, most of it for reading the attributes of 13 tensors; what these are
compared with is worked out once per shape of call.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import Correction, Decay, UpdateRule

_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
_RECORD_DTYPES = (torch.float32, torch.bfloat16)

# Arguments whose rows may lie apart.
_STRIDED = ("tokens.q", "tokens.k", "tokens.v", "tokens.g", "page_table")
# Vectors of flags; all others hold indices.
_FLAGS = ("fold", "fresh")

# An argument's name, dtype and shape; no dtype if it must be None.
_Spec = tuple[str, torch.dtype | None, tuple[int, ...]]
_Metadata = tuple[torch.dtype, tuple[int, ...]]


def check_operands(
    rule: UpdateRule, states: StatePool, tokens: Tokens | None = None, records: RecordPages | None = None
) -> None:
    """Check states, and the tokens and records that meet them, against the family and one another."""
    own = _metadata("states.data", states.data)
    of_tokens = None if tokens is None else _metadata("tokens.k", tokens.k)
    of_records = None if records is None else _metadata("records.keys", records.keys)
    specs = _operand_specs(rule, own, of_tokens, of_records)
    _check(specs, (*states, *(tokens or ()), *(records or ())), states.data.device)


def check_vectors(length: int, device: torch.device, **vectors: Tensor) -> None:
    """Check that the named arguments are [length], flags uint8 and indices int32."""
    specs = [(name, torch.uint8 if name in _FLAGS else torch.int32, (length,)) for name in vectors]
    _check(specs, vectors.values(), device)


def check_page_table(page_table: Tensor, requests: int, device: torch.device) -> None:
    """Check that a page table is [requests, P] int32."""
    _, shape = _metadata("page_table", page_table)
    _, width = _of_rank("page_table", shape, "B, P")
    _check([("page_table", torch.int32, (requests, width))], [page_table], device)


def check_length(name: str, x: Tensor) -> int:
    """Check that an argument is one-dimensional and return its length."""
    return _of_rank(name, _metadata(name, x)[1], "B")[0]


@lru_cache(maxsize=4096)
def _operand_specs(
    rule: UpdateRule, states: _Metadata, tokens: _Metadata | None, records: _Metadata | None
) -> list[_Spec]:
    """What states, tokens and records must be, given ``states.data``, ``tokens.k`` and ``records.keys``."""
    dtype, shape = states
    _check_dtype("states.data", dtype, _STATE_DTYPES)
    _, value_heads, key_dim, value_dim = _of_rank("states.data", shape, "num_slots, HV, K, V")
    specs: list[_Spec] = [("states.data", dtype, shape)]

    def add(name: str, *dims: int, taken: bool = True) -> None:
        specs.append((name, torch.float32 if taken else None, dims))

    add("states.scales", *shape[:3], taken=dtype is torch.int8)
    vector = rule.decay is Decay.VECTOR
    key_heads = None
    if tokens is not None:
        n, key_heads, _ = _of_rank("tokens.k", tokens[1], "N, HK, K")
        keys, decays = (n, key_heads, key_dim), (n, value_heads, key_dim) if vector else (n, value_heads)
        removal = rule.correction is Correction.REMOVAL
        add("tokens.q", *keys)
        add("tokens.k", *keys)
        add("tokens.v", n, value_heads, value_dim)
        add("tokens.g", *decays, taken=rule.decay is not Decay.NONE)
        add("tokens.beta", n, value_heads, taken=rule.correction is Correction.DELTA)
        add("tokens.removal_read", *keys, taken=removal)
        add("tokens.removal_write", *keys, taken=removal)
    if records is not None:
        dtype, shape = records
        _check_dtype("records.keys", dtype, _RECORD_DTYPES)
        pages, heads, size, _ = _of_rank("records.keys", shape, "num_pages, HK, page_size, R * K")
        key_heads = heads if key_heads is None else key_heads
        specs.append(("records.keys", dtype, (pages, key_heads, size, rule.num_pairs * key_dim)))
        specs.append(("records.values", dtype, (pages, value_heads, size, rule.num_pairs * value_dim)))
        add("records.decays", pages, value_heads, size, key_dim if vector else 1)
    if not key_heads or value_heads % key_heads:
        raise ValueError(f"{value_heads} value heads are no multiple of {key_heads} key heads")
    return specs


def _check(specs: Iterable[_Spec], tensors: Iterable[Tensor | None], device: torch.device) -> None:
    for (name, dtype, shape), x in zip(specs, tensors, strict=True):
        if dtype is None:
            if x is not None:
                raise TypeError(f"{name} must be None for this family or dtype of states")
        elif not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, is {type(x).__name__}")
        elif x.dtype is not dtype:
            raise TypeError(f"{name} must be {dtype}, is {x.dtype}")
        elif x.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, has {list(x.shape)}")
        elif x.device != device:
            raise ValueError(f"{name} must be on {device} like the states, is on {x.device}")
        elif not x.is_contiguous() and not (name in _STRIDED and x[0].is_contiguous()):
            within = " within each row" if name in _STRIDED else ""
            raise ValueError(f"{name} must be contiguous{within}, has strides {x.stride()}")


def _metadata(name: str, x: Tensor) -> _Metadata:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, is {type(x).__name__}")
    return x.dtype, x.shape


def _check_dtype(name: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    if dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(map(str, allowed))}, is {dtype}")


def _of_rank(name: str, shape: tuple[int, ...], dims: str) -> tuple[int, ...]:
    if len(shape) != dims.count(",") + 1:
        raise ValueError(f"{name} must have shape [{dims}], has {list(shape)}")
    return shape
