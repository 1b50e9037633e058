"""Data-parallel processes, as ``torchrun`` starts them; one process where it did not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kvbuffer.errors import ConfigError


@dataclass(frozen=True)
class Workers:
    """This process among all."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process reports and saves."""
        return self.rank == 0

    def average(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Average the gradients over all processes, in place, and return the mean loss."""
        if self.size == 1:
            return loss
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in model.parameters()
        ]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), loss.reshape(1)])
        dist.all_reduce(flat)
        flat /= self.size
        *parts, mean = torch.split(flat, [*(gradient.numel() for gradient in gradients), 1])
        for parameter, part in zip(model.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return mean.squeeze()

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def workers(batch_size: int) -> Iterator[Workers]:
    """Join the processes that ``torchrun`` started.

    Raises:
        ConfigError: they cannot share a batch evenly.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % size:
        raise ConfigError(f"batch_size ({batch_size}) must be a multiple of the {size} processes")
    if size == 1:
        yield Workers()
        return
    dist.init_process_group("gloo")
    try:
        yield Workers(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
