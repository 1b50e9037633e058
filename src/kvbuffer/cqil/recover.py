"""Recovery of what a plan costs in quality, by self-distillation.

A plan makes a model compute something else than it was trained for. Adapters on all its projections (LoRA) learn to
make the grouped model's next-token distributions those of the same weights without groups, over a text: the loss is
their divergence (Zou et al., ACL 2024). At the end they are written beside the plan, to be added to the weights by who
serves it, or are added to make a new checkpoint; either is for this plan alone.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.cache.disk.identity import checkpoint_id
from kvbuffer.cqil.plan import CqilPlan
from kvbuffer.cqil.student import Student
from kvbuffer.cqil.text import Quality, Tally
from kvbuffer.errors import ConfigError
from kvbuffer.models.adapter import Adapter
from kvbuffer.models.config import ModelConfig
from kvbuffer.tokenizer import Tokenizer
from kvbuffer.train.checkpoints import Checkpoint, new_folder, read_checkpoint, write_checkpoint
from kvbuffer.train.config import PRESENTATION, TrainConfig
from kvbuffer.train.data import IGNORED, Batch, Batches, held_out_batches, read_info
from kvbuffer.train.model import load
from kvbuffer.train.optim import Optimizers, descend, learning_rate
from kvbuffer.train.progress import Progress
from kvbuffer.train.savepoint import Savepoint
from kvbuffer.train.workers import workers

#: The plan's file in the folder that recovery writes.
PLAN_FILE = "cqil.json"


class Recovered(NamedTuple):
    """Quality of the plan on held-out text, before and after; divergence is from the model as it was."""

    before: Quality
    after: Quality


def recover(
    options: TrainConfig, plan: CqilPlan, rank: int, merge: bool = True, show_progress: bool = True
) -> Recovered:
    """Train the checkpoint ``options.model`` to compute its layers as ``plan`` groups them.

    Writes the new checkpoint or the adapters to ``options.out``, and the plan into that folder, as :data:`PLAN_FILE`.
    One that was cut off goes on at its last savepoint, and ends with the same result as if it had not been.

    Args:
        options: as for training; stages and methods do not apply.
        plan: with at least one group.
        rank: of the adapters.
        merge: add the adapters to the weights and write a new checkpoint; otherwise write the adapters alone.
        show_progress: draw a progress bar.

    Raises:
        ConfigError: plan, data and model do not fit together, there is nothing to recover, ``options.out`` exists, or
            the savepoint is of other options.
        ModelError: the model is of an architecture that cannot be trained.
        KVBufferError: the loss is not finite.
    """
    _check(options, plan)
    with workers(options.batch_size) as processes:
        torch.manual_seed(options.seed)
        student = Student(load(options.model), plan.groups, plan.bypass, rank)
        optimizers = Optimizers(student.adapters, options.optimizer, options.lr, options.weight_decay)
        batches = Batches(options.data, options.seq_len, options.batch_size, options.seed)
        held_out = held_out_batches(options.data, options.seq_len, options.batch_size, options.eval_sequences)
        before, begin = quality(student, held_out), time.perf_counter()
        inputs = {name: value for name, value in options.as_json().items() if name not in PRESENTATION}
        named = {**inputs, "plan": plan.identity, "rank": rank}
        savepoint = Savepoint(options.out, named, student.adapters, optimizers)
        done = savepoint.resume()
        with Progress(options.steps, options, show_progress and processes.is_first) as progress:
            for step in range(done, options.steps):
                token_ids = batches.batch(step, processes.rank, processes.size).tokens
                with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
                    loss = divergence(student.teacher_logits(token_ids), student.logits(token_ids))
                share = learning_rate(step, options.steps, options.warmup, options.decay)
                kl, _ = descend(student.adapters, optimizers, loss, loss, share, options.clip, processes)
                seconds = time.perf_counter() - begin
                progress.update("recovering", {"total": step + 1, "loss": kl, "seconds": seconds})
                if (step + 1) % options.save_every == 0 and processes.is_first:
                    savepoint.save(step + 1)
        found = Recovered(before, quality(student, held_out))
        if processes.is_first:
            measured = {name: value._asdict() for name, value in found._asdict().items()}
            write = _write_checkpoint if merge else _write_adapter
            write(options, replace(plan, measured=measured), student.learned())
            savepoint.remove()
        processes.wait()
    return found


def divergence(own: Tensor, other: Tensor) -> Tensor:
    """Return the mean divergence KL(own || other) of distributions given by logits [..., vocab_size], in nats."""
    own, other = (logits.flatten(0, -2).log_softmax(-1) for logits in (own, other))
    return F.kl_div(other, own, reduction="batchmean", log_target=True)


@torch.no_grad()
def quality(student: Student, held_out: list[Batch]) -> Quality:
    """Return the student's quality over what batches want predicted."""
    tally = Tally()
    for batch in held_out:
        places = batch.targets != IGNORED
        own, other = student.teacher_logits(batch.tokens), student.logits(batch.tokens)
        tally.add(own[places], other[places], batch.targets[places])
    return tally.quality()


def _check(options: TrainConfig, plan: CqilPlan) -> None:
    plan.check(options.model, ModelConfig.from_folder(options.model))
    if not plan.identity:
        raise ConfigError("the CQIL plan groups no layers, so there is nothing to recover")
    if options.out.exists():
        raise ConfigError(f"{options.out} exists already; remove it or give another folder")
    read_info(options.data)
    if not Tokenizer(options.model).has_same_tokens(Tokenizer(options.data)):
        raise ConfigError(
            f"{options.data} was prepared with another tokenizer than the model's: prepare it with "
            f"'kvbuffer train prepare TEXTS DATA --tokenizer {options.model}'"
        )


def _write_checkpoint(options: TrainConfig, plan: CqilPlan, adapter: Adapter) -> None:
    source = read_checkpoint(options.model)
    adapter.check(lambda name: tuple(source.parameters[name].shape) if name in source.parameters else ())
    parameters = {name: adapter.add_to(name, tensor) for name, tensor in source.parameters.items()}
    write_checkpoint(options.out, Checkpoint(source.config, parameters), options.model)
    replace(plan, model=checkpoint_id(options.out), adapter=None).save(options.out / PLAN_FILE)


def _write_adapter(options: TrainConfig, plan: CqilPlan, adapter: Adapter) -> None:
    with new_folder(options.out) as folder:
        adapter.save(folder, str(options.model))
        replace(plan, adapter=adapter).save(folder / PLAN_FILE)
