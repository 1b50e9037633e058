"""What the linear-attention layers remember of a prefix, as the blocks that hold it."""

from __future__ import annotations

from typing import NamedTuple


class Snapshot(NamedTuple):
    """The linear-attention layers' memory of the first ``end`` tokens of some text, held by references to blocks.

    The state covers the first ``checkpoint`` tokens, records the rest. A cursor moved back inside the records gives
    the memory of a shorter prefix, for as long as the convolution's inputs before it are still in the ring.

    Attributes:
        start: shortest prefix that can be had by moving the cursor back.
        end: tokens covered.
        checkpoint: tokens that are folded into the state; 0 without a state. checkpoint <= start <= end.
        slot: the state slot; None before the first fold (KV only).
        record_pages: pages with the records of tokens checkpoint .. end - 1.
        ring: slot of the convolutions' last inputs.
    """

    start: int
    end: int
    checkpoint: int
    slot: int | None
    record_pages: tuple[int, ...]
    ring: int
