"""Which form the linear-attention layers decode in, and whose turn it is to fold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from kvbuffer.cache.shapes import LinearShape
from kvbuffer.ops.calibration import costs_of
from kvbuffer.ops.cost import BUFFER_LENGTHS, KV_ONLY, Costs, FormKind, LayerShape, choose, step_seconds
from kvbuffer.ops.rule import GATED_DELTANET

#: The longest buffer that is chosen on its own account: longer ones gain little and hold memory.
LONGEST_BUFFER = 32
#: Drafts bring several records at once, and a fold before them is a pass of its own: shorter buffers do not pay.
_LEAST_VERIFY_BUFFER = 16
#: The batch for which it is worked out how long a request does best without a state.
_TYPICAL_BATCH = 8


class FormPolicy:
    """Chooses by the measured cost model, unless the user has chosen.

    Args:
        shape: what a linear-attention layer keeps per request.
        costs: what its forms cost here.
        buffer_len: the user's choice; None for the cheapest of each batch.
        kv_only_len: the user's choice; None for as long as records cost less than a state, in time and in memory.
        largest_batch: requests that may decode together.
        speculative: drafts are verified, for which there must be a buffer at any time.

    Attributes:
        longest_buffer: the longest buffer that is ever chosen.
        kv_only_len: tokens that a request has before it gets a state.
    """

    def __init__(
        self,
        shape: LayerShape,
        costs: Costs,
        buffer_len: int | None,
        kv_only_len: int | None,
        largest_batch: int,
        speculative: bool = False,
    ) -> None:
        self._fixed = buffer_len
        lengths = [m for m in BUFFER_LENGTHS if m <= LONGEST_BUFFER]

        @cache
        def cheapest(batch: int) -> int:
            form = choose(shape, batch, 0, costs, has_state=True, buffer_lengths=lengths)
            return form.buffer_len if form.kind is FormKind.BUFFERED else 0

        self._cheapest = cheapest
        sizes = {1 << n for n in range(largest_batch.bit_length())} | {largest_batch}
        length = self.verify_len if speculative else self.buffer_len
        self.longest_buffer = max(1, *map(length, sizes))
        self.kv_only_len = _kv_only_len(shape, costs, lengths) if kv_only_len is None else kv_only_len

    @classmethod
    def for_model(
        cls,
        linear: LinearShape,
        state_dtype: torch.dtype,
        record_dtype: torch.dtype,
        buffer_len: int | None,
        kv_only_len: int | None,
        largest_batch: int,
        speculative: bool = False,
    ) -> FormPolicy:
        """Make the policy for a model's linear-attention layers; the first time on a machine, this measures."""
        heads = (linear.num_key_heads, linear.num_value_heads, linear.key_head_dim, linear.value_head_dim)
        shape = LayerShape(GATED_DELTANET, *heads, state_dtype, record_dtype)
        return cls(shape, costs_of(shape), buffer_len, kv_only_len, largest_batch, speculative)

    def buffer_len(self, batch: int) -> int:
        """Return the buffer length for a batch of ``batch`` requests with states; 0 for the plain recurrence."""
        if self._fixed is not None:
            return self._fixed
        return self._cheapest(_rounded(batch))

    def verify_len(self, batch: int) -> int:
        """Return how many records a request of such a batch has before they are folded, where it verifies drafts.

        It is :meth:`buffer_len`, unless that is short, or 0 because the plain recurrence is cheaper.
        """
        length = self.buffer_len(batch)
        return length if self._fixed is not None else max(length, _LEAST_VERIFY_BUFFER)


def _rounded(batch: int) -> int:
    """Batches of about the same size share one choice, so that the form does not flicker."""
    return 1 << (batch - 1).bit_length() if batch > 1 else 1


def folds_due(overdue: npt.NDArray[np.int32], num_filled: float) -> set[int]:
    """Return which of the requests of a step fold: the fullest of those that are due, as many as keep pace.

    Where a step writes n records, n / m buffers of m tokens have to be folded. No more than that are let fold at once,
    though requests that began together are due together: the time of a step stays even, and a fold is only put off.

    Args:
        overdue: for each request of the step, by how many records its buffer is longer than it should become.
        num_filled: buffers that the records of the step fill, parts of them added up.
    """
    due = np.flatnonzero(overdue >= 0)
    due = due[np.argsort(-overdue[due], kind="stable")]
    return set(due[: math.ceil(num_filled)].tolist())


def _kv_only_len(shape: LayerShape, costs: Costs, lengths: Sequence[int]) -> int:
    form = choose(shape, _TYPICAL_BATCH, 0, costs, has_state=True, buffer_lengths=lengths)
    limit = step_seconds(form, shape, _TYPICAL_BATCH, 0, costs)
    context = shape.state_bytes // shape.record_bytes
    while context and step_seconds(KV_ONLY, shape, _TYPICAL_BATCH, context, costs) > limit:
        context -= 1
    return context
