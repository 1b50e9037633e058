"""Other processes' load is seen, and one's own is not taken for theirs."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from kvbuffer.ops import interference
from kvbuffer.ops.interference import Interference


def test_busy_processes_on_all_cores_are_seen() -> None:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        time.sleep(0.2)
        with Interference() as load:
            time.sleep(0.6)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert 0.5 < load.fraction <= 1


def test_ones_own_work_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interference, "_busy_seconds", time.process_time)  # as if nothing else ran
    with Interference() as load:
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
    assert load.fraction < 0.01


def test_nothing_is_claimed_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interference, "_busy_seconds", lambda: None)
    with Interference() as load:
        pass
    assert load.fraction == 0
