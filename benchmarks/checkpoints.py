"""Random-weight checkpoints to benchmark with, and their GGUF form for llama.cpp.

Speed does not depend on what the weights say, so the models are made here instead of downloaded: the shapes are
those of small Qwen3.5 and Qwen3-Next models, the weights are the architecture's own initialisation, and the
tokenizer is a byte-level BPE trained on the Python standard library's sources. Everything is made once and kept in
the cache folder.

    python benchmarks/checkpoints.py [dense] [moe]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

CACHE = Path(os.environ.get("KVBUFFER_BENCH_CACHE", Path.home() / ".cache" / "kvbuffer-bench"))
VOCAB_SIZE = 32768
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}
KINDS = ("dense", "moe")

# A freshly initialised router is nearly indifferent, so that rounding decides which expert comes fourth and with a
# quarter of the weight: outputs of two correct bfloat16 systems then have little in common. A trained router is surer.
# The order of the experts, hence the work, stays as it is.
_ROUTER_SCALE = 8


def checkpoint(kind: str) -> Path:
    """The Hugging Face folder of one kind of model (bfloat16 safetensors), made on first use; `demo`: our own."""
    if kind == "demo":
        from kvbuffer.models.weights import resolve_model

        return resolve_model(kind)
    folder = CACHE / kind
    if not (folder / "tokenizer_config.json").exists():
        _make_model(kind, folder)
        _make_tokenizer().save_pretrained(folder)
    return folder


def gguf(kind: str, peers: Path, outtype: str = "bf16") -> Path:
    """The same model for llama.cpp, converted with llama.cpp's own converter in its own environment."""
    path = CACHE / f"{kind}-{outtype}.gguf"
    if not path.exists():
        sources = next((peers / "src").glob("llama_cpp_python-*/vendor/llama.cpp"))
        script = Path(__file__).with_name("convert_gguf.py")
        partial = path.with_suffix(".partial")
        command = [peers / "lcpp/bin/python", script, sources, checkpoint(kind), partial, outtype]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        partial.rename(path)
    return path


def num_parameters(kind: str) -> int:
    """Number of weights in the checkpoint, from the headers of its safetensors files."""
    total = 0
    for file in checkpoint(kind).glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for dim in entry["shape"]:
                    size *= dim
                total += size
    return total


def _make_model(kind: str, folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    if kind == "dense":
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SHAPE))
    else:
        model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**SHAPE, **EXPERTS))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight *= _ROUTER_SCALE
    model.generation_config.eos_token_id = None  # every output runs to the length that was asked for
    model.to(torch.bfloat16).save_pretrained(folder)


def _make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_standard_library(), trainer)
    if bpe.get_vocab_size() != VOCAB_SIZE:  # an id without a token would trip some detokenizers
        raise RuntimeError(f"the tokenizer has {bpe.get_vocab_size()} entries instead of {VOCAB_SIZE}")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def _standard_library(max_files: int = 800) -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if "site-packages" not in file.parts]
    for file in files[:max_files]:
        yield file.read_text(encoding="utf8", errors="ignore")


if __name__ == "__main__":
    for kind in sys.argv[1:] or KINDS:
        print(kind, checkpoint(kind), f"{num_parameters(kind) / 1e6:.1f} M parameters")
