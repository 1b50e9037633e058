"""The numbers behind :mod:`kvbuffer.ops.cost`, measured once per machine and kept beside the compiled kernels.

Bandwidth is measured on tensors past the last-level cache, the kernels' arithmetic on states that stay in it. The
time of a call and the time per head come from two calls of different size; minima over interleaved rounds keep other
processes' noise out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from kvbuffer.ops.buffered import buffered_decode, recurrent_decode
from kvbuffer.ops.cost import KV_ONLY, Bandwidth, Costs, LayerShape, step_traffic
from kvbuffer.ops.cpu.build import cache_dir, library
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import Correction, Decay, UpdateRule

K = TypeVar("K")

_DIM = 128
# Records in the buffer at the two points between which the cost of a record is measured.
_FEW, _MANY = 1, 17
_HEADS = 8
_ROUNDS, _COLD_ROUNDS, _BUDGET_S = 30, 8, 1.0
_UNKNOWN_CACHE = 64 * 2**20


def costs_of(shape: LayerShape, device: torch.device | str = "cpu") -> Costs:
    """Return what the kernels of a layer's family and dtypes cost here; the first call ever measures, for some seconds.

    Args:
        shape: the layer.
        device: where its tensors are.
    """
    return _costs(shape.rule, shape.state_dtype, shape.record_dtype, str(device), torch.get_num_threads())


def recalibrate(device: torch.device | str = "cpu") -> None:
    """Forget what was measured of a device with this number of threads."""
    _path(str(device), torch.get_num_threads()).unlink(missing_ok=True)
    _costs.cache_clear()
    _bandwidth.cache_clear()


def device_name(device: torch.device | str = "cpu") -> str:
    """Return what the processor or GPU calls itself."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache(device: torch.device | str = "cpu") -> int:
    """Return the bytes of the last cache before memory, 64 MiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=_UNKNOWN_CACHE)


def bandwidth_probes(device: torch.device | str, num_bytes: int) -> dict[str, Callable[[], object]]:
    """Return calls that stream ``num_bytes`` through memory, to be timed for :func:`bandwidth_from`.

    Two of them read, as neither way of reading is the fastest everywhere; one reads and writes back.
    """
    x = torch.ones(num_bytes // 4, device=device)
    left, right = x[: len(x) // 2], x[len(x) // 2 : len(x) // 2 * 2]
    return {"read (sum)": x.sum, "read (dot)": lambda: torch.dot(left, right), "update": lambda: x.mul_(1.0)}


def bandwidth_from(seconds: Mapping[str, float], num_bytes: int) -> Bandwidth:
    """Return the bandwidth that the times of :func:`bandwidth_probes` amount to."""
    reading = min(seconds["read (sum)"], seconds["read (dot)"])
    # Where writes hide behind reads the difference is noise: free, but never negative.
    writing = max(seconds["update"] - reading, 0.01 * reading)
    return Bandwidth(num_bytes / reading, num_bytes / writing)


def random_tokens(
    rule: UpdateRule,
    num_tokens: int,
    key_heads: int,
    value_heads: int,
    k: int,
    v: int,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tokens:
    """Return inputs as a trained layer makes them: unit keys, strengths in (0, 1), half-lives of 5 to 2000 tokens."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(randn(*shape), dim=-1)

    g = beta = read = write = None
    if rule.decay is not Decay.NONE:
        g = -torch.exp(randn(num_tokens, value_heads, *([k] if rule.decay is Decay.VECTOR else [])) - 4.5)
    if rule.correction is Correction.DELTA:
        beta = randn(num_tokens, value_heads).sigmoid()
    if rule.correction is Correction.REMOVAL:
        read = unit(num_tokens, key_heads, k)
        write = read * randn(num_tokens, key_heads, k).sigmoid()
    q, keys = (unit(num_tokens, key_heads, k) for _ in range(2))
    return Tokens(q * k**-0.5, keys, randn(num_tokens, value_heads, v), g, beta, read, write)


def best_times(calls: Mapping[K, Callable[[], object]], device: torch.device | str = "cpu") -> dict[K, float]:
    """Return each call's shortest time in seconds, over interleaved rounds."""
    times = dict.fromkeys(calls, float("inf"))
    start = time.perf_counter()
    for round_ in range(_ROUNDS):
        for name, call in calls.items():
            times[name] = min(times[name], seconds_of(call, device))
        if round_ >= 2 and time.perf_counter() - start > _BUDGET_S:
            break
    return times


def seconds_of(call: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Return the time of one call, which on a GPU includes waiting for it to finish."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else None
    if wait is not None:
        wait()
    start = time.perf_counter()
    call()
    if wait is not None:
        wait()
    return time.perf_counter() - start


@cache
def _costs(rule: UpdateRule, state_dtype: torch.dtype, record_dtype: torch.dtype, device: str, threads: int) -> Costs:
    bandwidth = _bandwidth(device, threads)
    name = "-".join([rule.name, str(state_dtype), str(record_dtype)]).replace("torch.", "")

    def measure() -> dict[str, float]:
        kernels = _measure_kernels(rule, state_dtype, record_dtype, device)
        return kernels | {"miss": _measure_miss(rule, state_dtype, record_dtype, device, bandwidth)}

    return Costs(bandwidth, **_remembered(device, threads, name, measure))


@cache
def _bandwidth(device: str, threads: int) -> Bandwidth:
    def measure() -> dict[str, float]:
        num_bytes = 2 * last_level_cache(device)
        return bandwidth_from(best_times(bandwidth_probes(device, num_bytes), device), num_bytes)._asdict()

    return Bandwidth(**_remembered(device, threads, "bandwidth", measure))


def _remembered(device: str, threads: int, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return a measurement from the cache's file, or make it and add it there."""
    path = _path(device, threads)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = None
    known = known if isinstance(known, dict) else {}
    if not isinstance(known.get(name), dict):
        known[name] = measure()
        _write(path, json.dumps(known, indent=1))
    return dict(known[name])


def _path(device: str, threads: int) -> Path:
    """Return the file for a device, its kernels and a number of threads."""
    lib, detail = library()
    # The library's path carries the hash of its sources, its compiler and the CPU's features.
    key = [device_name(device), detail if lib else "portable", str(threads), torch.__version__]
    return cache_dir() / f"costs-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:16]}.json"


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(text)
        scratch.replace(path)  # atomic: other processes read the old file or the new one
    except OSError:
        pass  # a cache that cannot be written costs the next process two seconds


def _measure_kernels(
    rule: UpdateRule, state_dtype: torch.dtype, record_dtype: torch.dtype, device: str
) -> dict[str, float]:
    """Measure what Costs says of data in the cache."""
    # Batch and heads: enough to occupy the device, few enough that their states stay in its cache.
    threads = torch.get_num_threads()
    sizes = [(1, 1), (16, 32)] if torch.device(device).type == "cuda" else [(threads, 1), (threads, _HEADS)]
    small, large = (
        _kernel_calls(LayerShape(rule, heads, heads, _DIM, _DIM, state_dtype, record_dtype), batch, device)
        for batch, heads in sizes
    )
    times = best_times(
        {**{(name, 0): call for name, call in small.items()}, **{(name, 1): call for name, call in large.items()}},
        device,
    )
    few, many = (batch * heads for batch, heads in sizes)
    head_s = {name: max((times[name, 1] - times[name, 0]) / (many - few), 0.0) for name in small}
    call_s = {name: max(times[name, 0] - few * head_s[name], 0.0) for name in small}
    one = LayerShape(rule, 1, 1, _DIM, _DIM)
    reading = (head_s["read many"] - head_s["read few"]) / (_MANY - _FEW)
    folding = (head_s["fold many"] - head_s["fold few"]) / (_MANY - _FEW)
    return {
        "recurrent_call": call_s["recurrent"],
        "buffered_call": call_s["read few"],
        "recurrent": head_s["recurrent"] / one.state_elements,
        "read": max(head_s["read few"] - _FEW * reading, 0.0) / one.state_elements,
        "fold": max(head_s["fold few"] - _FEW * folding, 0.0) / one.state_elements,
        "fold_record": max(folding, 0.0) / (one.state_elements * rule.num_pairs),
        "record": max(reading, 0.0) / one.record_elements,
    }


def _measure_miss(
    rule: UpdateRule, state_dtype: torch.dtype, record_dtype: torch.dtype, device: str, bandwidth: Bandwidth
) -> float:
    """Measure the wait for records per request and value head: KV only, with a cold cache and with a warm one."""
    shape = LayerShape(rule, _HEADS, _HEADS, _DIM, _DIM, state_dtype, record_dtype)
    few, many = 1, 16
    calls = {batch: _kernel_calls(shape, batch, device)["KV only few"] for batch in (few, many)}
    sweep = torch.ones(2 * last_level_cache(device) // 4, device=device)
    cold = dict.fromkeys(calls, float("inf"))
    for _ in range(_COLD_ROUNDS):
        for batch, call in calls.items():
            sweep.sum()
            cold[batch] = min(cold[batch], seconds_of(call, device))
    warm = best_times(calls, device)
    request = ((cold[many] - cold[few]) - (warm[many] - warm[few])) / (many - few)
    moving = bandwidth.seconds(step_traffic(KV_ONLY, shape, _FEW))
    return max(request - moving, 0.0) / _HEADS


def _kernel_calls(shape: LayerShape, batch: int, device: str) -> dict[str, Callable[[], object]]:
    heads, rule = shape.value_heads, shape.rule
    states = StatePool.allocate(batch, heads, _DIM, _DIM, shape.state_dtype, device)
    page = _MANY + 1
    records = RecordPages.allocate(rule, batch, page, heads, heads, _DIM, _DIM, shape.record_dtype, device)
    for pool in (*states, *records):
        if pool is not None:
            pool.zero_()
    tokens = random_tokens(rule, batch, heads, heads, _DIM, _DIM, device)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    page_table = slots.unsqueeze(1)

    def decode(fill: int, fold: bool, own: Tensor = slots) -> Callable[[], object]:
        fills = torch.full_like(slots, fill)
        folds = torch.full_like(slots, fold, dtype=torch.uint8)
        return lambda: buffered_decode(rule, tokens, states, own, records, page_table, fills, folds)

    for fill in range(_MANY):  # real records, no zeros that a kernel might be quicker with
        decode(fill, False)()
    return {
        "recurrent": lambda: recurrent_decode(rule, tokens, states, slots),
        "read few": decode(_FEW, False),
        "read many": decode(_MANY, False),
        "fold few": decode(_FEW, True),
        "fold many": decode(_MANY, True),
        "KV only few": decode(_FEW, False, torch.full_like(slots, -1)),
    }
