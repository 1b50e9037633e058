"""What the linear-attention kernels are handed: the structs of arguments.h, made from the tensors of an operator."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, c_int64, c_void_p
from functools import cache
from typing import cast

import torch
from torch import Tensor

from kvbuffer.ops import dispatch
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import Decay, UpdateRule

#: Codes of the element types in the C interface.
STATE_DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
RECORD_DTYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}


class ShapeStruct(ctypes.Structure):
    """The dims of a call."""

    _fields_ = tuple((name, c_int64) for name in ("key_heads", "value_heads", "k", "v", "pairs", "decay_width"))


class TokensStruct(ctypes.Structure):
    """Pointers into the tokens' tensors."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "g", "beta", "removal_read", "removal_write")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "g_stride")),
    )


class StatesStruct(ctypes.Structure):
    """Pointers into a pool of states."""

    _fields_ = (("data", c_void_p), ("scales", c_void_p), ("dtype", c_int64))


class RecordsStruct(ctypes.Structure):
    """Pointers into pools of records and to the requests' pages."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values", "decays", "page_table")),
        *((name, c_int64) for name in ("table_stride", "page_size", "dtype")),
    )


#: Argument types of the kernels.
SHAPE, TOKENS, STATES, RECORDS = (
    POINTER(ShapeStruct),
    POINTER(TokensStruct),
    POINTER(StatesStruct),
    POINTER(RecordsStruct),
)


def shape_of(rule: UpdateRule, states: StatePool, key_heads: int) -> ShapeStruct:
    """Return the dims of a call."""
    _, value_heads, k, v = states.data.shape
    return ShapeStruct(key_heads, value_heads, k, v, rule.num_pairs, k if rule.decay is Decay.VECTOR else 1)


def tokens_of(tokens: Tokens) -> TokensStruct:
    """Return pointers into the tokens' tensors, and the strides of the rows that may have one."""
    q, k, v, g = tokens[:4]
    pointers = [None if x is None else x.data_ptr() for x in tokens]
    return TokensStruct(*pointers, q.stride(0), k.stride(0), v.stride(0), 0 if g is None else g.stride(0))


def states_of(states: StatePool) -> StatesStruct:
    """Return pointers into a pool of states."""
    data, scales = states
    return StatesStruct(data.data_ptr(), None if scales is None else scales.data_ptr(), STATE_DTYPES[data.dtype])


def records_of(records: RecordPages, page_table: Tensor) -> RecordsStruct:
    """Return pointers into pools of records and to the requests' pages."""
    pointers = [x.data_ptr() for x in (*records, page_table)]
    return RecordsStruct(*pointers, page_table.stride(0), records.page_size, RECORD_DTYPES[records.keys.dtype])


@cache
def kernel(name: str, *argtypes: type) -> Callable[..., None]:
    """Return a function of the compiled kernels, which the caller knows to be there."""
    function = getattr(dispatch.cpu_kernels(), name)
    function.argtypes, function.restype = argtypes, None
    return cast(Callable[..., None], function)
