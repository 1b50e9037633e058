"""``kvbuffer bench ops``: every family, form, dtype and batch, beside the bound that this machine's memory sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from kvbuffer import __version__
from kvbuffer.bench import machine
from kvbuffer.bench.choices import Choice, check_choices
from kvbuffer.bench.forms import buffered, kv_only, prefill, recurrent, verify
from kvbuffer.bench.measure import Row, measure
from kvbuffer.errors import ConfigError
from kvbuffer.ops.calibration import device_name, last_level_cache, recalibrate
from kvbuffer.ops.cost import BUFFER_LENGTHS, Bandwidth, LayerShape
from kvbuffer.ops.dispatch import explain
from kvbuffer.ops.rule import FAMILIES

_BUFFER_LENS = (4, 8, 16)
_BUFFER_LEN = 16
_PROMPT_LEN = 128
_DRAFTS = (4, 8)
_CONTEXTS = (4, 16, 64, 256)
# The pools of all dtypes lie side by side, and records come on top.
_SHARE_OF_FREE_MEMORY = 1 / 16


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        families: names of rules.
        heads: HK and HV.
        dim: K and V.
        tiers: dtypes of states and records.
        batches: requests per call.
        quick: one family's worth of time: fewer rounds and a smaller grid of choices.
        working_set: bytes of states that a pass goes through; None for twice the last-level cache.
        device: where to run.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    heads: tuple[int, int] = (16, 32)
    dim: tuple[int, int] = (128, 128)
    tiers: tuple[tuple[torch.dtype, torch.dtype], ...] = (
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.int8, torch.float32),
        (torch.int8, torch.bfloat16),
    )
    batches: tuple[int, ...] = (1, 8, 32)
    quick: bool = False
    working_set: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if unknown := set(self.families) - FAMILIES.keys():
            raise ConfigError(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
        if self.heads[1] % self.heads[0]:
            raise ConfigError(f"{self.heads[1]} value heads cannot share {self.heads[0]} key heads evenly")


@dataclass
class Results:
    """What was measured.

    Attributes:
        settings: what was asked for.
        machine: processor or GPU, memory, threads.
        versions: of what ran.
        commit: of the checkout, with a plus sign where it has changes.
        date: when.
        kernels: which backend, and why.
        foreign_load: largest share of the cores that other processes took during a measurement.
        bandwidths: measured beside the rows, by family and batch.
        rows: a line per family, form, dtypes and batch.
        choices: what the cost model chose.
    """

    settings: Settings
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    kernels: str
    foreign_load: float = 0.0
    bandwidths: dict[str, Bandwidth] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        settings = {**asdict(self.settings), "tiers": [[str(dtype) for dtype in tier] for tier in self.settings.tiers]}
        bandwidths = {name: value._asdict() for name, value in self.bandwidths.items()}
        return {**asdict(self), "settings": settings, "bandwidths": bandwidths}


def run(settings: Settings, progress: Callable[[str], None]) -> Results:
    """Measure; ``progress`` is told what is being measured."""
    results = Results(
        settings,
        machine=_machine(settings.device),
        versions=machine.versions("torch", "transformers", "flash-linear-attention") | {"kvbuffer": __version__},
        commit=machine.commit(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        kernels=explain(),
    )
    results.machine["working_set"] = working_set = _working_set(settings)
    # What the product goes by is measured anew, now that the machine is meant to be quiet.
    recalibrate(settings.device)
    for family in settings.families:
        for batch in settings.batches:
            progress(f"{family}, batch {batch}")
            with machine.ForeignLoad() as load:
                _one(results, family, batch, working_set)
            results.foreign_load = max(results.foreign_load, load.fraction)
    return results


def _one(results: Results, family: str, batch: int, working_set: int) -> None:
    settings = results.settings
    shape = LayerShape(FAMILIES[family], *settings.heads, *settings.dim)
    forms = [
        recurrent(),
        *(buffered(m) for m in _BUFFER_LENS),
        kv_only(_BUFFER_LEN),
        *(verify(drafts, _BUFFER_LEN) for drafts in _DRAFTS),
        prefill(_PROMPT_LEN),
    ]
    rounds = 3 if settings.quick else 9
    rows, bandwidth = measure(shape, settings.tiers, forms, batch, working_set, rounds, settings.device)
    results.rows += rows
    results.bandwidths[f"{family}, batch {batch}"] = bandwidth
    if any(row.backend == "portable" and row.form == buffered(_BUFFER_LEN).name for row in rows):
        return  # portable PyTorch waits for Python, whatever the form
    lengths = [m for m in BUFFER_LENGTHS if m <= (8 if settings.quick else 64)]
    contexts = _CONTEXTS[1::2] if settings.quick else _CONTEXTS
    for tier in settings.tiers[: 1 if settings.quick else None]:
        results.choices += check_choices(
            shape.with_dtypes(*tier), batch, contexts, lengths, working_set, max(3, rounds // 2), settings.device
        )


def _working_set(settings: Settings) -> int:
    wanted = settings.working_set or 2 * last_level_cache(settings.device)
    return min(wanted, int(machine.free_memory(settings.device) * _SHARE_OF_FREE_MEMORY))


def _machine(device: str) -> dict[str, Any]:
    if device.startswith("cuda"):
        return {"device": device_name(device)}
    return {**machine.describe(), "threads": torch.get_num_threads()}
