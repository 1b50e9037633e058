"""Coalescing, de-coalescing and interpolation on transformers' own models.

The oracle for growth in width is the model itself: what a grown model computes is what the small one does. That fails
as soon as one parameter is merged along a wrong axis, or one head is merged with a wrong one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbuffer import LLM, SamplingParams
from kvbuffer.errors import ConfigError, ModelError
from kvbuffer.train.checkpoints import (
    coalesce_files,
    decoalesce_files,
    interpolate_files,
    read_checkpoint,
    read_config,
)
from kvbuffer.train.operators import LevelMap, Parameters, coalesced_config, interpolate
from tests.support.checkpoints import MOE, VOCAB_SIZE, make_checkpoint
from tests.support.training import MODELS, config_of, model_of, scattered

NAMES = list(MODELS)


def small_of(name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any], transformers.PreTrainedModel]:
    """The large and the small config, and a small model with weights spread out, in float64."""
    large = config_of(name, **changes)
    small = coalesced_config(large)
    return large, small, scattered(model_of(small)).double()


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make float64 models compute in float64 throughout: theirs go to float32 for norms and the delta rule."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def parameters(model: transformers.PreTrainedModel) -> Parameters:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pairing", ["adjacent", "stacked"])
def test_coalescing_undoes_decoalescing(name: str, pairing: Any) -> None:
    large, small, model = small_of(name)
    levels, state = LevelMap(large, small, pairing), parameters(model)
    grown = levels.decoalesce(state)
    assert {key: tensor.shape for key, tensor in grown.items()} == {
        key: tensor.shape for key, tensor in parameters(model_of(large)).items()
    }
    again = levels.coalesce(grown)
    assert again.keys() == state.keys()
    for key, tensor in state.items():
        if key == "model.norm.weight" and small["tie_word_embeddings"]:
            torch.testing.assert_close(again[key], tensor, rtol=0, atol=1e-15)
        else:
            assert torch.equal(again[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_growing_in_width_preserves_the_function(name: str, request: pytest.FixtureRequest) -> None:
    large = config_of(name)
    small = coalesced_config(large, depth=1)
    model, grown = scattered(model_of(small)).double(), model_of(large).double()
    levels = LevelMap(large, small)
    request.getfixturevalue("float64")  # not before the models are made
    grown.load_state_dict(levels.decoalesce(parameters(model)), strict=not large["tie_word_embeddings"])
    ids = torch.randint(VOCAB_SIZE, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = model(ids).logits, grown(ids).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["qwen3_5", "llama_tied"])
def test_copies_stay_copies_under_adam_and_interpolation_parts_them(name: str) -> None:
    large, small, model = small_of(name)
    levels = LevelMap(large, small)
    grown = levels.decoalesce(parameters(model))
    fresh = parameters(scattered(model_of(large)).double())

    def distance_from_copies(alpha: float) -> float:
        trained = model_of(large).double()
        trained.load_state_dict(interpolate(fresh, grown, alpha), strict=not large["tie_word_embeddings"])
        optimizer = torch.optim.Adam(trained.parameters(), 1e-3)
        ids = torch.randint(VOCAB_SIZE, (2, 33), generator=torch.Generator().manual_seed(2))
        for _ in range(3):
            trained(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        state = parameters(trained)
        width_only = LevelMap(large, coalesced_config(large, depth=1))
        copies = width_only.decoalesce(width_only.coalesce(state))
        return max(float((copies[key] - state[key]).abs().max()) for key in state)

    assert distance_from_copies(1.0) < 1e-9
    assert distance_from_copies(0.5) > 1e-3


def test_layers_are_merged_in_whole_blocks() -> None:
    """Every parameter of layer i holds i: the means show which layers were merged."""
    large = config_of("qwen3_5")  # two blocks of 4 layers, one of them full attention
    small = coalesced_config(large, width=1)
    state = {key: torch.zeros_like(tensor) for key, tensor in parameters(model_of(large)).items()}
    for key, tensor in state.items():
        if key.startswith("model.layers."):
            tensor.fill_(int(key.split(".")[2]))
    merged = LevelMap(large, small).coalesce(state)
    for key, tensor in merged.items():
        if key.startswith("model.layers."):
            layer = int(key.split(".")[2])
            assert tensor.unique().tolist() == [(layer + layer + 4) / 2]


def test_pairings_differ_when_there_are_more_blocks() -> None:
    large = config_of("llama", num_hidden_layers=4)
    small = coalesced_config(large, width=1)
    state = {"model.norm.weight": torch.zeros(64)}
    state |= {f"model.layers.{i}.input_layernorm.weight": torch.full((64,), float(i)) for i in range(4)}
    for pairing, means in (("adjacent", [0.5, 2.5]), ("stacked", [1.0, 2.0])):
        merged = LevelMap(large, small, pairing).coalesce(state)  # type: ignore[arg-type]
        assert [float(merged[f"model.layers.{i}.input_layernorm.weight"][0]) for i in range(2)] == means


@pytest.mark.parametrize("per_expert", [False, True])
def test_mtp_parameters_and_experts_one_by_one(per_expert: bool) -> None:
    """The prediction head, and the names that published mixtures have in their files, are known too."""
    large = config_of("qwen3_next")
    small = coalesced_config(large)
    hidden, size = large["hidden_size"], MOE["moe_intermediate_size"]
    state = {
        "mtp.fc.weight": torch.randn(hidden, 2 * hidden),
        "mtp.norm.weight": torch.randn(hidden),
        "mtp.pre_fc_norm_hidden.weight": torch.randn(hidden),
        "mtp.layers.0.self_attn.k_norm.weight": torch.randn(32),
    }
    if per_expert:
        state["model.layers.0.mlp.experts.3.up_proj.weight"] = torch.randn(size, hidden)
        state["model.layers.4.mlp.experts.3.up_proj.weight"] = torch.randn(size, hidden)
    merged = LevelMap(large, small).coalesce(state)
    fc, half = state["mtp.fc.weight"], hidden // 2
    rows = (fc[:half] + fc[half:]) / 2
    expected = [rows[:, i * hidden : i * hidden + half] + rows[:, i * hidden + half : (i + 1) * hidden] for i in (0, 1)]
    torch.testing.assert_close(merged["mtp.fc.weight"], torch.cat(expected, 1))
    assert torch.equal(merged["mtp.layers.0.self_attn.k_norm.weight"], state["mtp.layers.0.self_attn.k_norm.weight"])
    if per_expert:
        assert merged["model.layers.0.mlp.experts.3.up_proj.weight"].shape == (size // 2, half)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 5}, r"num_hidden_layers \(5\) cannot be divided by 2"),
        ({"intermediate_size": 97}, r"intermediate_size \(97\)"),
        ({"num_hidden_layers": 4}, "layer 3 .*cannot be merged into layer 1"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, r"num_key_value_heads \(3\)"),
    ],
)
def test_models_that_cannot_be_halved_are_refused(changes: dict[str, Any], match: str) -> None:
    large = config_of("qwen3_5", **changes)
    with pytest.raises(ConfigError, match=match):
        LevelMap(large, coalesced_config(large))


def test_wrong_pairs_and_unknown_names_are_refused() -> None:
    large = config_of("llama")
    with pytest.raises(ConfigError, match="must be the same"):
        LevelMap(large, config_of("llama_tied"))
    with pytest.raises(ConfigError, match="heads and groups"):
        LevelMap(large, {**coalesced_config(large), "num_key_value_heads": large["num_key_value_heads"]})
    with pytest.raises(ModelError, match=r"architecture .*GPT2.* cannot be trained"):
        LevelMap({"architectures": ["GPT2LMHeadModel"]}, large)
    with pytest.raises(ModelError, match=r"parameter model\.odd"):
        LevelMap(large, coalesced_config(large)).coalesce({"model.odd": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"alpha must be from 0 to 1, got 1\.5"):
        interpolate({}, {}, 1.5)
    with pytest.raises(ModelError, match="do not have the same parameters: a"):
        interpolate({"a": torch.zeros(1)}, {}, 0.5)


def test_from_file_to_file(tmp_path: Path) -> None:
    """One whole cycle on disk, in bfloat16; the server's engine loads each checkpoint."""
    large = make_checkpoint(tmp_path, "qwen3_next_tied", torch.bfloat16, num_hidden_layers=8)
    small, grown, mixed = (tmp_path / name for name in ("small", "grown", "mixed"))
    coalesce_files(large, small, width=2, depth=2, pairing="adjacent")
    decoalesce_files(small, large, grown, pairing="adjacent")
    interpolate_files(large, grown, mixed, alpha=0.25)
    assert read_config(small)["num_hidden_layers"] == 4
    assert read_config(mixed) == read_config(large)
    original, changed = read_checkpoint(large).parameters, read_checkpoint(mixed).parameters
    assert {k: (v.shape, v.dtype) for k, v in changed.items()} == {k: (v.shape, v.dtype) for k, v in original.items()}
    for folder in (small, mixed):
        llm = LLM(str(folder), memory=32 << 20, show_progress=False)
        outputs = llm.generate(["the state"], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
        assert len(outputs[0].outputs[0].token_ids) == 2
    with pytest.raises(ConfigError, match="exists already"):
        coalesce_files(large, small, width=2, depth=2, pairing="adjacent")
