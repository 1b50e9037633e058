"""How much of the processor others took while something was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Interference:
    """Measures, as a context, the share of this process's cores that went to anything but this process.

    Attributes:
        fraction: 0 to 1, once the context is left; 0 where the system does not say (it has no /proc/stat).
    """

    def __enter__(self) -> Interference:
        self.fraction = 0.0
        self._start = time.perf_counter(), _busy_seconds(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        start, busy, own = self._start
        now = _busy_seconds()
        if busy is None or now is None:
            return
        foreign = (now - busy) - (time.process_time() - own)
        wall = (time.perf_counter() - start) * len(os.sched_getaffinity(0))
        self.fraction = min(1.0, max(0.0, foreign / wall))


def _busy_seconds() -> float | None:
    """Return the time that the cores which this process may run on have not been idle; None if unknown."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in lines:
        name, *fields = line.split()
        if name in cores:
            # user nice system idle iowait irq softirq steal; steal is time that the hypervisor gave to someone else.
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")
