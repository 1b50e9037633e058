"""How the processes of one model exchange tensors: through memory that they share, or over Gloo.

Gloo hands each sum from thread to thread and through the network stack, which can take longer than a layer takes to
compute. Processes on one machine do better with some memory that all of them have mapped, and counters that say how far
each is.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kvbuffer.errors import KVBufferError
from kvbuffer.ops import dispatch

T = TypeVar("T")

#: A step is computed within this time, or a rank has gone.
STEP_TIMEOUT = timedelta(minutes=2)
# Between messages there may be no requests for as long as one likes.
_IDLE_TIMEOUT = timedelta(days=365)
# Bytes of a process that are exchanged at a time.
_PLACE = 1 << 20
_COUNTER = 64
# How long a process waits before it looks whether the others are still there.
_PATIENCE = 0.1


class RankLostError(KVBufferError):
    """Another process of the model has ended, or does not answer."""

    def __init__(self, detail: str) -> None:
        super().__init__(
            f"another process of this model has ended or does not answer, so nothing more can be computed ({detail})"
        )


class Transport(Protocol):
    """Exchanges tensors between the processes; each has to take part. All of them raise :class:`RankLostError`."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of every process's ``x``, float32, which is overwritten; the same bits everywhere."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every process's ``x``, float32, [size, *x.shape]."""
        ...

    def broadcast(self, data: Tensor) -> None:
        """Overwrite [n] uint8 with those of process 0, for which others wait as long as it takes."""
        ...


class GlooTransport:
    """The processes that ``torch.distributed`` knows."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._messages = lost_if_it_fails(dist.new_group, timeout=_IDLE_TIMEOUT)

    def all_reduce(self, x: Tensor) -> Tensor:
        """As :meth:`Transport.all_reduce`."""
        lost_if_it_fails(dist.all_reduce, x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """As :meth:`Transport.all_gather`."""
        every = x.new_empty(self._size, *x.shape)
        lost_if_it_fails(dist.all_gather, list(every.unbind()), x.contiguous())
        return every

    def broadcast(self, data: Tensor) -> None:
        """As :meth:`Transport.broadcast`."""
        lost_if_it_fails(dist.broadcast, data, 0, group=self._messages)


class SharedMemoryTransport:
    """Processes of one machine, through a file that all of them have mapped.

    Each has a counter and two places for its data. In turn number n it writes to its place n mod 2, raises its counter
    to n, waits until those of all others are there, and reads their places. Nobody overwrites what is still read: a
    process comes to turn n + 2 only after all others have been in turn n + 1, and so are done with turn n. A process
    that ends, in whatever way, loses its lock on the file, by which others notice.

    Args:
        descriptor: of the file, open for reading and writing, of :meth:`num_bytes`, zero at first.
        rank: this process's number.
        size: how many there are.
        library: the compiled kernels.
    """

    def __init__(self, descriptor: int, rank: int, size: int, library: ctypes.CDLL) -> None:
        self._file, self._rank, self._size, self._turn = descriptor, rank, size, 0
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 1, rank)
        memory = torch.frombuffer(mmap.mmap(descriptor, self.num_bytes(size)), dtype=torch.uint8)
        self._counters = memory.data_ptr()
        self._places = memory[size * _COUNTER :].view(2, size, _PLACE)
        self._raise, self._wait_for = library.kvb_raise_counter, library.kvb_wait_for_counters
        self._raise.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64)
        self._wait_for.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int64)

    @staticmethod
    def num_bytes(size: int) -> int:
        """Return how large the file is for so many processes."""
        return size * (_COUNTER + 2 * _PLACE)

    def all_reduce(self, x: Tensor) -> Tensor:
        """As :meth:`Transport.all_reduce`."""
        flat = x.contiguous().view(-1)
        for part in flat.split(_PLACE // 4):
            torch.sum(self._exchange(part).view(torch.float32), 0, out=part)
        return flat.view_as(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """As :meth:`Transport.all_gather`."""
        flat, length = x.contiguous().view(-1), _PLACE // 4
        every = flat.new_empty(self._size, len(flat))
        for own, into in zip(flat.split(length), every.split(length, 1), strict=True):
            into.copy_(self._exchange(own).view(torch.float32))
        return every.view(self._size, *x.shape)

    def broadcast(self, data: Tensor) -> None:
        """As :meth:`Transport.broadcast`."""
        timeout = _IDLE_TIMEOUT if self._rank else STEP_TIMEOUT
        for part in data.split(_PLACE):
            part.copy_(self._exchange(part, timeout)[0])

    def _exchange(self, own: Tensor, timeout: timedelta = STEP_TIMEOUT) -> Tensor:
        """Return every process's bytes in this turn, [size, n] uint8, until the next but one."""
        self._turn += 1
        places = self._places[self._turn % 2, :, : own.nbytes]
        places[self._rank].view(own.dtype).copy_(own)
        self._raise(self._counters, self._rank, self._turn)
        begin = time.monotonic()
        while not self._wait_for(self._counters, self._size, self._turn, int(_PATIENCE * 1e9)):
            if lost := [rank for rank in range(self._size) if rank != self._rank and self._is_gone(rank)]:
                raise RankLostError(f"rank {lost[0]} has ended")
            if time.monotonic() - begin > timeout.total_seconds():
                raise RankLostError(f"it took longer than {timeout}")
        return places

    def _is_gone(self, rank: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)  # so that others find it free, too
        return True


def connect(rank: int, size: int) -> Transport:
    """Return what connects the processes that ``torch.distributed`` knows: shared memory where all can have it."""
    library, transport = dispatch.cpu_kernels(), None
    path = [_new_file(SharedMemoryTransport.num_bytes(size)) if rank == 0 else ""]
    lost_if_it_fails(dist.broadcast_object_list, path)
    if library is not None:
        with contextlib.suppress(OSError):
            transport = SharedMemoryTransport(os.open(path[0], os.O_RDWR), rank, size, library)
    # Only when all have their lock may anybody look whether one has ended; and only then is the name needed no more.
    able = torch.tensor(int(transport is not None))
    lost_if_it_fails(dist.all_reduce, able, dist.ReduceOp.MIN)
    if path[0] and rank == 0:
        os.unlink(path[0])
    return transport if transport is not None and able else GlooTransport(size)


def _new_file(num_bytes: int) -> str:
    """Return the path of a file of zeros, in memory where the system has that; empty where there is no room."""
    folder = Path("/dev/shm")
    try:
        with tempfile.NamedTemporaryFile(
            prefix="kvbuffer-", dir=folder if folder.is_dir() else None, delete=False
        ) as file:
            file.write(bytes(num_bytes))
            return file.name
    except OSError:
        return ""


def lost_if_it_fails(function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call a function of ``torch.distributed``.

    Raises:
        RankLostError: it fails.
    """
    try:
        return function(*arguments, **options)
    except RuntimeError as error:
        raise RankLostError(str(error)) from error
