"""What a run shows while it trains."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from kvbuffer.errors import ConfigError
from kvbuffer.train.config import TrainConfig


class Progress:
    """A bar with loss, tokens per second and the time left, lines with held-out losses, and TensorBoard if asked for.

    Args:
        total: steps of the run.
        options: of the run.
        enabled: whether anything is shown.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, total: int, options: TrainConfig, enabled: bool) -> None:
        self._enabled = enabled
        self._tokens_per_step = options.batch_size * options.seq_len
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=self._console, disable=not enabled,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=total, rate="")
        self._loss: float | None = None
        self._seconds = 0.0
        self._writer = _tensorboard(options) if options.tensorboard and enabled else None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def update(self, stage: str, record: dict[str, Any]) -> None:
        """Show a step's record."""
        self._loss = record["loss"] if self._loss is None else 0.95 * self._loss + 0.05 * record["loss"]
        rate = self._tokens_per_step / max(record["seconds"] - self._seconds, 1e-9)
        self._seconds = record["seconds"]
        self._bar.update(
            self._task,
            completed=record["total"],
            description=f"{stage}: loss {self._loss:.3f}",
            rate=f"{rate:,.0f} tokens/s",
        )
        if self._enabled and "held_out" in record:
            self._console.print(
                f"step {record['total']}: loss {self._loss:.4f}, held out {record['held_out']:.4f} "
                f"({record['bits_per_byte']:.3f} bits per byte)",
                highlight=False,
            )
        if self._writer is not None:
            for name in ("loss", "held_out", "bits_per_byte", "lr", "grad_norm", "flops"):
                if name in record:
                    self._writer.add_scalar(name, record[name], record["total"])


def _tensorboard(options: TrainConfig) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard is not installed: pip install 'kvbuffer[tensorboard]', or leave out --tensorboard"
        ) from None
    return SummaryWriter(str(options.out / "tensorboard"))
