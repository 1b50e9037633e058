"""An adapter adds products to a checkpoint's weights as they are read, however experts are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvbuffer.errors import ConfigError, ModelError
from kvbuffer.models.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, Factors
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.layers import expert_weights
from kvbuffer.models.weights import WeightReader
from tests.support.checkpoints import make_checkpoint

UP = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.0.mlp.experts."


def factors_of(rows: int, columns: int, seed: int = 0) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rows, 2, generator=rng), torch.randn(2, columns, generator=rng))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("adapter"), "qwen3_5", torch.bfloat16, num_hidden_layers=1)


def test_products_are_added_and_rounded_once(dense: Path) -> None:
    factors = factors_of(96, 64)
    reader = WeightReader(dense, torch.bfloat16, (), False, Adapter({UP: factors}))
    plain = load_file(dense / "model.safetensors")
    expected = (plain[f"{UP}.weight"].double() + factors.up.double() @ factors.down.double()).bfloat16()
    # Sums in float32 may fall to the other side of a rounding border.
    assert torch.allclose(reader.take(f"{UP}.weight", 96, 64).double(), expected.double(), rtol=2**-7, atol=0)
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(reader.take(down, 64, 96), plain[down])
    reader.close()


def test_experts_one_by_one_and_stacked(tmp_path: Path) -> None:
    """Published checkpoints of some architectures stack their experts; one adapter fits both."""
    single = make_checkpoint(tmp_path, "qwen3_5_moe", num_hidden_layers=1)
    tensors = load_file(single / "model.safetensors")
    stacks = {
        kind: torch.stack([tensors.pop(f"{EXPERTS}{e}.{kind}_proj.weight") for e in range(8)])
        for kind in ("gate", "up", "down")
    }
    tensors[f"{EXPERTS}gate_up_proj"] = torch.cat([stacks["gate"], stacks["up"]], 1)
    tensors[f"{EXPERTS}down_proj"] = stacks["down"]
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file(tensors, stacked / "model.safetensors")
    shapes = {"gate": (48, 64), "up": (48, 64), "down": (64, 48)}
    names = [(e, kind) for e in (2, 7) for kind in shapes]
    adapter = Adapter({f"{EXPERTS}{e}.{kind}_proj": factors_of(*shapes[kind], e) for e, kind in names})
    moe = ModelConfig.from_folder(single).moe
    assert moe is not None
    read = []
    for folder in (single, stacked):
        for of in (adapter, None):
            reader = WeightReader(folder, torch.float32, (), False, of)
            read.append(expert_weights(reader, EXPERTS, 64, moe))
            reader.close()
    assert all(map(torch.equal, read[0], read[2]))
    changed = [(new != old).flatten(1).any(1).nonzero().flatten().tolist() for new, old in zip(*read[:2], strict=True)]
    assert changed == [[2, 7], [2, 7]]


def test_a_folder_and_back(tmp_path: Path) -> None:
    adapter = Adapter({UP: factors_of(96, 64), "model.layers.0.mlp.down_proj": factors_of(64, 96)})
    adapter.save(tmp_path, "base")
    assert Adapter.load(tmp_path).digest == adapter.digest
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == ["down_proj", "up_proj"]
    assert Adapter({UP: factors_of(96, 64, 1)}).digest != Adapter({UP: factors_of(96, 64)}).digest


def test_scale(tmp_path: Path) -> None:
    """Alpha over the rank multiplies what is added."""
    factors = factors_of(96, 64)
    Adapter({UP: factors}).save(tmp_path, "base")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": 8}))
    nothing = torch.zeros(96, 64)
    assert torch.allclose(Adapter.load(tmp_path).add_to(f"{UP}.weight", nothing), 4 * factors.up @ factors.down)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.9.mlp.up_proj", (96, 64), "layers.9.mlp.up_proj, and the checkpoint has no such weight"),
        (UP, (64, 96), r"adds \[64, 96\] to model.layers.0.mlp.up_proj, and the checkpoint has it in shape \[96, 64\]"),
        (f"{EXPERTS}0.up_proj", (96, 64), "has no such weight"),
    ],
)
def test_what_does_not_fit_the_checkpoint(dense: Path, name: str, shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Decoder(
            dense, ModelConfig.from_folder(dense), torch.float32, 64, False, adapter=Adapter({name: factors_of(*shape)})
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is not of a LoRA adapter"),
        ({"bias": "all"}, "is not of a LoRA adapter"),
        ({"use_dora": True}, "uses use_dora"),
        ({"lora_alpha": None}, "cannot read the adapter"),
    ],
)
def test_adapters_of_other_kinds(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    Adapter({UP: factors_of(96, 64)}).save(tmp_path, "base")
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=message):
        Adapter.load(tmp_path)


def test_broken_adapters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the adapter"):
        Adapter.load(tmp_path)
    Adapter({UP: factors_of(96, 64)}).save(tmp_path, "base")
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    save_file({**tensors, "base_model.model.embed.lora_embedding_A": torch.ones(2, 2)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match="lora_embedding_A, which is not a matrix of a LoRA adapter"):
        Adapter.load(tmp_path)
    tensors.popitem()
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ConfigError, match="must hold lora_A and lora_B of one rank"):
        Adapter.load(tmp_path)
