"""A thread that does jobs one after the other, for a caller who must not wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Job = TypeVar("Job")


class BackgroundWriter(Generic[Job]):
    """A queue bounded in bytes, and the thread that empties it.

    Args:
        write: does a job; whatever it raises ends the thread, so it should raise nothing.
        max_bytes: of all jobs that wait or are being done. A larger one is taken when nothing else waits.
    """

    def __init__(self, write: Callable[[Job], None], max_bytes: int) -> None:
        self._write, self._max_bytes = write, max_bytes
        self._jobs: deque[tuple[Job, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        # A daemon, for a process that ends without close() must not hang.
        self._thread = threading.Thread(target=self._run, name="kvbuffer-disk-writer", daemon=True)
        self._thread.start()

    def submit(self, job: Job, num_bytes: int) -> bool:
        """Queue a job; return False when there is no room. Never waits."""
        with self._changed:
            if self._closed or (self._jobs and self._bytes + num_bytes > self._max_bytes):
                return False
            self._jobs.append((job, num_bytes))
            self._bytes += num_bytes
            self._changed.notify_all()
            return True

    def flush(self) -> None:
        """Wait until everything queued so far, and meanwhile, is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def close(self) -> None:
        """Take no more jobs, do those that wait, end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs[0][0]
            self._write(job)
            del job  # its memory is not to be held until the next one comes
            with self._changed:
                self._bytes -= self._jobs.popleft()[1]
                self._changed.notify_all()
