"""Which form a batch should decode in: recurrent, buffered with length m, or KV only.

A step takes the time of moving its bytes and what its arithmetic adds to that, at rates that
:mod:`kvbuffer.ops.calibration` measures once per machine. For one request, with S the bytes of its state and e those of
a record::

    recurrent      read S, write S
    buffered       read S and on average (m + 1) / 2 records, append a record; write S once in m steps
    KV only        read a record per token of context, append a record

A token attends to (m - 1) / 2 records on average, and the fold reads all m once in m steps. Where only bytes count, and
writing them takes as long as reading them, the sum is least at ``m = sqrt(2 S / e)``: a longer buffer pays for records
what it saves in writes (paper §3.2). Where writes hide behind reads, as on many CPUs, or where records take arithmetic,
shorter buffers win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import torch

from kvbuffer.ops.rule import Decay, UpdateRule

#: Buffer lengths to choose from, close enough together that the best of them is within 1 % of the best of all.
BUFFER_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class LayerShape:
    """What one linear-attention layer keeps per request.

    Attributes:
        rule: the family.
        key_heads: HK.
        value_heads: HV, a multiple of HK; the value heads of a group share their keys' records.
        key_dim: K.
        value_dim: V.
        state_dtype: of the states.
        record_dtype: of the records' keys and values.
    """

    rule: UpdateRule
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    state_dtype: torch.dtype = torch.float32
    record_dtype: torch.dtype = torch.float32

    def with_dtypes(self, state_dtype: torch.dtype, record_dtype: torch.dtype) -> LayerShape:
        """Return the same layer in other dtypes."""
        return replace(self, state_dtype=state_dtype, record_dtype=record_dtype)

    @property
    def state_elements(self) -> int:
        """Elements of a request's state."""
        return self.value_heads * self.key_dim * self.value_dim

    @property
    def state_bytes(self) -> int:
        """Bytes of a request's state, with the scales of an int8 one."""
        scales = 4 * self.value_heads * self.key_dim if self.state_dtype == torch.int8 else 0
        return self.state_elements * self.state_dtype.itemsize + scales

    @property
    def record_elements(self) -> int:
        """Elements of a record that a step computes with: the keys count for every value head."""
        return self.rule.num_pairs * self.value_heads * (self.key_dim + self.value_dim)

    @property
    def record_bytes(self) -> int:
        """Bytes of one token's record, decays included: the keys are stored and read once per group."""
        width = self.key_dim if self.rule.decay is Decay.VECTOR else 1
        elements = self.rule.num_pairs * (self.key_heads * self.key_dim + self.value_heads * self.value_dim)
        return elements * self.record_dtype.itemsize + 4 * self.value_heads * width


class FormKind(Enum):
    """The ways to decode."""

    RECURRENT = "recurrent"
    BUFFERED = "buffered"
    KV_ONLY = "KV only"


class Form(NamedTuple):
    """A way to decode; ``buffer_len`` is m of the buffered one, otherwise 0."""

    kind: FormKind
    buffer_len: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value} m={self.buffer_len}" if self.buffer_len else self.kind.value


RECURRENT, KV_ONLY = Form(FormKind.RECURRENT), Form(FormKind.KV_ONLY)


class Traffic(NamedTuple):
    """Bytes of states and records that have to be read and written; activations stay in the cache."""

    read: float
    written: float

    def __mul__(self, factor: float) -> Traffic:  # type: ignore[override]
        return Traffic(self.read * factor, self.written * factor)

    @property
    def total(self) -> float:
        """Bytes both ways."""
        return self.read + self.written


class Bandwidth(NamedTuple):
    """Bytes per second of memory.

    Attributes:
        read: streaming through more than the last-level cache holds.
        write: writing back what is being read anyway, counting only the time on top of the reading.
    """

    read: float
    write: float

    def seconds(self, traffic: Traffic) -> float:
        """Return the least time that the traffic takes."""
        return traffic.read / self.read + traffic.written / self.write


@dataclass(frozen=True)
class Costs:
    """What the kernels of one family and one pair of dtypes cost on one machine.

    Measured with data past the cache: what follows the calls comes on top of moving the bytes, and is negative where a
    kernel moves them faster than the bandwidth's measurement did.

    Attributes:
        bandwidth: of the memory behind the cache.
        recurrent_call: seconds that a call of the recurrence takes however little it does.
        buffered_call: the same for the buffered form.
        recurrent: seconds per element of the state for one recurrent step.
        read: seconds per element of the state for reading it with one token.
        fold: seconds per element of the state for rewriting it and reading it with one token.
        fold_record: seconds per element of the state, record and pair for folding the records in.
        record: seconds per element of a record for attending to it beside a state.
        kv_only: seconds per request and value head without a state, however few the records.
        kv_only_record: seconds per element of a record for attending to it without a state.
    """

    bandwidth: Bandwidth
    recurrent_call: float = 0.0
    buffered_call: float = 0.0
    recurrent: float = 0.0
    read: float = 0.0
    fold: float = 0.0
    fold_record: float = 0.0
    record: float = 0.0
    kv_only: float = 0.0
    kv_only_record: float = 0.0


def step_traffic(form: Form, shape: LayerShape, context: int = 0) -> Traffic:
    """Return what one request moves per step, averaged over whole buffer cycles.

    Args:
        form: how it decodes.
        shape: the layer.
        context: tokens before this one, which KV only reads.
    """
    state, record, m = shape.state_bytes, shape.record_bytes, form.buffer_len
    if form.kind is FormKind.RECURRENT:
        return Traffic(state, state)
    if form.kind is FormKind.KV_ONLY:
        return Traffic(context * record, record)
    return Traffic(state + (m + 1) / 2 * record, state / m + record)


def step_seconds(form: Form, shape: LayerShape, batch: int, context: int, costs: Costs) -> float:
    """Return the expected time of one step of a layer, averaged over whole buffer cycles.

    Args:
        form: how the requests decode.
        shape: the layer.
        batch: requests in the step.
        context: tokens of each before this one.
        costs: of the shape's family and dtypes on this machine.
    """
    request = costs.bandwidth.seconds(step_traffic(form, shape, context)) + _arithmetic(form, shape, context, costs)
    return (costs.recurrent_call if form.kind is FormKind.RECURRENT else costs.buffered_call) + batch * request


def _arithmetic(form: Form, shape: LayerShape, context: int, costs: Costs) -> float:
    elements, record, m = shape.state_elements, shape.record_elements * costs.record, form.buffer_len
    if form.kind is FormKind.RECURRENT:
        return elements * costs.recurrent
    if form.kind is FormKind.KV_ONLY:
        return shape.value_heads * costs.kv_only + context * shape.record_elements * costs.kv_only_record
    # One step of m folds m records; the others read the state and 1 to m - 1 records.
    folding = elements * (costs.fold + m * shape.rule.num_pairs * costs.fold_record)
    return (folding + (m - 1) * elements * costs.read) / m + (m - 1) / 2 * record


def choose(
    shape: LayerShape,
    batch: int,
    context: int,
    costs: Costs,
    *,
    has_state: bool = False,
    buffer_lengths: Sequence[int] = BUFFER_LENGTHS,
) -> Form:
    """Return the form with the shortest expected step.

    Args:
        shape: the layer.
        batch: requests in the step.
        context: tokens of each request before this one.
        costs: of the shape's family and dtypes on this machine: :func:`kvbuffer.ops.calibration.costs_of`.
        has_state: whether the requests have been given states: records before them are gone, so KV only is out.
        buffer_lengths: the m to choose from; without any, the buffered form is out.
    """
    forms = [RECURRENT, *(Form(FormKind.BUFFERED, m) for m in buffer_lengths)]
    if not has_state:
        forms.append(KV_ONLY)
    return min(forms, key=lambda form: step_seconds(form, shape, batch, context, costs))
