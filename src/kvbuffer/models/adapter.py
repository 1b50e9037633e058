"""A LoRA adapter beside a checkpoint: products of two thin matrices, added to its weights as they are read.

The files are those of the PEFT library: ``adapter_config.json``, and ``adapter_model.safetensors`` with the tensors
``base_model.model.NAME.lora_A.weight`` [r, columns] and ``lora_B.weight`` [rows, r] for the checkpoint's
``NAME.weight``. Experts are named one by one, ``experts.3.up_proj``, also where a checkpoint stacks them. (PEFT itself
looks for them in the stacks of transformers' modules, and finds nothing.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvbuffer.errors import ConfigError, ModelError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_STACK = re.compile(r"(.+\.experts\.)(gate_up|down)_proj")
_EXPERT = re.compile(r"(.+\.experts\.)(\d+)\.(gate|up|down)_proj")
#: What a PEFT configuration may say beside rank and scale only where it changes nothing.
_UNSUPPORTED = ("use_dora", "use_rslora", "fan_in_fan_out", "alpha_pattern", "modules_to_save", "layer_replication")


class Factors(NamedTuple):
    """``up @ down`` is added to a weight.

    Attributes:
        up: [rows, r] float32.
        down: [r, columns] float32.
    """

    up: Tensor
    down: Tensor


class Adapter:
    """What is added to the weights of a checkpoint.

    Args:
        factors: by the names of the weights, without ``.weight``.
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self._factors = dict(sorted(factors.items()))

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that stand for all that is added."""
        digest = blake2b(digest_size=16)
        for name, factors in self._factors.items():
            digest.update(name.encode())
            for tensor in factors:
                digest.update(f"{list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def add_to(self, name: str, weight: Tensor) -> Tensor:
        """Return the adapted tensor ``name`` of the checkpoint, rounded once to its dtype."""
        if stack := _STACK.fullmatch(name):
            prefix, kinds = stack[1], ("gate", "up") if stack[2] == "gate_up" else ("down",)
            experts = [
                [
                    self.add_to(f"{prefix}{e}.{k}_proj.weight", w)
                    for k, w in zip(kinds, one.chunk(len(kinds)), strict=True)
                ]
                for e, one in enumerate(weight)
            ]
            return torch.stack([torch.cat(parts) for parts in experts])
        if (factors := self._factors.get(name.removesuffix(".weight"))) is None:
            return weight
        return (weight.float() + factors.up @ factors.down).to(weight.dtype)

    def check(self, shape_of: Callable[[str], tuple[int, ...]]) -> None:
        """Check that the checkpoint has every weight that something is added to.

        Args:
            shape_of: the shape of the checkpoint's tensor of a name; empty if there is none.

        Raises:
            ModelError: names those that it lacks, or has in another shape.
        """
        for name, (up, down) in self._factors.items():
            shape = shape_of(f"{name}.weight")
            if not shape and (expert := _EXPERT.fullmatch(name)):
                halves = 1 if expert[3] == "down" else 2
                stack = shape_of(f"{expert[1]}{'down' if halves == 1 else 'gate_up'}_proj")
                shape = (stack[1] // halves, stack[2]) if stack and int(expert[2]) < stack[0] else ()
            if shape != (len(up), down.shape[1]):
                have = f"has it in shape {list(shape)}" if shape else "has no such weight"
                raise ModelError(
                    f"the adapter does not fit the checkpoint: it adds [{len(up)}, {down.shape[1]}] to {name}, and the "
                    f"checkpoint {have}"
                )

    def save(self, folder: Path, base: str) -> None:
        """Write the adapter's two files; all its factors must be of one rank.

        Args:
            folder: to write them into.
            base: name or path of the checkpoint, for people.
        """
        (rank,) = {len(factors.down) for factors in self._factors.values()}
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
            "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
            "target_modules": sorted({name.rpartition(".")[2] for name in self._factors}),
        }  # fmt: skip
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {}
        for name, factors in self._factors.items():
            for which, tensor in zip("BA", factors, strict=True):
                # An expert's gate and up may share a matrix, which safetensors refuses.
                own = tensor.clone(memory_format=torch.contiguous_format)
                tensors[f"base_model.model.{name}.lora_{which}.weight"] = own
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> Adapter:
        """Read an adapter's folder.

        Raises:
            ConfigError: its files are missing or broken, or it does something else than add products.
        """
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            kind, bias, alpha = config["peft_type"], config.get("bias", "none"), float(config["lora_alpha"])
            tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ConfigError(f"cannot read the adapter in {folder}: {error}") from None
        if (kind, bias) != ("LORA", "none"):
            raise ConfigError(f"{folder / CONFIG_FILE} is not of a LoRA adapter without biases")
        if used := [name for name in _UNSUPPORTED if config.get(name)]:
            raise ConfigError(f"{folder / CONFIG_FILE} uses {', '.join(used)}, which is not supported")
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if (match := _TENSOR.fullmatch(name)) is None or tensor.ndim != 2:
                raise ConfigError(f"{folder / WEIGHTS_FILE} holds {name}, which is not a matrix of a LoRA adapter")
            found.setdefault(match[1], {})[match[2]] = tensor.float()
        factors = {}
        for name, pair in found.items():
            if pair.keys() != {"A", "B"} or pair["B"].shape[1] != len(pair["A"]):
                raise ConfigError(f"{folder / WEIGHTS_FILE} must hold lora_A and lora_B of one rank for {name}")
            factors[name] = Factors(pair["B"] * (alpha / len(pair["A"])), pair["A"])
        return cls(factors)
