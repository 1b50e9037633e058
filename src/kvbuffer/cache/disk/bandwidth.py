"""Whether loading a prefix takes less time than computing it."""

from __future__ import annotations

#: What an earlier measurement still counts when the next one comes.
_MEMORY = 0.9


class Bandwidth:
    """A running estimate of how fast the disk is, from what was really transferred.

    Bytes and seconds are each summed with a weight that fades, so large transfers, which say more, count more. Until
    something was loaded, what was saved has to do: a disk that writes at some rate reads at about that rate.
    """

    def __init__(self) -> None:
        self._bytes = self._seconds = 0.0
        self._loaded = False

    @property
    def bytes_per_second(self) -> float | None:
        """The estimate; None before the first transfer."""
        return self._bytes / self._seconds if self._seconds else None

    def observe_save(self, num_bytes: int, seconds: float) -> None:
        """Take note of a write."""
        if not self._loaded:
            self._observe(num_bytes, seconds)

    def observe_load(self, num_bytes: int, seconds: float) -> None:
        """Take note of a read."""
        if not self._loaded:
            self._bytes = self._seconds = 0.0
            self._loaded = True
        self._observe(num_bytes, seconds)

    def _observe(self, num_bytes: int, seconds: float) -> None:
        self._bytes = _MEMORY * self._bytes + num_bytes
        self._seconds = _MEMORY * self._seconds + seconds

    def cheaper_to_load(self, num_bytes: int, tokens: int, prefill_rate: float) -> bool:
        """Return whether loading ``num_bytes`` takes less time than computing ``tokens`` at ``prefill_rate`` tokens/s.

        What is unknown is given the benefit of the doubt. With each "no" the estimate rises a little: a disk that was
        slow once is not read, hence not measured, and is to be tried again some time.
        """
        if not self._seconds or prefill_rate <= 0:
            return True
        if num_bytes / self._bytes * self._seconds < tokens / prefill_rate:
            return True
        self._seconds *= 0.99
        return False
