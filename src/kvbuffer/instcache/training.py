"""The training of an instruction predictor, by :mod:`kvbuffer.train`.

It learns ``head + instruction + end`` of the chat template, each instruction in a sequence of its own: just what the
search will ask for.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from kvbuffer.instcache import defaults
from kvbuffer.instcache.logs import read_log
from kvbuffer.instcache.turn import UserTurn
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.weights import resolve_model
from kvbuffer.tokenizer import Tokenizer
from kvbuffer.train.checkpoints import copy_companions, new_folder
from kvbuffer.train.config import TrainConfig
from kvbuffer.train.defaults import LR, REWARM, WARMUP
from kvbuffer.train.examples import write_examples
from kvbuffer.train.run import run
from kvbuffer.train.tokenizer import train_tokenizer

#: ``config.json`` of the predictor that is trained from scratch: some 2 million parameters beside the embeddings.
SMALL: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 48,
    "linear_value_head_dim": 48,
    "tie_word_embeddings": True,
}
# Trained weights need less than fresh ones.
_FINE_TUNE_LR = 0.1 * LR
# Of these, a training run looks at that many now and then; plan looks at more.
_EVALUATED = 512


@dataclass(frozen=True)
class FitOptions:
    """How a predictor is trained.

    Attributes:
        model: checkpoint to fine-tune (folder, hub id or ``demo``), or ``config.json`` of what to train from scratch;
            None for :data:`SMALL`.
        vocab_size: of the tokenizer that is trained on the instructions; a checkpoint keeps its own.
        max_tokens: longer instructions are left out, as no search would find them.
        epochs: how often each instruction is seen, but for at least ``defaults.FEWEST_STEPS`` steps.
        batch_size: instructions per step.
        lr: peak learning rate; None for a usual one.
        seed: of fresh weights and of the order.
    """

    model: str | None = None
    vocab_size: int = defaults.VOCAB_SIZE
    max_tokens: int = defaults.MAX_TOKENS
    epochs: float = defaults.EPOCHS
    batch_size: int = defaults.BATCH_SIZE
    lr: float | None = None
    seed: int = 0


def train_predictor(folder: Path, options: FitOptions, show_progress: bool = True) -> Path:
    """Train on ``train.jsonl`` in ``folder``, evaluate on ``held-out.jsonl``; go on where an earlier call was stopped.

    Args:
        folder: see :func:`~kvbuffer.instcache.fit.prepare`; the run goes there, too.
        options: what to train, and how.
        show_progress: draw a progress bar.

    Returns:
        The predictor's folder.

    Raises:
        ConfigError: no instruction is short enough; or a run with other options, or on another log, has begun here.
        ModelError: the model cannot be trained, or its chat template does not tell instructions apart.
    """
    fresh = options.model is None or options.model.endswith(".json")
    source = Path(options.model or "") if fresh else resolve_model(str(options.model))
    data = folder / f"data-{_digest(folder, options)}"
    if not data.exists():
        _tokenize(folder, data, None if fresh else source, options)
    if options.model is None:
        source = data / "config.json"
    examples, longest = np.load(data / "train.npy", mmap_mode="r").shape
    steps = max(defaults.FEWEST_STEPS, math.ceil(options.epochs * examples / options.batch_size))
    config = TrainConfig(
        data=data,
        out=folder / "run",
        model=source,
        init=None if fresh else source,
        method="scratch",
        steps=steps,
        batch_size=options.batch_size,
        seq_len=longest - 1,
        lr=options.lr or (LR if fresh else _FINE_TUNE_LR),
        seed=options.seed,
        warmup=min(WARMUP, steps // 10),
        rewarm=min(REWARM, steps // 10),
        eval_every=max(1, steps // 10),
        eval_sequences=_EVALUATED,
    )
    run(config, show_progress)
    return config.out / "model"


def _digest(folder: Path, options: FitOptions) -> str:
    """Name what the tokens depend on, so that other tokens are other data, and not mistaken for those of a run."""
    digest = blake2b(json.dumps(asdict(options)).encode(), digest_size=8)
    for name in ("train.jsonl", "held-out.jsonl"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _tokenize(folder: Path, data: Path, checkpoint: Path | None, options: FitOptions) -> None:
    train, held_out = ([one.instruction for one in read_log(folder / f"{n}.jsonl")] for n in ("train", "held-out"))
    with new_folder(data) as partial:
        if checkpoint is None:
            train_tokenizer(train, options.vocab_size, partial)
            (partial / "config.json").write_text(json.dumps(SMALL, indent=1) + "\n", encoding="utf-8")
        else:
            copy_companions(checkpoint, partial)
        tokenizer = Tokenizer(partial)
        vocab_size = tokenizer.vocab_size if checkpoint is None else ModelConfig.from_folder(checkpoint).vocab_size
        turn = UserTurn(tokenizer)
        separator = turn.end if tokenizer.eos_token_id is None else tokenizer.eos_token_id

        def encode(texts: list[str]) -> dict[str, list[int]]:
            return {t: ids for t in set(texts) if (ids := turn.encode(t)) and len(ids) <= options.max_tokens}

        known = encode([*train, *held_out])
        write_examples(
            partial,
            vocab_size=vocab_size,
            separator=separator,
            stop_tokens=sorted({separator, turn.end}),
            train=[[*turn.head, *known[text], turn.end] for text in train if text in known],
            held_out=[[*turn.head, *known[text], turn.end] for text in held_out if text in known],
            held_out_bytes=sum(len(text.encode()) for text in held_out if text in known),
        )
