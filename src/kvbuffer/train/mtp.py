"""Training a multi-token-prediction head, with which a model drafts its own next tokens.

The model is frozen. The head is that of Qwen3-Next and Qwen3.5: norms, a projection and one full-attention layer, at
first a copy of the model's last one. It learns the distributions that the model will give, one to ``drafts`` tokens
ahead of what the model has computed.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from transformers import DynamicCache

from kvbuffer.errors import ConfigError, ModelError
from kvbuffer.train import defaults
from kvbuffer.train.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from kvbuffer.train.data import IGNORED, Batch, Batches, held_out_batches
from kvbuffer.train.model import load
from kvbuffer.train.optim import Optimizers, descend, learning_rate
from kvbuffer.train.savepoint import Savepoint
from kvbuffer.train.workers import Workers

#: Places of a batch, of those that count, whose distributions are compared in a step.
_PLACES = 1024


@dataclass(frozen=True)
class MtpOptions:
    """How a head is trained; the names are those of :class:`~kvbuffer.train.config.TrainConfig`.

    Attributes:
        drafts: tokens that are drafted one after the other in training.
    """

    steps: int = defaults.MTP_STEPS
    batch_size: int = defaults.BATCH_SIZE
    seq_len: int = defaults.SEQ_LEN
    lr: float = defaults.LR
    drafts: int = defaults.MTP_DRAFTS
    seed: int = 0
    save_every: int = defaults.SAVEPOINT_EVERY
    eval_sequences: int = defaults.EVAL_SEQUENCES


class MtpHead(nn.Module):
    """Maps hidden states and the tokens after them to estimates of the hidden states of these tokens.

    Its parameters have the names of the ``mtp.*`` tensors of Qwen3-Next and Qwen3.5.

    Args:
        model: what it drafts for.

    Raises:
        ModelError: the model's architecture has no such head, or the model no full-attention layer to begin with.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        full = [i for i, kind in enumerate(getattr(config, "layer_types", None) or ()) if kind == "full_attention"]
        if not full or not type(model).__name__.startswith("Qwen3"):
            raise ModelError(f"{type(model).__name__} has no multi-token-prediction head; train one of Qwen3.5")
        self.pre_fc_norm_embedding = deepcopy(model.model.norm)
        self.pre_fc_norm_hidden = deepcopy(model.model.norm)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([deepcopy(model.model.layers[full[-1]])])
        self.norm = deepcopy(model.model.norm)
        nn.init.normal_(self.fc.weight, std=config.initializer_range)

    def forward(self, embedded: Tensor, hidden: Tensor, rotary: tuple[Tensor, Tensor], past: DynamicCache) -> Tensor:
        """Run one pass over all places: [B, T, hidden_size] each, in and out.

        The n-th of several passes computes what serving computes as the n-th draft. There, a place sees the keys and
        values of the first pass up to n - 1 places before it, of the later passes at one place each, and its own.

        Args:
            embedded: the tokens after those of ``hidden``.
            hidden: what the model, or the pass before at the place before, says.
            rotary: cosines and sines of the places.
            past: keys and values of all passes, one behind the other; appended to.
        """
        x = self.fc(torch.cat((self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)), -1))
        layer: Any = self.layers[0]
        length, done = x.shape[1], past.get_seq_length(layer.self_attn.layer_idx) // x.shape[1]
        places = torch.ones(length, length, dtype=torch.bool)
        seen = [places.tril(-done)] + [places.tril(n - done).triu(n - done) for n in range(1, done + 1)]
        mask = torch.cat(seen, 1)[None, None]
        out: Tensor = self.norm(layer(x, position_embeddings=rotary, attention_mask=mask, past_key_values=past))
        return out


class _Pass(NamedTuple):
    """One draft at every place: cross-entropy to the model's distribution, and where their best tokens agree [B, T]."""

    loss: Tensor
    agrees: Tensor


def _passes(model: Any, head: MtpHead, batch: Batch, drafts: int, counts: Tensor) -> list[_Pass]:
    """Run the head over a batch [B, T + 1].

    Place i has the model's hidden state of token i, and token i + 1, and guesses token i + 2. In later passes the
    hidden state is what the pass before gave one place earlier. ``counts`` [B, T] says which guesses enter the loss.
    """
    with torch.no_grad():
        states = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        embedded = model.get_input_embeddings()(batch.tokens[:, 1:])
        target = model.lm_head(states[:, 1:])
        rotary = model.model.rotary_emb(states, torch.arange(embedded.shape[1])[None])
    chosen = counts.flatten().nonzero().squeeze(1)
    chosen = chosen[torch.randperm(len(chosen))[:_PLACES]]
    wanted = target.flatten(0, 1)[chosen].softmax(-1)
    hidden, past, results = states[:, :-1], DynamicCache(), []
    for _ in range(drafts):
        out = head(embedded, hidden, rotary, past)
        logits = model.lm_head(out)
        loss = F.cross_entropy(logits.flatten(0, 1)[chosen], wanted)
        results.append(_Pass(loss, logits.argmax(-1) == target.argmax(-1)))
        hidden = out.roll(1, 1)
    return results


def _generated(batch: Batch, drafts: int) -> Tensor:
    """Return [B, T]: whether the token that a place guesses is one that the model would generate."""
    counts = batch.targets[:, 1:] != IGNORED
    counts[:, :drafts] = False  # no place comes that long before these
    return counts


@torch.no_grad()
def acceptance(model: Any, head: MtpHead, batches: list[Batch], drafts: int) -> list[float]:
    """Return how often the model's own greedy choices are the first draft, the first two, and so on."""
    accepted, chains = torch.zeros(drafts), 0
    for batch in batches:
        counts = _generated(batch, drafts)
        passes = _passes(model, head, batch, drafts, counts)
        length = counts.shape[1] - drafts + 1
        held = counts[:, :length]
        chains += int(held.sum())
        for n, made in enumerate(passes):
            held = held & made.agrees[:, n : n + length]
            accepted[n] += held.sum()
    return (accepted / max(1, chains)).tolist()


def train_mtp(source: Path, data: Path, out: Path, options: MtpOptions) -> list[float]:
    """Write checkpoint ``source`` with a new head to ``out``; return the head's :func:`acceptance` on held-out text.

    A training that was cut off goes on at its last savepoint, and ends with the same head as if it had not been.

    Args:
        source: checkpoint folder; a head that it has is replaced.
        data: folder made by ``kvbuffer train prepare`` with the checkpoint's tokenizer.
        out: folder to write.
        options: how to train.

    Raises:
        ConfigError: ``out`` exists, or options or data cannot be used, or the savepoint is of other options.
        ModelError: the checkpoint cannot be read, or has no such head.
        KVBufferError: the loss is not finite.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; remove it or give another folder")
    if min(options.steps, options.save_every) < 1 or not 1 <= options.drafts < options.seq_len // 2:
        raise ConfigError(
            f"steps ({options.steps}), save_every ({options.save_every}) and drafts ({options.drafts}) must be at "
            f"least 1, and drafts fewer than half of seq_len ({options.seq_len})"
        )
    torch.manual_seed(options.seed)
    checkpoint = read_checkpoint(source)
    model = load(source).eval().requires_grad_(False)
    head = MtpHead(model).train().requires_grad_(True)
    optimizers = Optimizers(head, "muon", options.lr, weight_decay=0.0)
    batches = Batches(data, options.seq_len, options.batch_size, options.seed)
    inputs = {"source": str(source.resolve()), "data": str(data.resolve())}
    savepoint = Savepoint(out, {**inputs, **asdict(options)}, head, optimizers)
    done = savepoint.resume()
    for step in track(range(done, options.steps), "Training the head", total=options.steps, completed=done):
        batch = batches.batch(step)
        passes = _passes(model, head, batch, options.drafts, _generated(batch, options.drafts))
        loss = torch.stack([made.loss for made in passes]).mean()
        share = learning_rate(step, options.steps, warmup=20, decay=0.5)
        descend(head, optimizers, loss, loss, share, defaults.CLIP, Workers())
        if (step + 1) % options.save_every == 0:
            savepoint.save(step + 1)
    dtype = checkpoint.parameters["model.norm.weight"].dtype
    tensors = {name: x for name, x in checkpoint.parameters.items() if not name.startswith("mtp.")}
    tensors |= {f"mtp.{name}": x.detach().to(dtype).contiguous() for name, x in head.named_parameters()}
    write_checkpoint(out, Checkpoint(checkpoint.config, tensors), source)
    savepoint.remove()
    kept = held_out_batches(data, options.seq_len, options.batch_size, options.eval_sequences)
    return acceptance(model, head.eval(), kept, options.drafts)
