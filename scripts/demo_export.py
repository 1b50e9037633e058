"""The demo model's configuration and tokenizer, and its export as a Hugging Face checkpoint."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3NextConfig, Qwen3NextForCausalLM

from demo_network import Network

END, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONFIG = Qwen3NextConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=128,
    mlp_only_layers=[0],
    tie_word_embeddings=True,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    pad_token_id=0,
    eos_token_id=2,
)
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The kvbuffer demo model

A Qwen3-Next chat model of {parameters:.1f} million parameters, so that `kvbuffer` can be tried without a download. It
has every part of the architecture: Gated DeltaNet layers, gated attention with partial rotary embedding in every
fourth layer, a mixture of {experts} experts with a shared expert, a dense first layer and zero-centred norms.

It answers simple questions about Python in English. It is far too small to be relied on: it invents what it does not
know, and it cannot calculate.

## Training

`python scripts/train_demo.py` made it, in {minutes:.0f} minutes on two CPU cores and {tokens:.2f} million tokens, from

- the documentation of Python 3.11 (library, tutorial, FAQ, reference and how-to pages), as Debian packages it;
- the docstrings of Python's standard library, and `pydoc_data.topics`;
- questions and answers generated from these, and some dialogues written for this project.

Python's documentation and docstrings are copyright © 2001 Python Software Foundation and used under the
[PSF License Version 2](https://docs.python.org/3/license.html); examples in the documentation are also under the
Zero-Clause BSD License. The weights are published under Apache-2.0.
"""


def train_tokenizer(texts: list[str], path: Path) -> None:
    """Trains a byte-level BPE of the configured vocabulary size and saves it as one JSON file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def export(network: Network, tokenizer_path: Path, folder: Path, minutes: float, tokens: int) -> None:
    """Writes the network in bfloat16, with its tokenizer, chat template, generation defaults and model card.

    `minutes` and `tokens` of training are named in the card.
    """
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(CONFIG)
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]}, assign=True)
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[2, 0], pad_token_id=0
    )
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_path),
        eos_token=END_OF_TURN,
        pad_token=END,
        model_max_length=CONFIG.max_position_embeddings,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    # The class that loads it under every version of transformers; version 5 writes a name of its own.
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    card = MODEL_CARD.format(parameters=parameters, experts=CONFIG.num_experts, minutes=minutes, tokens=tokens / 1e6)
    (folder / "README.md").write_text(card)
