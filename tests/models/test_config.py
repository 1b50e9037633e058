"""config.json in every spelling that checkpoints use, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbuffer.errors import ModelError
from kvbuffer.models.config import SUPPORTED_ARCHITECTURES, ModelConfig, MoeConfig

DENSE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    "eos_token_id": 7,
    "dtype": "bfloat16",
}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 40,
}
HYBRID = ("linear_attention",) * 3 + ("full_attention",)


def config(architecture: str = "Qwen3_5ForCausalLM", **changes: Any) -> ModelConfig:
    """Read DENSE with changes; None removes a field."""
    raw = {"architectures": [architecture], **DENSE, **changes}
    return ModelConfig.from_dict({name: value for name, value in raw.items() if value is not None})


def refusal(architecture: str = "Qwen3_5ForCausalLM", **changes: Any) -> str:
    with pytest.raises(ModelError) as caught:
        config(architecture, **changes)
    return str(caught.value)


def test_qwen3_5_dense() -> None:
    got = config()
    assert (got.architecture, got.layout) == ("Qwen3_5ForCausalLM", "qwen3_5")
    assert got.layer_types == HYBRID * 2
    assert got.num_layers == 8
    assert (got.num_heads, got.num_kv_heads, got.head_dim) == (4, 2, 32)
    assert (got.rope_theta, got.rotary_dim) == (5e6, 16)
    assert got.linear.key_dim == 32
    assert got.linear.value_dim == 96
    assert got.linear.conv_dim == 2 * 32 + 96
    assert got.moe is None
    assert got.sparse_layers == (False,) * 8
    assert got.dtype == torch.bfloat16
    assert got.eos_token_ids == (7,)
    assert not got.tie_word_embeddings
    assert not got.attention_bias
    shape = got.cache_shape
    assert (shape.num_linear_layers, shape.num_attention_layers, shape.max_position_embeddings) == (6, 2, 4096)


def test_qwen3_next_mixture_of_experts() -> None:
    got = config("Qwen3NextForCausalLM", **MOE, mlp_only_layers=[1], decoder_sparse_step=2, norm_topk_prob=False)
    assert got.layout == "qwen3_next"
    assert got.moe == MoeConfig(8, 3, 48, 40, normalize=False)
    assert got.sparse_layers == (False, False, False, True, False, True, False, True)


def test_qwen3_5_moe_needs_no_dense_width() -> None:
    got = config("Qwen3_5MoeForCausalLM", **MOE, intermediate_size=None)
    assert got.moe == MoeConfig(8, 3, 48, 40, normalize=True)
    assert got.sparse_layers == (True,) * 8


def test_a_dense_architecture_ignores_leftover_expert_fields() -> None:
    assert config(**MOE).moe is None


@pytest.mark.parametrize("tied", [True, False])
def test_multimodal_checkpoints_nest_the_text_model(tied: bool) -> None:
    got = ModelConfig.from_dict(
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "text_config": {**DENSE, "eos_token_id": 11},
            "vision_config": {"hidden_size": 9999},
            "eos_token_id": 12,
            "tie_word_embeddings": tied,
        }
    )
    assert (got.hidden_size, got.num_layers, got.eos_token_ids) == (64, 8, (11,))
    assert got.tie_word_embeddings == tied


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"rope_theta": 1e6}, "partial_rotary_factor": 0.25},
        {"rope_parameters": {"type": "mrope", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}},
        {"rope_parameters": None, "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "default"}},
    ],
)
def test_rotary_embedding_in_old_and_new_spellings(spelling: dict[str, Any]) -> None:
    got = config(**spelling)
    assert (got.rope_theta, got.rotary_dim) == (1e6, 8)


def test_layer_types_or_an_interval() -> None:
    assert config(full_attention_interval=2).layer_types == ("linear_attention", "full_attention") * 4
    types = ["full_attention", *["linear_attention"] * 7]
    assert config(layer_types=types, full_attention_interval=2).layer_types == tuple(types)


def test_smaller_fields_have_the_families_defaults() -> None:
    got = config(
        head_dim=None, num_key_value_heads=None, eos_token_id=None, dtype=None, linear_conv_kernel_dim=None
    )  # fmt: skip
    assert (got.head_dim, got.num_kv_heads, got.eos_token_ids) == (16, 4, ())
    assert (got.dtype, got.linear.conv_kernel, got.rms_norm_eps) == (torch.bfloat16, 4, 1e-6)


@pytest.mark.parametrize(("eos", "expected"), [(5, (5,)), ([5, 6], (5, 6)), (0, (0,)), ([], ())])
def test_one_end_of_sequence_or_several(eos: Any, expected: tuple[int, ...]) -> None:
    assert config(eos_token_id=eos).eos_token_ids == expected


def test_dtype_in_old_and_new_spellings() -> None:
    assert config(dtype=None, torch_dtype="float32").dtype == torch.float32
    assert config(dtype="torch.float16").dtype == torch.float16
    assert "'int9000'" in refusal(dtype="int9000")


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], [], None])
def test_another_architecture_is_refused_with_the_supported_ones(names: list[str] | None) -> None:
    message = refusal(architectures=names)
    assert ("LlamaForCausalLM" if names else "missing") in message
    for name in SUPPORTED_ARCHITECTURES:
        assert name in message


@pytest.mark.parametrize("types", [["linear_attention"], ["sliding_attention"] * 8])
def test_bad_layer_types_are_refused(types: list[str]) -> None:
    message = refusal(layer_types=types)
    assert "for each of the 8 layers" in message
    assert types[0] in message


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}])
def test_scaled_rotary_embeddings_are_refused(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type") or rope["type"]
    for field in ("rope_parameters", "rope_scaling"):
        assert f"rope type {kind!r} is not supported" in refusal(**{"rope_parameters": None, field: rope})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear_num_value_heads": 3}, ["linear_num_value_heads (3)", "linear_num_key_heads (2)"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads (4)", "num_key_value_heads (3)"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "positive integer", "0"]),
        ({"linear_num_key_heads": 0}, ["linear_num_key_heads", "positive integer"]),
        ({"full_attention_interval": 0}, ["full_attention_interval"]),
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers", "True"]),
        ({"vocab_size": None}, ["has no vocab_size"]),
        ({"linear_key_head_dim": None}, ["has no linear_key_head_dim"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "'silu'"]),
    ],
)
def test_refusals_name_the_field_and_its_value(changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(**changes)
    for word in words:
        assert word in message


def test_more_experts_per_token_than_experts_are_refused() -> None:
    message = refusal("Qwen3_5MoeForCausalLM", **{**MOE, "num_experts_per_tok": 9})
    assert "num_experts_per_tok (9)" in message
    assert "num_experts (8)" in message


@pytest.mark.parametrize(("text", "words"), [(None, "has no config.json"), ("{", "not valid JSON"), ("[]", "object")])
def test_a_missing_or_broken_file(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        ModelConfig.from_folder(tmp_path)


def test_from_folder_reads_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3_5ForCausalLM"], **DENSE}))
    assert ModelConfig.from_folder(tmp_path) == config()
