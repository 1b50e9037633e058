"""Compile the C++ kernels once for this machine's CPU and load them.

The sources have a plain C interface (no PyTorch headers), so one call of the system compiler builds them in seconds.
The library is cached under a hash of the sources, the flags, the compiler and the CPU, so that an upgraded package, a
changed compiler or a cache directory shared between different machines never loads a library that does not fit.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

SOURCE_DIR = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
)


class CpuLibrary(NamedTuple):
    """The loaded kernels, or why there are none.

    Attributes:
        lib: the library, None when it could not be built.
        detail: the path of the library, or the reason for its absence in words for the user.
    """

    lib: ctypes.CDLL | None
    detail: str


def cache_dir() -> Path:
    """Directory for compiled kernels: ``$KVBUFFER_CACHE_DIR``, or ``kvbuffer`` in the user's cache directory."""
    base = os.environ.get("KVBUFFER_CACHE_DIR")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvbuffer"


def _cpu_identity() -> str:
    # -march=native depends on the CPU: the feature flags tell two machines apart.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    def compile_one(source: Path, out: str) -> None:
        subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", out], check=True, capture_output=True, text=True)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        objects = [os.path.join(work, f"{source.stem}.o") for source in sources]
        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_one, sources, objects))
        linked = os.path.join(work, target.name)
        subprocess.run(
            [compiler, *FLAGS, "-shared", *objects, "-o", linked], check=True, capture_output=True, text=True
        )
        os.replace(linked, target)  # atomic: a second process building at the same time is harmless


@cache
def library() -> CpuLibrary:
    """Return the compiled kernels, building them on first use.

    ``KVBUFFER_DISABLE_CPU_KERNELS=1`` leaves them out; ``CXX`` names another compiler.
    """
    if os.environ.get("KVBUFFER_DISABLE_CPU_KERNELS") == "1":
        return CpuLibrary(None, "KVBUFFER_DISABLE_CPU_KERNELS=1 is set")
    wanted = os.environ.get("CXX")
    compiler = shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return CpuLibrary(
            None, f"no C++ compiler found (looked for {wanted or 'g++, clang++'}); install g++ for full speed"
        )
    sources = sorted(SOURCE_DIR.glob("*.cpp"))
    try:
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
        key = hashlib.sha256("\0".join([version, _cpu_identity(), *FLAGS]).encode())
        for path in [*sources, *sorted(SOURCE_DIR.glob("*.h"))]:
            key.update(path.name.encode() + b"\0" + path.read_bytes())
        target = cache_dir() / f"cpu-{key.hexdigest()[:16]}.so"
        if not target.exists():
            _compile(compiler, sources, target)
        # torch is loaded first so that both share one OpenMP runtime, hence one thread pool.
        import torch  # noqa: F401

        return CpuLibrary(ctypes.CDLL(str(target)), str(target))
    except subprocess.CalledProcessError as error:
        return CpuLibrary(None, f"{compiler} failed: {(error.stderr or '').strip()[-2000:]}")
    except OSError as error:
        return CpuLibrary(None, f"could not build or load the kernels: {error}")
