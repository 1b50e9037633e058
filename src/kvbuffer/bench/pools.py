"""Enough layers of states and records that a pass over them all finds nothing in the cache."""

from __future__ import annotations

from typing import Any

import torch

from kvbuffer.ops.cost import LayerShape
from kvbuffer.ops.dispatch import backend_for
from kvbuffer.ops.layout import RecordPages, StatePool

#: Records per page.
PAGE_SIZE = 8


class Pools:
    """States and record pages of some layers with the same batch of requests.

    Attributes:
        shape: of each layer.
        batch: requests.
        num_layers: how many layers there are.
        states: [num_layers * batch] slots.
        records: pages for ``capacity`` records per layer and request. Layers share pages once the pages by themselves
            exceed the working set: it matters that they come from memory, not what they hold.
        slots: per layer, the requests' slots, [batch] int32.
        no_slots: [batch] int32, slots of requests without states.
        page_tables: per layer, [batch, pages per request] int32.
    """

    def __init__(
        self, shape: LayerShape, batch: int, num_layers: int, capacity: int, working_set: int, device: str = "cpu"
    ) -> None:
        self.shape, self.batch, self.num_layers, self.device = shape, batch, num_layers, device
        dims = shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim
        self.states = StatePool.allocate(num_layers * batch, *dims[1:], shape.state_dtype, device)
        per_request = -(-capacity // PAGE_SIZE)
        per_layer = batch * per_request
        num_pages = min(num_layers * per_layer, max(per_layer, working_set // (PAGE_SIZE * shape.record_bytes)))
        self.records = RecordPages.allocate(
            shape.rule, num_pages, PAGE_SIZE, *dims, dtype=shape.record_dtype, device=device
        )
        for pool in (*self.states, *self.records):
            if pool is not None:
                pool.zero_()  # also takes the pages from the operating system
        requests = torch.arange(num_layers * batch, dtype=torch.int32, device=device)
        self.slots = list(requests.view(num_layers, batch))
        self.no_slots = torch.full_like(self.slots[0], -1)
        pages = torch.arange(num_layers * per_layer, dtype=torch.int32, device=device) % num_pages
        self.page_tables = list(pages.view(num_layers, batch, per_request))

    @classmethod
    def past_the_cache(
        cls, shape: LayerShape, batch: int, capacity: int, working_set: int, device: str = "cpu"
    ) -> Pools:
        """Return pools with as many layers as the states of ``working_set`` bytes take."""
        return cls(shape, batch, -(-working_set // (batch * shape.state_bytes)), capacity, working_set, device)

    def int32(self, value: int) -> torch.Tensor:
        """Return a number for every request, [batch] int32."""
        return torch.full_like(self.no_slots, value)

    def flags(self, value: bool) -> torch.Tensor:
        """Return a flag for every request, [batch] uint8."""
        return torch.full_like(self.no_slots, value, dtype=torch.uint8)

    def borders(self, tokens: int) -> torch.Tensor:
        """Return the borders between requests of this many tokens each, [batch + 1] int32."""
        return torch.arange(self.batch + 1, dtype=torch.int32, device=self.device) * tokens


def backend_name(pools: Pools, uses_records: bool = True) -> str:
    """Return which backend runs on these pools: the name of its package in kvbuffer.ops."""
    backend: Any = backend_for(pools.shape.rule, None, pools.states, pools.records if uses_records else None)
    return str(backend.__name__).split(".")[2]
