"""What the numbers were measured on: processor, memory bandwidth, arithmetic peak, and who else was using it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TELLING_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd")
_TICKS = os.sysconf("SC_CLK_TCK")


def describe() -> dict[str, Any]:
    """Return processor, cores, memory and what they can do, measured now."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    fields = dict(_field(line) for line in cpuinfo.splitlines() if ":" in line)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "cpu": fields.get("model name", platform.machine()),
        "family_model_stepping": [fields.get(key) for key in ("cpu family", "model", "stepping")],
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in _TELLING_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        **measure_limits(),
    }


def measure_limits(read_bytes: int = 2**30) -> dict[str, float]:
    """Return read bandwidth of memory (bytes/s) and arithmetic peaks (flop/s): best of a few passes.

    The peaks are those of PyTorch's matrix product in float32 and bfloat16, and of our own dense layer on bfloat16
    weights, which may compute in float16.
    """
    import torch

    from kvbuffer.ops.linear import Linear

    size = 2048
    x, w = torch.randn(2, size, size)
    half_x, half_w = x.bfloat16(), w.bfloat16()
    layer = Linear(half_w)

    def peak(product: Callable[[], object]) -> float:
        return 2 * size**3 / _best_time(product, 4)

    return {
        "read_bandwidth": read_bytes / _best_time(torch.ones(read_bytes // 4).sum, 6),
        "fp32_peak": peak(lambda: x @ w),
        "bf16_peak": peak(lambda: half_x @ half_w),
        "dense_layer_peak": peak(lambda: layer(x)),
    }


def free_memory(device: str = "cpu") -> int:
    """Return the bytes that can be allocated."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed, and Python's."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the checked-out commit, with a plus sign where the tree has changes that are not in it.

    "none" for an installed package: a repository around it is somebody else's.
    """

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return None if done.returncode else done.stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", "__init__.py") is None:
            return "none"
        return f"{git('rev-parse', '--short=12', 'HEAD')}{'+' if git('status', '--porcelain') else ''}"
    except FileNotFoundError:  # no git
        return "none"


class ForeignLoad:
    """Measures how much processor time went to neither this process's group nor the given process groups.

    A shared machine can halve a number without a trace, so every measurement carries its own: `fraction` of all cores.
    """

    def __init__(self, *groups: int) -> None:
        self._groups = {*groups, os.getpgid(0)}

    def __enter__(self) -> ForeignLoad:
        self._start = time.perf_counter(), _busy_seconds(), _group_seconds(self._groups)
        return self

    def __exit__(self, *_: object) -> None:
        start, busy, own = self._start
        wall = time.perf_counter() - start
        foreign = (_busy_seconds() - busy) - (_group_seconds(self._groups) - own)
        self.fraction = max(0.0, foreign / (wall * (os.cpu_count() or 1)))


def _busy_seconds() -> float:
    # user nice system idle iowait irq softirq steal; steal is time that the hypervisor gave to someone else.
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _group_seconds(groups: set[int]) -> float:
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[2]) in groups:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _best_time(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()
