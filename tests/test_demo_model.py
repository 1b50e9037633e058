"""The embedded demo model is a complete, small Qwen3-Next chat checkpoint that answers in recognisable sentences."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvbuffer

FOLDER = Path(kvbuffer.__file__).parent / "demo_model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_folder_is_small_and_names_its_data_and_licence():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 20_000_000
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "PSF License" in card
    assert "apache-2.0" in card


def test_it_has_every_part_of_the_architecture():
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3NextForCausalLM"]
    assert set(config["layer_types"]) == {"linear_attention", "full_attention"}
    assert config["linear_num_value_heads"] > config["linear_num_key_heads"]
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["num_experts"] > config["num_experts_per_tok"] > 1
    assert config["mlp_only_layers"]
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.25


def test_every_weight_is_finite_bfloat16():
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (not a dictionary)
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16, name
            assert tensor.isfinite().all(), name


@pytest.mark.parametrize("text", ["What does `zip()` do?", "  indented\n\tcode", "naïve café 東京 🐍", ""])
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_marks_every_turn(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "tool", "content": "42"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Who are you?", "kvbuffer"),
        ("What is a list comprehension?", "[x * x for x in range(10)]"),
        ("How do I read a file?", "with open("),
    ],
)
def test_greedy_answers_are_recognisable_and_end(model, tokenizer, question, expected):
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=100)[0, prompt["input_ids"].shape[1] :]
    assert expected in tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1] == tokenizer.eos_token_id
