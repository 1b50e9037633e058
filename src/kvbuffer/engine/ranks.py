"""The processes of ``--tensor-parallel-size``: torchrun starts them, rank 0 runs the engine, the others follow it.

Rank 0 sends each piece of work before it does its own part, and the others do theirs: first the memory plan, then
batches for the model and copies and folds of memory, in the engine's order; None ends them. Everything that is computed
follows from these messages.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from kvbuffer.cache.plan import MemoryPlan
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.cache.work import do_work
from kvbuffer.engine.runner import Runner
from kvbuffer.engine.transport import STEP_TIMEOUT, connect, lost_if_it_fails
from kvbuffer.errors import ConfigError
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.parallel import ParallelDecoder
from kvbuffer.ops.batch import ModelInputs

logger = logging.getLogger(__name__)

# Bytes of a message that travel with its length: a decode step fits.
_HEAD = 8192


def is_follower() -> bool:
    """Return whether torchrun started this process as another than rank 0."""
    return int(os.environ.get("RANK", "0")) > 0


class ProcessRanks:
    """The processes that torchrun started, as :class:`kvbuffer.models.parallel.Ranks`.

    Args:
        size: how many there have to be.

    Raises:
        ConfigError: torchrun did not start this process, or not so many.
        RankLostError: the others cannot be reached.
    """

    def __init__(self, size: int) -> None:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != size:
            raise ConfigError(
                f"--tensor-parallel-size {size} needs as many processes, but there are {started}: start them with "
                f"'torchrun --nproc-per-node {size} --no-python kvbuffer serve MODEL --tensor-parallel-size {size}'"
            )
        self.rank, self.size = int(os.environ["RANK"]), size
        lost_if_it_fails(dist.init_process_group, "gloo", timeout=STEP_TIMEOUT)
        transport = connect(self.rank, size)
        self.all_reduce, self.all_gather = transport.all_reduce, transport.all_gather
        self._broadcast = transport.broadcast

    def send(self, message: object) -> None:
        """Send something to the other ranks; for rank 0."""
        buffer = io.BytesIO()
        _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(message)
        body = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        head = torch.zeros(_HEAD, dtype=torch.uint8)
        head[:8] = torch.tensor([len(body)]).view(torch.uint8)
        head[8 : 8 + len(body)] = body[: _HEAD - 8]
        self._broadcast(head)
        if len(body) > _HEAD - 8:
            self._broadcast(body[_HEAD - 8 :].clone())

    def receive(self) -> Any:
        """Return what rank 0 sent next."""
        head = torch.empty(_HEAD, dtype=torch.uint8)
        self._broadcast(head)
        size = int(head[:8].view(torch.int64))
        body = head[8 : 8 + size]
        if size > _HEAD - 8:
            rest = torch.empty(size - (_HEAD - 8), dtype=torch.uint8)
            self._broadcast(rest)
            body = torch.cat([body, rest])
        return pickle.loads(body.numpy().tobytes())

    def close(self) -> None:
        """Leave the group of processes; on rank 0, let the others end."""
        if self.rank == 0:
            self.send(None)
        dist.destroy_process_group()


def start_ranks(size: int, target: Callable[..., None], *arguments: Any) -> None:
    """Run ``target(ranks, *arguments)`` in as many new processes on this machine, of one thread each, until all end.

    Raises:
        ProcessException: one has failed, and the others were ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_start, (size, port, target, arguments), size)


def _start(rank: int, size: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    target(ProcessRanks(size), *arguments)
    dist.destroy_process_group()


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, which takes a tenth of the time."""

    def reducer_override(self, obj: Any) -> Any:
        return (torch.from_numpy, (obj.numpy(),)) if isinstance(obj, Tensor) else NotImplemented


class LeadingRunner(Runner):
    """The runner of rank 0: work on memory is done on all ranks. (The model sees to the batches.)"""

    def do_memory_work(self) -> None:
        """Do the copies and folds that memory has noted."""
        if self.memory.work:
            assert isinstance(self.model, ParallelDecoder)
            self.model.ranks.send(self.memory.work)
        super().do_memory_work()


Build = Callable[[MemoryPlan], tuple[Decoder, Sequence[LinearCache | AttentionCache]]]


def follow(ranks: ProcessRanks, build: Build) -> None:
    """Do what rank 0 says until it says no more.

    Args:
        ranks: the processes.
        build: returns this rank's model and memory.

    Raises:
        RankLostError: another rank has ended without a word.
    """
    # Whoever stops a server stops all its processes; it is for rank 0 to end the requests first, and then the others.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    plan = ranks.receive()
    if plan is not None:
        model, caches = build(plan)
        while (message := ranks.receive()) is not None:
            if isinstance(message, ModelInputs):
                model.forward(message, caches)
            else:
                do_work(message, caches)
    ranks.close()
