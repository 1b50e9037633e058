"""Timing of one family at one batch: every form and dtype, and the memory's bandwidth, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch

from kvbuffer.bench.accuracy import error_limit, sample_error
from kvbuffer.bench.competitors import competitors
from kvbuffer.bench.forms import TimedForm, recurrent
from kvbuffer.bench.pools import Pools, backend_name
from kvbuffer.ops.calibration import bandwidth_from, bandwidth_probes, random_tokens, seconds_of
from kvbuffer.ops.cost import Bandwidth, LayerShape

# A slow operator goes through fewer layers than make up the working set: it is not memory that it waits for.
_PASS_S = 0.25
# Nor is it timed in every round: its passes are long enough to trust fewer of them.
_CASE_S, _LEAST_ROUNDS = 1.0, 3


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        family: name of the rule.
        form: name of the form.
        state_dtype: of the states, "" without any.
        record_dtype: of the records, "" without any.
        batch: requests per call.
        backend: which of our backends ran it, or whose it is.
        layers: that a pass went through; times the batch and a state's bytes, the working set.
        tokens: per request and call.
        error: RMS error of a sample against float64, relative to the RMS of the outputs.
        gate: why there is no speed, "" where the error is within its limit.
        seconds: median time of a call.
        bytes: that a call has to move at least: states and records.
        bandwidth: those bytes over the time.
        of_bound: least time for those bytes at the bandwidth measured in the same round, over the time, the median over
            rounds; None where arithmetic binds.
        vs_recurrent: time per token over that of the recurrence with float32 states.
    """

    family: str
    form: str
    state_dtype: str
    record_dtype: str
    batch: int
    backend: str
    layers: int
    tokens: int
    error: float
    gate: str
    seconds: float | None = None
    bytes: float | None = None
    bandwidth: float | None = None
    of_bound: float | None = None
    vs_recurrent: float | None = None


@dataclass(frozen=True)
class _Case:
    """A form on some pools, and a call that runs a pass of it."""

    form: TimedForm
    pools: Pools
    row: Row
    layers: int
    run_pass: Callable[[], None]


def measure(
    shape: LayerShape,
    tiers: Sequence[tuple[torch.dtype, torch.dtype]],
    forms: Sequence[TimedForm],
    batch: int,
    working_set: int,
    rounds: int,
    device: str = "cpu",
) -> tuple[list[Row], Bandwidth]:
    """Return a row per form and pair of dtypes, and the bandwidth that the bounds are computed with.

    Args:
        shape: the layer; its dtypes do not matter.
        tiers: dtypes of states and records. The float32 recurrence is measured in any case.
        forms: what to time.
        batch: requests per call.
        working_set: bytes of states that a pass goes through.
        rounds: how often each pass is timed at most, in turns; the median counts.
        device: where to run.
    """
    cases = list(_cases(shape, tiers, forms, batch, working_set, device))
    probes = bandwidth_probes(device, working_set)
    calls: dict[str | int, Callable[[], object]] = dict(probes.items())
    calls |= {index: case.run_pass for index, case in enumerate(cases) if not case.row.gate}
    times: dict[str | int, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if name in probes or len(times[name]) < _LEAST_ROUNDS or sum(times[name]) < _CASE_S:
                times[name].append(seconds_of(call, device))
    # A virtual machine's bandwidth may change twofold from one second to the next: rounds are compared by themselves.
    by_round = zip(*(times[name] for name in probes), strict=True)
    bandwidths = [bandwidth_from(dict(zip(probes, seconds, strict=True)), working_set) for seconds in by_round]
    rows = [_timed(case, times.get(index), bandwidths) for index, case in enumerate(cases)]
    return _compared(rows), bandwidth_from({name: median(times[name]) for name in probes}, working_set)


def _cases(
    shape: LayerShape,
    tiers: Sequence[tuple[torch.dtype, torch.dtype]],
    forms: Sequence[TimedForm],
    batch: int,
    working_set: int,
    device: str,
) -> Iterator[_Case]:
    baseline = (torch.float32, torch.float32)
    seen = set()
    for tier in [baseline, *(tier for tier in tiers if tier != baseline)]:
        tier_shape = shape.with_dtypes(*tier)
        wanted = list(forms) if tier in tiers else []
        if tier == baseline:
            wanted = [recurrent(), *(form for form in wanted if form != recurrent())]
            wanted += competitors(shape.rule, device)
        capacity = max(1, *(form.capacity for form in wanted))
        pools = Pools.past_the_cache(tier_shape, batch, capacity, working_set, device)
        for form in wanted:
            used = form, tier[0] if form.uses_state else None, tier[1] if form.uses_records else None
            if used not in seen:
                seen.add(used)
                yield _case(form, pools, device)


def _case(form: TimedForm, pools: Pools, device: str) -> _Case:
    shape, batch = pools.shape, pools.batch
    heads = shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim
    tokens = random_tokens(shape.rule, batch * form.tokens, *heads, device)
    step = form.bind(pools)
    error, limit = sample_error(form, shape, device), error_limit(form, shape)
    step(form.calls, 0, tokens)
    call_s = seconds_of(lambda: step(form.calls, 0, tokens), device)
    layers = min(pools.num_layers, max(1, int(_PASS_S / call_s)))

    def run_pass() -> None:
        form.run_pass(step, layers, tokens)

    row = Row(
        family=shape.rule.name,
        form=form.name,
        state_dtype=_dtype_name(shape.state_dtype) if form.uses_state else "",
        record_dtype=_dtype_name(shape.record_dtype) if form.uses_records else "",
        batch=batch,
        backend=form.peer or backend_name(pools, form.uses_records),
        layers=layers,
        tokens=form.tokens,
        error=error,
        gate="" if error <= limit else f"error {error:.1e} is above {limit:.0e}",
    )
    return _Case(form, pools, row, layers, run_pass)


def _timed(case: _Case, times: list[float] | None, bandwidths: Sequence[Bandwidth]) -> Row:
    if times is None:
        return case.row
    calls = case.form.calls_in_pass(case.layers)
    seconds = median(times) / calls
    traffic = case.form.traffic(case.pools.shape) * case.pools.batch
    return replace(
        case.row,
        seconds=seconds,
        bytes=traffic.total,
        bandwidth=traffic.total / seconds,
        of_bound=median(
            bandwidth.seconds(traffic) * calls / time for bandwidth, time in zip(bandwidths, times, strict=False)
        )
        if case.form.streams
        else None,
    )


def _compared(rows: list[Row]) -> list[Row]:
    """Add the ratios to the float32 recurrence, which comes first."""
    baseline = rows[0].seconds
    return [
        row
        if row.seconds is None or baseline is None
        else replace(row, vs_recurrent=row.seconds / row.tokens / baseline)
        for row in rows
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
