"""Tiny models of every architecture that can be trained."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.support.checkpoints import COMMON, MOE

#: Name -> (transformers' class, what differs from COMMON). Each has two blocks, and halves in width and depth.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3Next", {**MOE, "mlp_only_layers": [1, 5], "attention_bias": True}),
    "qwen3_next_tied": ("Qwen3Next", {**MOE, "tie_word_embeddings": True, "linear_num_key_heads": 1}),
    "qwen3_5": ("Qwen3_5", {}),
    "qwen3_5_tied": ("Qwen3_5", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3_5_moe": ("Qwen3_5Moe", MOE),
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "num_hidden_layers": 2}),
}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of a model."""
    cls, differences = MODELS[name]
    kind = f"{cls}{'' if cls in ('Qwen3Next', 'Llama') else 'Text'}Config"
    fields = {key: value for key, value in COMMON.items() if cls != "Llama" or not key.startswith("linear_")}
    config = getattr(transformers, kind)(**{**fields, "num_hidden_layers": 8, **differences, **changes})
    return {**config.to_dict(), "architectures": [f"{cls}ForCausalLM"]}


def model_of(config: dict[str, Any]) -> transformers.PreTrainedModel:
    """A model with transformers' initial weights."""
    torch.manual_seed(0)
    cls = getattr(transformers, config["architectures"][0])
    # The default for experts has no float64.
    return cls._from_config(cls.config_class(**config), dtype=torch.float32, experts_implementation="eager").eval()


def scattered(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model with all weights spread out, norms and gates included: near their initial values mistakes hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * scale)
    return model
