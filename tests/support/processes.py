"""Several processes that work together."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

#: Copies of this process, which is faster than to import everything again.
FORK = multiprocessing.get_context("fork")


def run_processes(count: int, target: Callable[..., None], *arguments: Any, timeout_s: float) -> tuple[int | None, ...]:
    """Run ``target(rank, *arguments)`` in each of ``count`` copies of this process; return how they ended.

    Those that have not ended in time are killed.
    """
    processes = [FORK.Process(target=target, args=(rank, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return tuple(process.exitcode for process in processes)
