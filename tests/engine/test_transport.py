"""Processes exchange tensors through shared memory: of every size, in any rhythm; others notice when one ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from kvbuffer.engine.transport import RankLostError, SharedMemoryTransport
from kvbuffer.ops import dispatch
from tests.support.processes import FORK, run_processes

SIZE = 3
TIMEOUT_S = 120

Work = Callable[[SharedMemoryTransport, int], None]


def _process(rank: int, path: Path, ready: Barrier, work: Work) -> None:
    library = dispatch.cpu_kernels()
    assert library is not None
    transport = SharedMemoryTransport(os.open(path, os.O_RDWR), rank, SIZE, library)
    ready.wait()
    work(transport, rank)


def run(tmp_path: Path, work: Work) -> tuple[int | None, ...]:
    """Do some work in several processes; return how they ended."""
    dispatch.cpu_kernels()  # compiled once
    path = tmp_path / "shared"
    path.write_bytes(bytes(SharedMemoryTransport.num_bytes(SIZE)))
    return run_processes(SIZE, _process, path, FORK.Barrier(SIZE), work, timeout_s=TIMEOUT_S)


pytestmark = pytest.mark.usefixtures("needs_kernels")


@pytest.fixture
def needs_kernels() -> None:
    assert dispatch.cpu_kernels() is not None


def value(rank: int, shape: tuple[int, ...], turn: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * turn + rank))


def test_sums_and_copies_of_every_size(tmp_path: Path) -> None:
    """Also such as do not fit into one place, and such as are no contiguous tensor."""

    def work(transport: SharedMemoryTransport, rank: int) -> None:
        for turn, shape in enumerate([(1,), (3, 5), (1 << 18,), (2, 300_001), (0, 4)]):
            values = [value(r, shape, turn) for r in range(SIZE)]
            assert torch.equal(transport.all_gather(values[rank]), torch.stack(values))
            strided = values[rank].unsqueeze(-1).repeat_interleave(2, -1)[..., 0]
            assert torch.equal(transport.all_reduce(strided), torch.stack(values).sum(0))
            message = torch.arange(turn * 999_999).to(torch.uint8)
            data = message.clone() if rank == 0 else torch.zeros_like(message)
            transport.broadcast(data)
            assert torch.equal(data, message)

    assert run(tmp_path, work) == (0, 0, 0)


def test_whoever_is_fast_overwrites_nothing(tmp_path: Path) -> None:
    """Each process in turn is late, and all see each turn's sum."""

    def work(transport: SharedMemoryTransport, rank: int) -> None:
        for turn in range(300):
            if turn % SIZE == rank and turn % 10 == 0:
                time.sleep(0.005)
            sums = transport.all_reduce(torch.full((7,), float(turn + rank)))
            assert sums.tolist() == [3.0 * turn + 3] * 7

    assert run(tmp_path, work) == (0, 0, 0)


def test_waiting_takes_no_harm(tmp_path: Path) -> None:
    """Longer than it takes until the others are looked after: they are still there."""

    def work(transport: SharedMemoryTransport, rank: int) -> None:
        if rank == 0:
            time.sleep(0.5)
        data = torch.full((3,), rank, dtype=torch.uint8)
        transport.broadcast(data)
        assert not data.any()

    assert run(tmp_path, work) == (0, 0, 0)


def test_who_has_ended_is_named(tmp_path: Path) -> None:
    def work(transport: SharedMemoryTransport, rank: int) -> None:
        if rank == 1:
            os._exit(7)
        # The first who notices ends, too, and the second may find that.
        with pytest.raises(RankLostError, match=r"rank [01] has ended"):
            transport.all_reduce(torch.ones(4))

    assert run(tmp_path, work) == (0, 7, 0)
