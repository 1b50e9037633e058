"""Find a Hugging Face checkpoint and read its weights, memory-mapped and checked."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvbuffer.errors import ModelError
from kvbuffer.models.adapter import Adapter

logger = logging.getLogger(__name__)

#: The model shipped inside the package, and the name that selects it.
DEMO_MODEL = "demo"
DEMO_MODEL_DIR = Path(__file__).parent.parent / "demo_model"


def resolve_model(model: str) -> Path:
    """Return the folder of a checkpoint: the embedded demo, a local folder, or a hub id that is downloaded if needed.

    Raises:
        ModelError: nothing of that name exists here or on the hub.
    """
    if model == DEMO_MODEL:
        return DEMO_MODEL_DIR
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"{model} is a file; give the checkpoint's folder (config.json, *.safetensors, tokenizer)")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ModelError(f"no folder {model!r}; give a checkpoint folder, a hub id such as Qwen/Qwen3.5-4B, or 'demo'")
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"could not download {model!r} from the hub: {error}") from None


class TensorReader(Protocol):
    """Where layers take their weights from."""

    def take(self, name: str, *shape: int) -> Tensor:
        """Return tensor ``name`` in the model dtype."""
        ...

    def take_float(self, name: str, *shape: int) -> Tensor:
        """Return tensor ``name`` in float32."""
        ...


class WeightReader:
    """The tensors of a checkpoint, each of which must be asked for exactly as it is.

    Loading code asks for every tensor by name and shape; :meth:`finish` then reports all that went wrong at once:
    missing tensors, wrong shapes, and tensors that nobody asked for.

    Args:
        folder: a checkpoint folder with ``model.safetensors``, or shards with their index.
        dtype: floating-point tensors are converted to this.
        ignored: regular expressions of tensor names that are known but not used.
        show_progress: draw a progress bar.
        adapter: is added to the tensors.

    Raises:
        ModelError: no safetensors files, or files that cannot be read, or the adapter does not fit.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        ignored: Iterable[str],
        show_progress: bool,
        adapter: Adapter | None = None,
    ) -> None:
        self.folder, self.dtype, self._adapter = folder, dtype, adapter
        self._ignored = [re.compile(pattern) for pattern in ignored]
        self._problems: list[str] = []
        self._files = {}
        self._where: dict[str, Path] = {}
        for path in self._shards():
            try:
                self._files[path] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read as safetensors: {error}") from None
            self._where.update(dict.fromkeys(self._files[path].keys(), path))
        if adapter is not None:
            adapter.check(self.shape_of)
        self._unused = {name for name in self._where if not any(p.search(name) for p in self._ignored)}
        self._progress = Progress(
            TextColumn("Loading weights"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            disable=not show_progress, transient=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=len(self._unused))
        self._progress.start()

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ModelError(f"{index} is not an index of shards: it must hold a weight_map") from None
            missing = [name for name in names if not (self.folder / name).exists()]
            if missing:
                raise ModelError(f"{index.name} names shards that are not in {self.folder}: {', '.join(missing)}")
            return [self.folder / name for name in names]
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            found = ", ".join(sorted(p.name for p in self.folder.iterdir())[:12]) or "nothing"
            raise ModelError(
                f"no .safetensors files in {self.folder} (found: {found}); other formats are not supported"
            )
        return paths

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str, *shape: int) -> Tensor:
        """Return tensor ``name`` in the model dtype.

        A missing tensor or another shape is noted for :meth:`finish`, and zeros are returned.
        """
        return self._read(name, shape).to(self.dtype)

    def take_float(self, name: str, *shape: int) -> Tensor:
        """Return tensor ``name`` in float32, whatever the model dtype: for small tensors whose precision matters."""
        return self._read(name, shape).float()

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._where:
            self._problems.append(f"missing {name} {list(shape)}")
            return torch.zeros(shape)
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        self._unused.discard(name)
        self._progress.advance(self._task)
        if tuple(tensor.shape) != shape:
            self._problems.append(f"{name} has shape {list(tensor.shape)}, config.json implies {list(shape)}")
            return torch.zeros(shape)
        return tensor if self._adapter is None else self._adapter.add_to(name, tensor)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor as it is in the checkpoint; empty if it is not there."""
        if name not in self._where:
            return ()
        return tuple(self._files[self._where[name]].get_slice(name).get_shape())

    def skip(self, prefix: str) -> None:
        """Take tensors whose names begin so as not needed here."""
        self._unused = {name for name in self._unused if not name.startswith(prefix)}

    def close(self) -> None:
        """Remove the progress bar."""
        self._progress.stop()

    def finish(self) -> None:
        """Check that everything fitted and nothing was left over.

        Raises:
            ModelError: lists what was missing, what had another shape and what is unknown.
        """
        self.close()
        problems = [*self._problems, *(f"unknown {name}" for name in sorted(self._unused))]
        if problems:
            shown = "\n  ".join(problems[:20])
            more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise ModelError(f"the weights in {self.folder} do not fit its config.json:\n  {shown}{more}")
