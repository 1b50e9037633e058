"""Jobs are done in order by another thread; a full queue refuses, and never waits."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from kvbuffer.cache.disk.writer import BackgroundWriter


class Slow:
    """A writer that waits to be let go."""

    def __init__(self, max_bytes: int) -> None:
        self.done: list[object] = []
        self.go, self.began = threading.Event(), threading.Event()
        self.writer: BackgroundWriter[object] = BackgroundWriter(self.write, max_bytes)

    def write(self, job: object) -> None:
        self.began.set()
        assert self.go.wait(10)
        self.done.append(job)


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow(max_bytes=100)
    yield slow
    slow.go.set()
    slow.writer.close()


def test_the_bound_counts_what_waits_and_what_is_being_done(slow: Slow) -> None:
    assert slow.writer.submit("a", 60)
    assert slow.began.wait(10)
    assert not slow.writer.submit("b", 41)
    assert slow.writer.submit("c", 40)
    assert not slow.writer.submit("d", 1)
    slow.go.set()
    slow.writer.flush()
    assert slow.done == ["a", "c"]
    assert slow.writer.submit("e", 100)


def test_a_job_larger_than_the_bound_is_taken_when_nothing_else_waits(slow: Slow) -> None:
    assert slow.writer.submit("large", 1000)
    assert not slow.writer.submit("small", 1)


def test_closing_does_what_waits_and_takes_no_more(slow: Slow) -> None:
    for job in range(5):
        assert slow.writer.submit(job, 20)
    slow.go.set()
    slow.writer.close()
    assert slow.done == list(range(5))
    assert not slow.writer.submit("late", 1)
    slow.writer.flush()
    slow.writer.close()


def test_a_job_that_is_done_is_not_kept() -> None:
    class Job:
        pass

    writer: BackgroundWriter[Job] = BackgroundWriter(lambda job: None, 10)
    job = Job()
    watch = weakref.ref(job)
    writer.submit(job, 1)
    del job
    writer.flush()
    gc.collect()
    assert watch() is None
    writer.close()
