"""CQIL beside what else makes a model shallower: latency of a decode step, and quality over a text it has not seen.

    python benchmarks/cqil.py quality --model demo --first 1 [--recovered FOLDER ...] \
        --out benchmarks/results/cqil-demo.json
    python benchmarks/cqil.py latency --model demo --first 1 --out benchmarks/results/cqil-demo.json
    python benchmarks/cqil.py ranks --model deep --out benchmarks/results/cqil-deep.json

Variants: the model as it is; groups of 2, 3 and 4 neighbours of one type with bypasses; layer pairs as in LP
(arXiv 2502.02790: both MLPs see both mixers); the model without all but the first layer of each group, which takes as
much time as groups would if their other layers cost nothing. ``latency`` computes groups fused on one device; ``ranks``
runs two processes of one thread each: layers split (tensor parallelism), and groups placed; in turns with the whole
model in one process, of one thread and of two; and pairs without exchanging anything, on both ranks and on one of them.
Parts are added to the file.

Quality is loss, divergence and agreement, and as a task the share of tokens of a text it has not seen that the model
predicts. ``--recovered`` adds checkpoints that ``kvbuffer cqil recover`` made of the model.

Models: a checkpoint, or ``deep``: a Qwen3.5 hybrid of 24 layers and 250 million random weights, for latency only.
The text is the held-out part of what the model was trained on (``--data``), of which what it learned counts; or
``--text``, or the docstrings of NumPy.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kvbuffer.bench import machine
from kvbuffer.cache.shapes import run_order
from kvbuffer.cache.store import allocate
from kvbuffer.cqil.costs import Steps, take_turns
from kvbuffer.cqil.plan import CqilPlan
from kvbuffer.cqil.planner import sequences
from kvbuffer.cqil.recover import PLAN_FILE
from kvbuffer.cqil.text import TextModel, batch_of, memory_for
from kvbuffer.engine.ranks import ProcessRanks, start_ranks
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.parallel import ParallelDecoder
from kvbuffer.models.weights import resolve_model
from kvbuffer.tokenizer import Tokenizer
from kvbuffer.train.data import read_info

Groups = tuple[tuple[int, ...], ...]
SIZES = (2, 3, 4)
_DEEP = {
    "vocab_size": 32768, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 24,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "linear_num_key_heads": 6,
    "linear_num_value_heads": 12, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def deep_model() -> Path:
    """The checkpoint ``deep``, made at first use."""
    folder = Path(tempfile.gettempdir()) / "kvbuffer-cqil-deep"
    if not (folder / "model.safetensors").exists():
        import transformers

        torch.manual_seed(0)
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**_DEEP))
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def groups_of(config: ModelConfig, size: int, first: int | None) -> Groups:
    """Neighbours of each type in groups of ``size``, from layer ``first`` (after a third) to the last but one."""
    layers = sequences(config)
    if first is not None:
        layers = [[i for i in sequence if first <= i < config.num_layers - 1] for sequence in sequences(config, True)]
    return tuple(tuple(sequence[i : i + size]) for sequence in layers for i in range(0, len(sequence) - size + 1, size))


def variants(config: ModelConfig, first: int | None) -> list[dict[str, Any]]:
    """What is measured: a name, groups, the bypass or "all" for LP."""
    found = []
    for size in SIZES:
        if groups := groups_of(config, size, first):
            bypasses = sorted({0, 1, size - 1})
            found += [{"name": f"groups of {size}, bypass {d}", "groups": groups, "bypass": d} for d in bypasses]
    pairs = groups_of(config, 2, first)
    return [*found, {"name": "pairs as in LP", "groups": pairs, "bypass": "all"}]


def load(folder: Path, variant: dict[str, Any] | None = None, max_len: int = 1024) -> Decoder:
    """The model in its own dtype, with a variant's groups."""
    config = ModelConfig.from_folder(folder)
    groups, bypass = (variant["groups"], variant["bypass"]) if variant else ((), 0)
    model = Decoder(folder, config, config.dtype, max_len, False, groups, 0 if bypass == "all" else bypass)
    for layer in model.layers if bypass == "all" else ():
        if hasattr(layer, "sees"):
            layer.sees.fill_(1.0)
    return model


def numpy_docstrings() -> tuple[str, str]:
    """A text that is the same wherever the same version of NumPy is, and what to call it."""
    objects = (getattr(np, name) for name in sorted(dir(np)) if not name.startswith("_"))
    docstrings = (inspect.getdoc(one) for one in objects if callable(one))
    return "\n\n".join(filter(None, docstrings)), f"docstrings of NumPy {np.__version__}"


def quality(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Loss, divergence and agreement of every variant."""
    if args.data:
        ids, learned = (np.load(args.data / f"held_out{kind}.npy").astype(int) for kind in ("", ".learned"))
        text = "held-out part of the data"
    else:
        chosen, text = (args.text.read_text(), args.text.name) if args.text else numpy_docstrings()
        ids = np.array(Tokenizer(folder).encode(chosen))
        learned = np.ones_like(ids)
    count = min(args.tokens, len(ids)) // args.window
    skip = (len(ids) - count * args.window) // 2
    windows, counts = (
        torch.from_numpy(of[skip : skip + count * args.window]).view(count, args.window) for of in (ids, learned)
    )
    model = load(folder, max_len=args.window)
    own, rows = TextModel(model, windows), []
    own.targets[F.pad(counts[:, 1:], (0, 1)).flatten() == 0] = -1
    rows.append({"name": "as it is", **own.quality(())._asdict()})
    if args.data:
        rows.append({"name": "unigrams", "loss": unigram_loss(args.data, own.targets[own.targets >= 0])})

    def hidden(of: Decoder, groups: Groups, kept: list[int] | None = None) -> torch.Tensor:
        plan = memory_for(of, *windows.shape)
        caches = allocate(replace(of.config.cache_shape, groups=groups), plan)
        if kept is not None:
            caches = [caches[i] for i in kept]
        return of.forward_with_hidden(batch_of(windows, 0, plan), caches)[1]

    for variant in variants(model.config, args.first):
        of = load(folder, variant, args.window)
        rows.append({**variant, **own.compare(hidden(of, variant["groups"]))._asdict()})
    for size in SIZES:
        if groups := groups_of(model.config, size, args.first):
            kept = [i for i in range(model.config.num_layers) if not any(i in group[1:] for group in groups)]
            shallow = load(folder, max_len=args.window)
            shallow.layers = [shallow.layers[i] for i in kept]
            rows.append(
                {"name": f"only the first of each {size}", "groups": groups,
                 **own.compare(hidden(shallow, (), kept))._asdict()}
            )  # fmt: skip
    for recovered in args.recovered:
        plan = CqilPlan.load(recovered / PLAN_FILE)
        name = f"groups of {max(map(len, plan.groups))}, bypass {plan.bypass}, recovered"
        variant = {"name": name, "groups": plan.groups, "bypass": plan.bypass}
        of = load(recovered, variant, args.window)
        rows.append({**variant, **own.compare(hidden(of, plan.groups))._asdict()})
    counted = int((own.targets >= 0).sum())
    return {"tokens": windows.numel(), "predicted": counted, "window": args.window, "text": text, "rows": rows}


def unigram_loss(data: Path, targets: torch.Tensor) -> float:
    """The loss of who knows how often each token comes in the training data, and no more."""
    tokens, learned = (np.load(data / f"train{kind}.npy") for kind in ("", ".learned"))
    counts = torch.from_numpy(tokens[learned].astype(int)).bincount(minlength=read_info(data).vocab_size)
    return -float((counts + 1.0).div_(counts.sum() + len(counts)).log_()[targets].mean())


def latency(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a decode step, fused on this device."""
    config, rows = ModelConfig.from_folder(folder), []
    chosen = [one for one in variants(config, args.first) if one["bypass"] in (1, "all")]
    models = [(load(folder), ()), *((load(folder, variant), variant["groups"]) for variant in chosen)]
    for batch in args.batch:
        times = take_turns([Steps(model, groups, batch) for model, groups in models], args.rounds)
        alone = times[0]
        names = ["as it is", *(variant["name"].split(",")[0] for variant in chosen)]
        for name, (_, groups), seconds in zip(names, models, times, strict=True):
            rows.append(timed(name, batch, config, groups, sum(seconds)))
        for variant in (one for one in chosen if one["bypass"] == 1):
            kept = sum(alone) - sum(alone[i] for group in variant["groups"] for i in group[1:])
            size = len(variant["groups"][0])
            rows.append({"name": f"only the first of each {size}", "batch": batch, "ms": 1e3 * kept})
    return {"threads": torch.get_num_threads(), "rows": rows}


def timed(
    name: str, batch: int, config: ModelConfig, groups: Groups, seconds: float, layers: float | None = None
) -> dict[str, Any]:
    """A row of a table; ``depth`` counts layers and groups that run one after the other, ``layers_ms`` times them."""
    depth = len(run_order(config.num_layers, groups))
    row = {"name": name, "batch": batch, "groups": groups, "depth": depth, "ms": 1e3 * seconds}
    return row if layers is None else {**row, "layers_ms": 1e3 * layers}


class Silent:
    """A rank that exchanges nothing, to see what computing its part takes by itself; results are wrong."""

    def __init__(self, ranks: ProcessRanks) -> None:
        self.rank, self.size = ranks.rank, ranks.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(self.size, *x.shape)

    def send(self, message: object) -> None:
        pass


class Lockstep(ParallelDecoder):
    """Ranks that all run the same program need not be told what to compute."""

    forward = Decoder.forward  # type: ignore[assignment]


def ranks_part(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Two ranks of one thread, in turns with a process of one thread and of two, on the same two cores."""
    context = torch.multiprocessing.get_context("spawn")
    turns, answers = context.Barrier(3, timeout=300), context.SimpleQueue()
    alone = context.Process(target=_alone, args=(folder, args, turns, answers), daemon=True)
    alone.start()
    start_ranks(2, _rank, folder, args, turns, answers)
    alone.join()
    return {"rows": [row for _, rows in sorted(answers.get() for _ in range(2)) for row in rows]}


def _alone(folder: Path, args: argparse.Namespace, turns: Any, answers: Any) -> None:
    models = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        models[threads] = load(folder)
    rows = []
    for batch in args.batch:
        steps = {threads: Steps(model, (), batch) for threads, model in models.items()}

        def seconds(steps: dict[int, Steps] = steps) -> list[list[float]]:
            found = []
            for threads, model in steps.items():
                torch.set_num_threads(threads)
                found.append(take_turns([model], 1)[0])
            time.sleep(0.02)  # OpenMP's idle thread spins for a while, on what is now a rank's core
            return found

        medians = _in_turns(seconds, turns, args.rounds, first=True)
        for threads, value in zip(steps, medians, strict=True):
            name = f"one process, {threads} {'thread' if threads == 1 else 'threads'}"
            rows.append(timed(name, batch, ModelConfig.from_folder(folder), (), *value))
    answers.put((0, rows))


def _rank(ranks: ProcessRanks, folder: Path, args: argparse.Namespace, turns: Any, answers: Any) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[ranks.rank]})
    config = ModelConfig.from_folder(folder)
    pairs = groups_of(config, 2, args.first)
    options: list[tuple[str, Groups, int, Any]] = [("layers split", (), 0, ranks)]
    for n in SIZES:
        if groups := groups_of(config, n, args.first):
            options += [(f"groups of {n}, bypass {d}", groups, d, ranks) for d in (0, 1)]
    options.append(("groups of 2, nothing exchanged", pairs, 0, Silent(ranks)))
    models = [
        (Lockstep(folder, config, config.dtype, 1024, False, groups, bypass, None, among), groups)
        for _, groups, bypass, among in options
    ]
    rows = []
    for batch in args.batch:
        steps = [Steps(model, groups, batch) for model, groups in models]

        def seconds(steps: list[Steps] = steps) -> list[list[float]]:
            found = take_turns(steps, 1)
            for turn in range(ranks.size):  # the last model again, on one rank at a time
                ranks.all_reduce(torch.zeros(1))
                if turn == ranks.rank:
                    alone = take_turns(steps[-1:], 1)
            ranks.all_reduce(torch.zeros(1))
            return [*found, *alone]

        medians = _in_turns(seconds, turns, args.rounds, first=False)
        names = [*options, ("groups of 2, nothing exchanged, one rank at a time", pairs, 0, None)]
        for (name, groups, *_), value in zip(names, medians, strict=True):
            rows.append(timed(name, batch, config, groups, *value))
    if ranks.rank == 0:
        answers.put((1, rows))


def _in_turns(
    seconds: Callable[[], list[list[float]]], turns: Any, rounds: int, first: bool
) -> list[tuple[float, float]]:
    """Call ``seconds`` in turns with other processes; return medians of each model's step, and of its layers."""
    found = []
    for _ in range(rounds):
        turns.wait()
        if first:
            found.append(seconds())
        turns.wait()
        if not first:
            found.append(seconds())
    return [(median(map(sum, of)), median(sum(one[:-1]) for one in of)) for of in zip(*found, strict=True)]


PARTS = {"quality": quality, "latency": latency, "ranks": ranks_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", default="demo", help="demo, deep, or a checkpoint")
    parser.add_argument("--first", type=int, help="first layer that is grouped; default: after a third")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--data", type=Path, help="made by kvbuffer train prepare: take its held-out part")
    parser.add_argument("--recovered", type=Path, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = deep_model() if args.model == "deep" else resolve_model(args.model)
    with machine.ForeignLoad() as others:
        found = PARTS[args.part](folder, args)
    found.update(
        date=datetime.now(UTC).isoformat(timespec="seconds"), commit=machine.commit(), rounds=args.rounds,
    )  # fmt: skip
    if args.part != "ranks":  # the ranks are other processes
        found["foreign_load"] = round(others.fraction, 3)
    for row in found["rows"]:
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{v}" for k, v in row.items() if k != "groups"))
    if args.out:
        result = json.loads(args.out.read_text()) if args.out.exists() else {"model": Path(args.model).name}
        result.setdefault("machine", {"cores": len(os.sched_getaffinity(0)), **machine.versions("torch")})
        result[args.part] = found
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
