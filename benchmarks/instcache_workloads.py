"""Workloads of instructions with known probabilities, and a small predictor trained on a log of one.

An instruction is an opening, a subject, a manner and an ending, each drawn by Zipf's law. So the probability of every
instruction is known, and with it the entropy and the best hit rate that any table of N entries has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

OPENINGS = ("What is", "How do I use", "Explain", "Show an example of", "Tell me about", "Compare others with")
SUBJECTS = tuple(
    f"{kind} {name}"
    for kind in ("the", "a nested", "an empty")
    for name in ("list", "dictionary", "set", "tuple", "string", "generator", "class", "loop", "function", "file")
)
MANNERS = ("", "briefly", "in detail", "with code")
ENDINGS = ("", "?", " please")
PARTS = (OPENINGS, SUBJECTS, MANNERS, ENDINGS)


@dataclass(frozen=True)
class Workload:
    """A distribution of instructions.

    Attributes:
        name: what it is called in the results.
        exponent: of Zipf's law, for every part; 0 is uniform.
    """

    name: str
    exponent: float

    def _shares(self, parts: Sequence[str]) -> np.ndarray:
        weights = np.arange(1, len(parts) + 1) ** -self.exponent
        return weights / weights.sum()

    def sample(self, count: int, seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        drawn = [rng.choice(part, count, p=self._shares(part)).tolist() for part in PARTS]
        return [" ".join(parts).strip() + ending for *parts, ending in zip(*drawn, strict=True)]

    @property
    def entropy(self) -> float:
        """In nats."""
        shares = [self._shares(part) for part in PARTS]
        return float(-sum((share * np.log(share)).sum() for share in shares))

    def best_hit_rate(self, entries: int) -> float:
        """What a table of the likeliest ``entries`` instructions would hit."""
        probabilities = np.ones(1)
        for part in PARTS:
            probabilities = np.outer(probabilities, self._shares(part)).ravel()
        return float(np.sort(probabilities)[::-1][:entries].sum())


COLD_START = Workload("cold start", 0.5)
SKEWED = Workload("skewed", 1.3)


def train_predictor(log: Sequence[str], folder: Path, steps: int, batch: int = 64) -> float:
    """Train a small Qwen3.5 on a log of instructions, save it with a tokenizer, return its loss in nats a token."""
    import transformers
    from tests.support.checkpoints import CHAT_TEMPLATE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [*log, "user\n", "assistant\n"],
        trainers.BpeTrainer(vocab_size=448, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    config = transformers.Qwen3_5TextConfig(
        vocab_size=448, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, linear_conv_kernel_dim=4, linear_key_head_dim=32, linear_value_head_dim=32,
        linear_num_key_heads=2, linear_num_value_heads=4, max_position_embeddings=256, eos_token_id=2, pad_token_id=0,
        layer_types=["linear_attention", "full_attention"], tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForCausalLM(config)
    encoded = [tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>") for text in log]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    rng, loss = np.random.default_rng(0), torch.tensor(math.nan)
    for _ in range(steps):
        rows = [encoded[i] for i in rng.integers(len(encoded), size=batch)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        labels = ids.masked_fill(ids == 0, -100)
        labels[:, :3] = -100  # the template's own tokens
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(loss.detach())
