"""The training loop."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbuffer.train.checkpoints import read_config
from kvbuffer.train.config import TrainConfig
from kvbuffer.train.data import Batches, held_out_batches, read_info
from kvbuffer.train.examples import ExampleBatches, held_out_examples
from kvbuffer.train.flops import step_flops
from kvbuffer.train.model import build, complete_config, load, loss_of, parameters_of, set_parameters
from kvbuffer.train.operators import LevelMap, Parameters, interpolate
from kvbuffer.train.optim import Optimizers, descend, learning_rate
from kvbuffer.train.plan import Stage, make_plan
from kvbuffer.train.progress import Progress
from kvbuffer.train.records import Position, RunFolder, read_training_state
from kvbuffer.train.workers import Workers, workers


def run(options: TrainConfig, show_progress: bool = True) -> None:
    """Train ``options.model`` by ``options.method`` into the folder ``options.out``, or go on with what is there.

    A run that was killed goes on at its last checkpoint, and ends with the same log and the same model as if it had not
    been.

    Raises:
        ConfigError: options, data and model do not fit together, or the folder holds another run.
        ModelError: the model's config cannot be trained.
        KVBufferError: the loss is not finite.
    """
    with workers(options.batch_size) as processes:
        folder = RunFolder(options.out)
        plan = folder.plan(options)
        if plan is None:
            plan = _new_plan(options)
            processes.wait()  # nobody looks for a run here any more
            if processes.is_first:
                folder.start(options, plan)
            processes.wait()
        Run(options, plan, folder, processes, show_progress).go()


def _new_plan(options: TrainConfig) -> list[Stage]:
    config = complete_config(read_config(options.model), read_info(options.data), options.seq_len)
    counts: dict[str, int] = {}

    def count(small: dict[str, Any]) -> int:
        key = json.dumps(small)
        if key not in counts:
            counts[key] = step_flops(small, options.batch_size, options.seq_len, options.optimizer)
        return counts[key]

    return make_plan(options, config, count)


def _grown(small: Any, fresh: Any, stage: Stage) -> Parameters:
    """Return the parameters of a model in the shape of ``fresh``.

    Those that grow in width are mixed with fresh ones, which parts the copies; in depth copies part by themselves.
    """
    levels = LevelMap(stage.config, small.config.to_dict(), stage.start.pairing)
    grown = levels.decoalesce(parameters_of(small))
    wider = {name: x for name, x in grown.items() if levels.widens(name)}
    new = {name: x for name, x in parameters_of(fresh).items() if name in wider}
    return {**grown, **interpolate(new, wider, stage.start.alpha)}


class Run:
    """One run: the model in training, its optimizers and how far it has come."""

    def __init__(
        self, options: TrainConfig, plan: list[Stage], folder: RunFolder, processes: Workers, show_progress: bool
    ) -> None:
        self._options, self._plan, self._folder, self._workers = options, plan, folder, processes
        info = read_info(options.data)
        self._bits_per_byte = info.held_out_tokens / (info.held_out_bytes * math.log(2))
        shape = options.seq_len, options.batch_size
        self._batches: Batches | ExampleBatches
        if info.packed:
            self._batches = Batches(options.data, *shape, options.seed)
            self._held_out = held_out_batches(options.data, *shape, options.eval_sequences)
        else:
            self._batches = ExampleBatches(options.data, *shape, options.seed)
            self._held_out = held_out_examples(options.data, *shape, options.eval_sequences)
        total = sum(stage.steps for stage in plan)
        self._progress = Progress(total, options, show_progress and processes.is_first)
        self._position = Position()
        self._model: Any = None
        self._optimizers: Optimizers

    def go(self) -> None:
        """Train to the end."""
        latest = self._folder.latest()
        if latest is None:
            self._enter(0)
        else:
            self._resume(latest)
        if self._workers.is_first:
            self._folder.truncate_log(self._position.total)
        with self._progress:
            while True:
                self._train_stage()
                if self._position.stage + 1 == len(self._plan):
                    break
                self._enter(self._position.stage + 1)
        if self._workers.is_first:
            last = self._folder.checkpoint(self._position.stage, self._position.step)
            self._folder.finish(last, self._options.precision)
        self._workers.wait()

    def _use(self, model: Any) -> None:
        options = self._options
        self._model = model
        self._optimizers = Optimizers(model, options.optimizer, options.lr, options.weight_decay)

    def _resume(self, checkpoint: Any) -> None:
        self._position, optimizers, rng = read_training_state(checkpoint)
        self._use(load(checkpoint))
        self._optimizers.load(optimizers)
        torch.set_rng_state(rng)

    def _enter(self, index: int) -> None:
        """Make the model that a stage starts with from the checkpoints of earlier ones."""
        stage, start = self._plan[index], self._plan[index].start
        model = build(stage.config, self._options.seed + index)
        if start.checkpoint is not None:
            set_parameters(model, _grown(load(Path(start.checkpoint)), model, stage))
        elif start.coalesce is not None:
            levels = LevelMap(self._plan[start.coalesce].config, stage.config, start.pairing)
            set_parameters(model, levels.coalesce(parameters_of(self._finished(start.coalesce))))
        elif start.grow is not None:
            levels = LevelMap(stage.config, self._plan[start.grow].config, start.pairing)
            grown = levels.decoalesce(parameters_of(self._finished(start.grow)))
            large = model if start.large is None else self._finished(start.large)
            set_parameters(model, interpolate(parameters_of(large), grown, start.alpha))
        self._use(model)
        if stage.moments is not None:
            moments = self._folder.checkpoint(stage.moments, self._plan[stage.moments].steps)
            self._optimizers.load(read_training_state(moments)[1])
        self._position = replace(self._position, stage=index, step=0)

    def _finished(self, index: int) -> Any:
        return load(self._folder.checkpoint(index, self._plan[index].steps))

    def _train_stage(self) -> None:
        stage = self._plan[self._position.stage]
        while self._position.step < stage.steps:
            record = self._step(stage)
            done = self._position.step
            if done == stage.steps or self._position.total % self._options.eval_every == 0:
                record |= self._evaluate()
            if self._workers.is_first:
                self._folder.log(record)
            self._progress.update(stage.name, record)
            if done == stage.steps or done % self._options.save_every == 0:
                self._save()
        if stage.steps == 0:
            self._save()

    def _save(self) -> None:
        if self._workers.is_first:
            self._folder.save(self._model, self._optimizers, self._position, self._plan, self._options.data)
        self._workers.wait()

    def _step(self, stage: Stage) -> dict[str, Any]:
        position, options = self._position, self._options
        begin, cpu_begin = time.perf_counter(), time.process_time()
        batch = self._batches.batch(position.total, self._workers.rank, self._workers.size)
        share = learning_rate(position.step, stage.steps, stage.warmup, stage.decay)
        with self._autocast():
            losses = loss_of(self._model, batch)
        loss, norm = descend(
            self._model, self._optimizers, losses.total, losses.cross_entropy, share, options.clip, self._workers
        )
        self._position = Position(
            stage=position.stage,
            step=position.step + 1,
            total=position.total + 1,
            flops=position.flops + stage.step_flops,
            seconds=position.seconds + time.perf_counter() - begin,
            cpu_seconds=position.cpu_seconds + time.process_time() - cpu_begin,
        )
        return {**asdict(self._position), "loss": loss, "lr": share * options.lr, "grad_norm": norm}

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self._options.precision == "bfloat16")

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Return the mean loss on held-out text, in nats per token and bits per byte."""
        self._model.eval()
        with self._autocast():
            losses: list[Tensor] = [
                loss_of(self._model, batch).cross_entropy * batch.learned for batch in self._held_out
            ]
        self._model.train()
        loss = float(torch.stack(losses).sum()) / sum(batch.learned for batch in self._held_out)
        return {"held_out": loss, "bits_per_byte": loss * self._bits_per_byte}
