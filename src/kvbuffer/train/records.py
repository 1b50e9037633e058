"""What a run leaves on disk: its plan, its log and its checkpoints, written so that a kill at any moment costs no more
than the steps since the last checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvbuffer.errors import ConfigError
from kvbuffer.train.checkpoints import Checkpoint, copy_companions, new_folder, read_checkpoint, write_checkpoint
from kvbuffer.train.config import TrainConfig
from kvbuffer.train.optim import Optimizers
from kvbuffer.train.plan import Stage


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        stage: number of the stage.
        step: steps done in it.
        total: steps done in all stages, which is also the number of batches seen.
        flops, seconds, cpu_seconds: spent on training steps so far; evaluation and saving are not counted. Seconds are
            wall clock and processor time of the first process.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    flops: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class RunFolder:
    """The files of one run.

    ``run.json`` holds options and plan, ``log.jsonl`` a line per step, ``checkpoints/`` the end of each finished stage
    and the last state of the running one, each a Hugging Face checkpoint with ``training.pt`` beside it; ``model/`` is
    the finished model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = path / "model"
        self._checkpoints = path / "checkpoints"
        self._log = path / "log.jsonl"

    def plan(self, options: TrainConfig) -> list[Stage] | None:
        """Return the plan of the run that is here, or None.

        Raises:
            ConfigError: it has other options than these.
        """
        file = self.path / "run.json"
        if not file.exists():
            return None
        saved = json.loads(file.read_text(encoding="utf-8"))
        options.check_same(saved["options"])
        return [Stage.from_json(stage) for stage in saved["plan"]]

    def start(self, options: TrainConfig, plan: list[Stage]) -> None:
        """Write options and plan; only then is there a run here.

        Raises:
            ConfigError: the folder holds something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if other := [file.name for file in self.path.iterdir() if not file.name.startswith("run.json")]:
            raise ConfigError(f"{self.path} is not empty ({other[0]}) and holds no run; give another folder")
        record = {"options": options.as_json(), "plan": [stage.as_json() for stage in plan]}
        partial = self.path / "run.json.partial"
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path / "run.json")

    def checkpoint(self, stage: int, step: int) -> Path:
        """Return the folder of a checkpoint."""
        return self._checkpoints / f"stage{stage}-step{step}"

    def latest(self) -> Path | None:
        """Return the folder of the last whole checkpoint, or None."""
        found = {(int(m[1]), int(m[2])): path for path, m in self._matches()}
        return found[max(found)] if found else None

    def _matches(self) -> list[tuple[Path, re.Match[str]]]:
        folders = self._checkpoints.glob("stage*")
        return [(path, m) for path in folders if (m := re.fullmatch(r"stage(\d+)-step(\d+)", path.name))]

    def save(self, model: Any, optimizers: Optimizers, position: Position, plan: list[Stage], companions: Path) -> None:
        """Write a checkpoint, and then remove those it makes superfluous."""
        folder = self.checkpoint(position.stage, position.step)
        if folder.exists():
            return
        with new_folder(folder) as partial:
            model.save_pretrained(partial)
            copy_companions(companions, partial)
            state = {"position": asdict(position), "optimizers": optimizers.state(), "rng": torch.get_rng_state()}
            torch.save(state, partial / "training.pt")
        keep = {self.checkpoint(i, plan[i].steps) for i in range(position.stage)} | {folder}
        for path, _ in self._matches():
            if path not in keep:
                shutil.rmtree(path)

    def finish(self, last: Path, dtype: str) -> None:
        """Write the finished model, in ``dtype``, from its last checkpoint."""
        if not self.model.exists():
            config, parameters = read_checkpoint(last)
            rounded = {name: x.to(getattr(torch, dtype)) for name, x in parameters.items()}
            write_checkpoint(self.model, Checkpoint({**config, "dtype": dtype}, rounded), last)

    def truncate_log(self, steps: int) -> None:
        """Drop what was logged after this many steps: it will be logged again."""
        if self._log.exists():
            records = [record for record in read_log(self.path) if record["total"] <= steps]
            partial = self._log.with_suffix(".partial")
            partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
            partial.replace(self._log)

    def log(self, record: dict[str, Any]) -> None:
        """Append a record."""
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_training_state(folder: Path) -> tuple[Position, list[dict[str, Any]], torch.Tensor]:
    """Return position, optimizer state and the state of random numbers of a checkpoint."""
    state = torch.load(folder / "training.pt", weights_only=True)
    return Position(**state["position"]), state["optimizers"], state["rng"]


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log; a line that a kill cut off is left out."""
    records = []
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
