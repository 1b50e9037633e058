"""Tiny models of every architecture that can be trained, and tiny data and runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from kvbuffer.train.config import TrainConfig
from kvbuffer.train.data import Batch, prepare
from tests.support.checkpoints import COMMON, MOE, VOCAB_SIZE

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


def write_texts(folder: Path, documents: int = 40) -> Path:
    """Write a folder of small texts in which a model can find something to learn."""
    folder.mkdir(parents=True)
    rng = random.Random(documents)
    for number in range(documents):
        words = [f"{rng.choice('abcd')}{rng.choice(('state', 'buffer', 'key'))}" for _ in range(60)]
        (folder / f"{number:03}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def write_chats(folder: Path) -> Path:
    """Write a JSONL file of conversations whose answers have many lengths."""
    rng = random.Random(1)
    with (folder / "chats.jsonl").open("w") as file:
        for _ in range(60):
            words = [rng.choice(("astate", "bkey")) for _ in range(rng.randrange(1, 40))]
            turns = ({"role": "user", "content": words[0]}, {"role": "assistant", "content": " ".join(words)})
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder / "chats.jsonl"


def prepare_tiny(folder: Path) -> Path:
    """Prepare tiny data for training, and return its folder."""
    prepare(write_texts(folder / "texts"), folder / "data", vocab_size=300, held_out=0.2)
    return folder / "data"


def random_batch(rows: int, seq_len: int) -> Batch:
    """A batch of random tokens, all of them learned."""
    tokens = torch.randint(VOCAB_SIZE, (rows, seq_len + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], float(rows * seq_len))


def tiny_options(data: Path, out: Path, model: str = "llama", **changes: Any) -> TrainConfig:
    """Options of a run that takes a second or so."""
    config = {**config_of(model), "hidden_size": 32, "intermediate_size": 64, "head_dim": 16}
    path = data / f"{model}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    options: dict[str, Any] = {
        "steps": 12, "batch_size": 4, "seq_len": 32, "warmup": 2, "rewarm": 1, "lr": 1e-2,
        "save_every": 3, "eval_every": 4, "eval_sequences": 4, **changes,
    }  # fmt: skip
    return TrainConfig(data=data, out=out, model=path, **options)
