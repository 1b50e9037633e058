"""Small random-weight checkpoints of the true architectures, made with transformers, with a real tokenizer."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 512
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 1024,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
}
MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 32,
}

#: Name -> (transformers' class, what differs from COMMON).
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3Next", {**MOE, "mlp_only_layers": [1]}),
    "qwen3_next_tied": ("Qwen3Next", {**MOE, "tie_word_embeddings": True, "norm_topk_prob": False}),
    "qwen3_next_heads": (
        "Qwen3Next",
        {**MOE, "linear_num_key_heads": 1, "num_key_value_heads": 4, "attention_bias": True, "num_hidden_layers": 5},
    ),
    "qwen3_5": ("Qwen3_5", {}),
    "qwen3_5_tied": ("Qwen3_5", {"tie_word_embeddings": True, "linear_num_value_heads": 2, "num_key_value_heads": 1}),
    "qwen3_5_moe": ("Qwen3_5Moe", MOE),
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens, trained on a few lines."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [
        f"{a}{b}" for a in ("the ", "state ", "buffer ", "key ", "value ", "token ") for b in "abcdefghijklmnopqrst"
    ]
    bpe.train_from_iterator(words * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def _use_plain_transformers() -> None:
    """Let transformers, which is an oracle here, compute in PyTorch, also where flash-linear-attention is installed.

    It decides on its kernels when a model's module is imported.
    """
    package = sys.modules.get("fla")
    sys.modules["fla"] = None  # type: ignore[assignment]
    try:
        for name in ("qwen3_next", "qwen3_5", "qwen3_5_moe"):
            importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    finally:
        del sys.modules["fla"]
        if package is not None:
            sys.modules["fla"] = package


_use_plain_transformers()


def make_checkpoint(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, mtp: bool = False, **changes: Any
) -> Path:
    """Save checkpoint ``name`` with freshly drawn weights to ``folder / name`` and return that path.

    With ``mtp``, it has a multi-token-prediction head, whose layer and norm are also there as a model of one layer, in
    the folder ``mtp_layer`` within.
    """
    cls, differences = CHECKPOINTS[name]
    settings = {**COMMON, **differences, **changes}
    torch.manual_seed(sum(name.encode()))
    path = folder / name
    random_model(cls, settings).to(dtype).save_pretrained(path)
    tokenizer().save_pretrained(path)
    if mtp:
        _add_mtp_head(path, cls, settings, dtype)
    return path


def random_model(cls: str, settings: dict[str, Any]) -> PreTrainedModel:
    """Return transformers' model of class ``cls`` with weights drawn from the global generator."""
    config = getattr(transformers, f"{cls}{'' if cls == 'Qwen3Next' else 'Text'}Config")(**settings)
    model = getattr(transformers, f"{cls}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # transformers starts most weights near zero, where mistakes hide: spread them, norms and gates included.
            if "A_log" not in key:
                scale = 0.3 if parameter.ndim == 1 else 2.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(
                    torch.randn_like(parameter) * scale + (1.0 if key.endswith("linear_attn.norm.weight") else 0.0)
                )
    return model


def _add_mtp_head(path: Path, cls: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Add ``mtp.*`` tensors to a checkpoint, with the names that the published checkpoints have."""
    one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "mlp_only_layers": []}
    random_model(cls, {**settings, **one_layer}).to(dtype).save_pretrained(path / "mtp_layer")
    layer = load_file(path / "mtp_layer" / "model.safetensors")
    kept = ("model.layers.0.", "model.norm.")
    head = {f"mtp.{key.removeprefix('model.')}": tensor for key, tensor in layer.items() if key.startswith(kept)}
    hidden = settings["hidden_size"]
    for norm in ("embedding", "hidden"):
        head[f"mtp.pre_fc_norm_{norm}.weight"] = (0.3 * torch.randn(hidden)).to(dtype)
    head["mtp.fc.weight"] = (torch.randn(hidden, 2 * hidden) / hidden**0.5).to(dtype)
    file = path / "model.safetensors"
    save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
