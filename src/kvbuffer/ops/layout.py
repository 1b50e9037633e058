"""What the linear-attention operators take: the tokens' inputs, the pool of states, the pools of records.

Dims: N tokens, HK key heads, HV value heads (a multiple of HK: value head h reads key head ``h // (HV // HK)``), K key
dim, V value dim, R pairs per token (:attr:`UpdateRule.num_pairs`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvbuffer.ops import memory
from kvbuffer.ops.rule import Decay, UpdateRule


class Tokens(NamedTuple):
    """Inputs of N tokens, all float32; rows of q, k, v and g may be strided or expanded, the rest is contiguous.

    Attributes:
        q: [N, HK, K] queries with the softmax scale folded in.
        k: [N, HK, K] keys.
        v: [N, HV, V] values.
        g: log-decays <= 0: [N, HV] (scalar), [N, HV, K] (vector) or None, as the rule says.
        beta: [N, HV] writing strengths under the delta rule, else None.
        removal_read: [N, HK, K] what a removal rule reads the state with (RWKV-7: the normalised key), else None.
        removal_write: [N, HK, K] the key it writes the removal to (RWKV-7: that key times the rate a), else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    removal_read: Tensor | None = None
    removal_write: Tensor | None = None

    def rows(self, index: slice) -> Tokens:
        """Return some of the tokens, as views."""
        return Tokens(self.q[index], self.k[index], self.v[index], *(None if x is None else x[index] for x in self[3:]))


class StatePool(NamedTuple):
    """The states of one layer.

    Attributes:
        data: [num_slots, HV, K, V] float32, bfloat16 or int8.
        scales: [num_slots, HV, K] float32, what an int8 row is to be multiplied by; None for the other dtypes.
    """

    data: Tensor
    scales: Tensor | None = None

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        value_heads: int,
        k: int,
        v: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> StatePool:
        """Return an uninitialised pool."""
        data = memory.empty(num_slots, value_heads, k, v, dtype=dtype, device=device)
        quantised = dtype == torch.int8
        return cls(data, memory.empty(num_slots, value_heads, k, device=device) if quantised else None)


class RecordPages(NamedTuple):
    """The record pages of one layer: what each token wrote, until it is folded into a state.

    Record i of a request lies in page ``page_table[b, i // page_size]`` at offset ``i % page_size``. A token's R pairs
    lie side by side in one record; of two, the removal comes first.

    Attributes:
        keys: [num_pages, HK, page_size, R * K] float32 or bfloat16.
        values: [num_pages, HV, page_size, R * V], written values u in the dtype of ``keys``.
        decays: [num_pages, HV, page_size, D] float32 log-decays of each token; D is K for vector decays, otherwise 1.
    """

    keys: Tensor
    values: Tensor
    decays: Tensor

    @property
    def page_size(self) -> int:
        """Records per page."""
        return self.keys.shape[2]

    @classmethod
    def allocate(
        cls,
        rule: UpdateRule,
        num_pages: int,
        page_size: int,
        key_heads: int,
        value_heads: int,
        k: int,
        v: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> RecordPages:
        """Return an uninitialised pool for a family's records."""
        width = k if rule.decay is Decay.VECTOR else 1
        pairs = rule.num_pairs
        return cls(
            memory.empty(num_pages, key_heads, page_size, pairs * k, dtype=dtype, device=device),
            memory.empty(num_pages, value_heads, page_size, pairs * v, dtype=dtype, device=device),
            memory.empty(num_pages, value_heads, page_size, width, device=device),
        )
