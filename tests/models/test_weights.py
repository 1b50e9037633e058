"""Checkpoints in every arrangement load; broken ones are refused with a list of what was found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvbuffer import SamplingParams
from kvbuffer.errors import ModelError
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.weights import DEMO_MODEL_DIR, resolve_model
from tests.support.checkpoints import make_checkpoint
from tests.support.plans import sized_engine

Tensors = dict[str, Tensor]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small checkpoint per family, not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("qwen3_5", "qwen3_5_moe", "qwen3_next"):
        make_checkpoint(folder, name, **TWO_LAYERS)
    return folder


@pytest.fixture
def dense(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "qwen3_5", tmp_path / "dense"))


def load(folder: Path) -> Decoder:
    return Decoder(folder, ModelConfig.from_folder(folder), torch.float32, 64, show_progress=False)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    return str(caught.value)


def edit(folder: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Rewrite a checkpoint's tensors by ``change``, which may edit them in place."""
    tensors = load_file(folder / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def shard(folder: Path, count: int = 3) -> list[Path]:
    """Split a checkpoint's file into shards with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    files = {f"model-{i + 1:05}-of-{count:05}.safetensors": sorted(tensors)[i::count] for i in range(count)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    where = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [folder / file for file in files]


def logits(folder: Path) -> Tensor:
    """Return next-token logits after a prompt, [1, vocab_size]."""
    engine = sized_engine(folder, slots=1)
    captured: list[Tensor] = []
    forward = engine._model.forward
    engine._model.forward = lambda *args: captured.append(forward(*args)) or captured[-1]  # type: ignore[method-assign]
    engine.add_request("r", list(range(3, 40)), SamplingParams(temperature=0, max_tokens=1))
    engine.step()
    assert captured[0].isfinite().all()
    return captured[0]


class TestResolving:
    def test_a_folder_and_the_demo(self, tmp_path: Path) -> None:
        assert resolve_model(str(tmp_path)) == tmp_path
        assert resolve_model("demo") == DEMO_MODEL_DIR
        assert (DEMO_MODEL_DIR / "config.json").exists()

    @pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c", "~/no-such-folder-here"])
    def test_a_missing_folder_says_what_may_be_given(self, name: str) -> None:
        with pytest.raises(ModelError, match=r"no folder .*give a checkpoint folder, a hub id .* or 'demo'"):
            resolve_model(name)

    def test_a_file_is_not_a_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / WEIGHTS).touch()
        with pytest.raises(ModelError, match="is a file; give the checkpoint's folder"):
            resolve_model(str(tmp_path / WEIGHTS))

    def test_a_failed_download_names_the_model_and_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unreachable(*args: object, **options: object) -> str:
            raise OSError("the network is unreachable")

        monkeypatch.setattr("kvbuffer.models.weights.snapshot_download", unreachable)
        with pytest.raises(ModelError, match="'Qwen/Nothing' from the hub: the network is unreachable"):
            resolve_model("Qwen/Nothing")


class TestBrokenCheckpoints:
    def test_everything_wrong_is_listed_at_once(self, dense: Path) -> None:
        def spoil(tensors: Tensors) -> None:
            del tensors["model.layers.0.linear_attn.A_log"]
            tensors["model.layers.0.linear_attn.A_logarithm"] = torch.zeros(4)
            tensors["model.norm.weight"] = torch.zeros(63)

        edit(dense, spoil)
        message = refusal(dense)
        assert str(dense) in message
        assert "missing model.layers.0.linear_attn.A_log [4]" in message
        assert "unknown model.layers.0.linear_attn.A_logarithm" in message
        assert "model.norm.weight has shape [63], config.json implies [64]" in message

    def test_a_long_list_is_cut(self, dense: Path) -> None:
        edit(dense, lambda tensors: tensors.update({f"extra.{i:02}": torch.zeros(1) for i in range(25)}))
        message = refusal(dense)
        assert message.count("unknown extra.") == 20
        assert "and 5 more" in message

    def test_a_checkpoint_of_another_size(self, dense: Path) -> None:
        raw = json.loads((dense / "config.json").read_text())
        (dense / "config.json").write_text(json.dumps({**raw, "hidden_size": 32}))
        assert "embed_tokens.weight has shape [512, 64], config.json implies [512, 32]" in refusal(dense)

    def test_an_untied_head_must_be_there(self, dense: Path) -> None:
        edit(dense, lambda tensors: {name: x for name, x in tensors.items() if name != "lm_head.weight"})
        assert "missing lm_head.weight [512, 64]" in refusal(dense)

    def test_a_missing_shard_is_named(self, dense: Path) -> None:
        shards = shard(dense)
        shards[1].unlink()
        message = refusal(dense)
        assert shards[1].name in message
        assert shards[0].name not in message

    @pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
    def test_a_broken_index_is_named(self, dense: Path, index: str) -> None:
        (dense / INDEX).write_text(index)
        assert INDEX in refusal(dense)

    @pytest.mark.parametrize("kept", [0, 5, 500, -100])
    def test_a_truncated_file_is_named(self, dense: Path, kept: int) -> None:
        (dense / WEIGHTS).write_bytes((dense / WEIGHTS).read_bytes()[:kept])
        assert f"{dense / WEIGHTS} cannot be read as safetensors" in refusal(dense)

    def test_another_format_lists_what_was_found(self, dense: Path) -> None:
        (dense / WEIGHTS).rename(dense / "pytorch_model.bin")
        message = refusal(dense)
        assert "no .safetensors files" in message
        assert "pytorch_model.bin" in message
        assert "config.json" in message


class TestArrangements:
    def test_shards(self, dense: Path, saved: Path) -> None:
        shard(dense)
        assert torch.equal(logits(dense), logits(saved / "qwen3_5"))

    def test_what_is_not_served_is_ignored(self, dense: Path, saved: Path) -> None:
        extra = {f"{name}.weight": torch.zeros(3) for name in ("mtp.fc", "mtp.layers.0.norm", "model.visual.patch")}
        edit(dense, lambda tensors: tensors.update(extra))
        assert torch.equal(logits(dense), logits(saved / "qwen3_5"))

    def test_qwen3_next_ignores_its_prediction_head_only(self, saved: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved / "qwen3_next", tmp_path / "next"))
        edit(folder, lambda tensors: tensors.update({"mtp.fc.weight": torch.zeros(3)}))
        load(folder)
        edit(folder, lambda tensors: tensors.update({"model.visual.patch.weight": torch.zeros(3)}))
        assert "unknown model.visual.patch.weight" in refusal(folder)

    def test_multimodal_names(self, dense: Path, saved: Path) -> None:
        def nested(name: str) -> str:
            return name.replace("model.", "model.language_model.") if name.startswith("model.") else name

        edit(dense, lambda tensors: {nested(name): tensor for name, tensor in tensors.items()})
        raw = json.loads((dense / "config.json").read_text())
        raw = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": raw}
        (dense / "config.json").write_text(json.dumps(raw))
        assert torch.equal(logits(dense), logits(saved / "qwen3_5"))

    @pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_next"])
    def test_experts_fused_and_one_by_one(self, saved: Path, tmp_path: Path, name: str) -> None:
        folders = [Path(shutil.copytree(saved / name, tmp_path / form)) for form in ("fused", "single")]
        edit(folders[0], fuse_experts)
        edit(folders[1], split_experts)
        names = [set(load_file(folder / WEIGHTS)) for folder in folders]
        assert "model.layers.0.mlp.experts.gate_up_proj" in names[0]
        assert "model.layers.0.mlp.experts.7.up_proj.weight" in names[1]
        assert torch.equal(logits(folders[0]), logits(folders[1]))

    def test_a_missing_expert_is_named(self, saved: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved / "qwen3_5_moe", tmp_path / "moe"))
        edit(folder, split_experts)
        missing = "model.layers.0.mlp.experts.5.up_proj.weight"
        edit(folder, lambda tensors: {name: x for name, x in tensors.items() if name != missing})
        assert f"missing {missing} [48, 64]" in refusal(folder)


def fuse_experts(tensors: Tensors) -> None:
    """One tensor per projection for all experts of a layer."""
    for prefix in sorted({name.split("experts.")[0] + "experts." for name in tensors if ".experts.0." in name}):
        parts = {
            part: torch.stack([tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(8)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{prefix}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        tensors[f"{prefix}down_proj"] = parts["down"]


def split_experts(tensors: Tensors) -> None:
    """Three tensors per expert."""
    for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
        prefix = name.removesuffix("gate_up_proj")
        gate_up, down = tensors.pop(name), tensors.pop(f"{prefix}down_proj")
        for e in range(len(down)):
            gate, up = gate_up[e].chunk(2)
            for part, tensor in (("gate", gate), ("up", up), ("down", down[e])):
                tensors[f"{prefix}{e}.{part}_proj.weight"] = tensor.clone()
