"""The numbers behind :mod:`kvbuffer.ops.cost`, measured once per machine and kept beside the compiled kernels.

Every kernel is timed where it will run: on states and records past the last-level cache. How much of the arithmetic
hides behind memory is then part of what is measured, and need not be guessed. Bandwidth and kernels take turns, and
each number is a quartile over rounds: what disturbs fewer than three rounds in four is not seen, and a machine that is
slow for longer slows all of them down alike. A minimum would compare one kernel's luck with another's. What was
measured beside other processes that kept the cores busy is used, but not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kvbuffer.ops import memory
from kvbuffer.ops.buffered import buffered_decode, recurrent_decode
from kvbuffer.ops.cost import Bandwidth, Costs, LayerShape, Traffic
from kvbuffer.ops.cpu.build import cache_dir, library
from kvbuffer.ops.interference import Interference
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import Correction, Decay, UpdateRule

logger = logging.getLogger(__name__)

K = TypeVar("K")

_DIM = 128
_SMALL_DIM = 16
_PAGE_SIZE = 8
# Records at the two points between which the cost of a record is measured, with a state and without one.
_FEW, _MANY = 1, 17
_KV_ONLY_FEW, _KV_ONLY_MANY = 16, 64
_KEY_HEADS, _VALUE_HEADS = 8, 16
_ROUNDS, _LEAST_ROUNDS, _BUDGET_S = 60, 5, 2.0
_UNKNOWN_CACHE = 64 * 2**20
# What others may take of the cores while something is measured that is to be kept.
_MOST_INTERFERENCE = 0.15


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
    x = memory.empty(num_bytes // 4, device=device).fill_(1.0)  # as pools are: in huge pages
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


def typical_times(calls: Mapping[K, Callable[[], object]], device: torch.device | str = "cpu") -> dict[K, float]:
    """Return the time in seconds that each call keeps below in a quarter of its interleaved rounds."""
    times: dict[K, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for round_ in range(_ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds_of(call, device))
        if round_ + 1 >= _LEAST_ROUNDS and time.perf_counter() - start > _BUDGET_S:
            break
    return {name: sorted(values)[len(values) // 4] for name, values in times.items()}


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
    name = "-".join([rule.name, str(state_dtype), str(record_dtype)]).replace("torch.", "")
    shape = LayerShape(rule, _KEY_HEADS, _VALUE_HEADS, _DIM, _DIM, state_dtype, record_dtype)
    measured = _remembered(device, threads, name, lambda: _measure(shape, device))
    return Costs(Bandwidth(measured.pop("read_bandwidth"), measured.pop("write_bandwidth")), **measured)


def _remembered(device: str, threads: int, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return a measurement from the cache's file, or make it and, if it was not disturbed, add it there."""
    path = _path(device, threads)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = None
    known = known if isinstance(known, dict) else {}
    if not isinstance(known.get(name), dict):
        with Interference() as others:
            known[name] = measure()
        if others.fraction > _MOST_INTERFERENCE:
            logger.warning(
                "Other processes took %.0f %% of the cores while the kernels were timed: the form of decoding may be "
                "chosen badly. They are timed again at the next start.", 100 * others.fraction,
            )  # fmt: skip
        else:
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


def _measure(shape: LayerShape, device: str) -> dict[str, float]:
    """Return the fields of Costs, and the two of its bandwidth."""
    working_set = 2 * last_level_cache(device)
    probes = bandwidth_probes(device, working_set)
    large = _kernel_calls(shape, max(1, -(-working_set // shape.state_bytes)), device)
    # Of this, only the call takes time.
    small = _kernel_calls(
        replace(shape, key_heads=1, value_heads=1, key_dim=_SMALL_DIM, value_dim=_SMALL_DIM), 1, device
    )
    calls = {("probe", name): call for name, call in probes.items()}
    for name in large.calls:  # a small call behind each large one: all find the processor's caches alike
        calls["large", name], calls["small", name] = large.calls[name], small.calls[name]
    times = typical_times(calls, device)
    bandwidth = bandwidth_from({name: times["probe", name] for name in probes}, working_set)
    call_s = {name: times["small", name] for name in small.calls}
    request_s = {name: (times["large", name] - call_s[name]) / large.batch for name in large.calls}
    bandwidths = {"read_bandwidth": bandwidth.read, "write_bandwidth": bandwidth.write}
    return bandwidths | _costs_from(shape, bandwidth, call_s, request_s)


def _costs_from(
    shape: LayerShape, bandwidth: Bandwidth, call_s: Mapping[str, float], request_s: Mapping[str, float]
) -> dict[str, float]:
    """Return what Costs says of a call, and of a request on top of moving its bytes."""
    state, record = shape.state_bytes, shape.record_bytes

    def beyond(name: str, read: float, written: float) -> float:
        return request_s[name] - bandwidth.seconds(Traffic(read, written))

    def line(name: str, few: int, many: int, state_read: float, state_written: float) -> tuple[float, float]:
        """Return cost without records and cost per record."""
        low, high = (
            beyond(f"{name} {points}", state_read + count * record, state_written + record)
            for points, count in (("few", few), ("many", many))
        )
        slope = (high - low) / (many - few)
        return low - few * slope, slope

    read, per_record = line("read", _FEW, _MANY, state, 0)
    fold, per_folded = line("fold", _FEW, _MANY, state, state)
    kv_only, per_kv_only = line("KV only", _KV_ONLY_FEW, _KV_ONLY_MANY, 0, 0)
    return {
        "recurrent_call": call_s["recurrent"],
        "buffered_call": call_s["read few"],
        "recurrent": beyond("recurrent", state, state) / shape.state_elements,
        "read": read / shape.state_elements,
        "fold": fold / shape.state_elements,
        "fold_record": per_folded / (shape.state_elements * shape.rule.num_pairs),
        "record": per_record / shape.record_elements,
        "kv_only": kv_only / shape.value_heads,
        "kv_only_record": per_kv_only / shape.record_elements,
    }


class _Calls(NamedTuple):
    """Calls of the kernels on ``batch`` requests of one layer."""

    batch: int
    calls: dict[str, Callable[[], object]]


def _kernel_calls(shape: LayerShape, batch: int, device: str) -> _Calls:
    rule, dims = shape.rule, (shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim)
    pages = -(-(_KV_ONLY_MANY + 1) // _PAGE_SIZE)
    states = StatePool.allocate(batch, *dims[1:], shape.state_dtype, device)
    records = RecordPages.allocate(rule, batch * pages, _PAGE_SIZE, *dims, shape.record_dtype, device)
    for pool in (*states, *records):
        if pool is not None:
            pool.zero_()
    tokens = random_tokens(rule, batch, *dims, device)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    page_table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)

    def decode(fill: int, fold: bool = False, own: Tensor = slots) -> Callable[[], object]:
        fills = torch.full_like(slots, fill)
        folds = torch.full_like(slots, fold, dtype=torch.uint8)
        return lambda: buffered_decode(rule, tokens, states, own, records, page_table, fills, folds)

    no_slots = torch.full_like(slots, -1)
    for fill in range(_KV_ONLY_MANY):  # real records, no zeros that a kernel might be quicker with
        decode(fill, own=no_slots)()
    return _Calls(
        batch,
        {
            "recurrent": lambda: recurrent_decode(rule, tokens, states, slots),
            "read few": decode(_FEW),
            "read many": decode(_MANY),
            "fold few": decode(_FEW, True),
            "fold many": decode(_MANY, True),
            "KV only few": decode(_KV_ONLY_FEW, own=no_slots),
            "KV only many": decode(_KV_ONLY_MANY, own=no_slots),
        },
    )
