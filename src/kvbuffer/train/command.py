"""The command ``kvbuffer train``; torch and transformers are imported when a sub-command runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbuffer.cli_options import Threads, use_config_file
from kvbuffer.errors import ConfigError
from kvbuffer.train import defaults

train = typer.Typer(help="Train models, and grow and shrink their checkpoints.", no_args_is_help=True)


class PairingOption(StrEnum):
    """Which layers are merged."""

    ADJACENT = "adjacent"
    STACKED = "stacked"


CheckpointIn = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Checkpoint folder.")]
CheckpointOut = Annotated[Path, typer.Argument(help="Folder to write; must not exist.")]
Pairing = Annotated[
    PairingOption,
    typer.Option(help="Merge neighbouring blocks of layers, or layer i with i + L/2."),
]


@train.command()
def prepare(
    texts: Annotated[Path, typer.Argument(exists=True, help="Folder of text files or JSONL, or one file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder with a tokenizer; default: one is trained."),
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=260, help="Of the tokenizer that is trained.")] = defaults.VOCAB_SIZE,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the documents kept for evaluation.")
    ] = defaults.HELD_OUT,
    patterns: Annotated[str, typer.Option(help="Names of files to take, with commas between them.")] = ",".join(
        defaults.PATTERNS
    ),
) -> None:
    """Turn TEXTS into tokens to train on, with a tokenizer of their own."""
    from kvbuffer.train.data import prepare as write

    info = write(
        texts, out, vocab_size=vocab_size, tokenizer=tokenizer, held_out=held_out, patterns=tuple(patterns.split(","))
    )
    print(
        f"{info.train_tokens:,} tokens to train on, {info.held_out_tokens:,} held out "
        f"({info.held_out_bytes / info.held_out_tokens:.2f} bytes each), vocabulary of {info.vocab_size:,}; in {out}"
    )


@train.command()
def run(
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder made by prepare.")],
    out: Annotated[Path, typer.Argument(help="Folder of the run; one that was cut off goes on.")],
    model: Annotated[Path, typer.Option(exists=True, help="config.json of the model to train, or its folder.")],
    init: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Checkpoint to begin with, of this size or smaller."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(defaults.METHODS)}.")] = defaults.METHOD,
    steps: Annotated[int, typer.Option(help="Steps from scratch; other methods get their FLOPs.")] = defaults.STEPS,
    budget: Annotated[float, typer.Option(help="FLOPs to spend, as a share of those of STEPS steps.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = defaults.BATCH_SIZE,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = defaults.SEQ_LEN,
    optimizer: Annotated[str, typer.Option(help="muon (AdamW for all but matrices) or adamw.")] = defaults.OPTIMIZER,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = defaults.LR,
    weight_decay: Annotated[float, typer.Option(help="Of matrices and embeddings.")] = defaults.WEIGHT_DECAY,
    warmup: Annotated[int, typer.Option(help="Steps of rising learning rate for new weights.")] = defaults.WARMUP,
    rewarm: Annotated[
        int, typer.Option(help="The same for weights that were shrunk, grown or mixed.")
    ] = defaults.REWARM,
    decay: Annotated[float, typer.Option(help="Share of the last stage in which the rate falls.")] = defaults.DECAY,
    small_decay: Annotated[float, typer.Option(help="The same for stages of small models.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = defaults.CLIP,
    precision: Annotated[
        str, typer.Option(help="float32, or bfloat16 for matrix products and the finished model.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of weights and of the order of the data.")] = 0,
    alpha: Annotated[float, typer.Option(help="Share of the grown model in interpolation.")] = defaults.ALPHA,
    first_share: Annotated[
        float, typer.Option(help="First stage of the large model, as a share of STEPS.")
    ] = defaults.FIRST_SHARE,
    small_share: Annotated[
        float, typer.Option(help="Stage of a small model, as a share of STEPS.")
    ] = defaults.SMALL_SHARE,
    optimizer_state: Annotated[
        str, typer.Option(help="reset, or keep: the large model takes up its earlier moments.")
    ] = "reset",
    pairing: Pairing = PairingOption.ADJACENT,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = defaults.SAVE_EVERY,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = defaults.EVAL_EVERY,
    eval_sequences: Annotated[int, typer.Option(help="Held-out sequences to evaluate.")] = defaults.EVAL_SEQUENCES,
    tensorboard: Annotated[bool, typer.Option(help="Also log for TensorBoard.")] = False,
    threads: Threads = None,
    config: Annotated[
        Path | None,
        typer.Option(is_eager=True, callback=use_config_file, help="YAML file of these options; flags win."),
    ] = None,
) -> None:
    """Train a model on DATA; the finished one is in OUT/model, ready to be served."""
    given = {name: value for name, value in locals().items() if name not in ("threads", "config")}
    _run([{**given, "pairing": pairing.value}], threads)


@train.command()
def compare(
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder made by prepare.")],
    out: Annotated[Path, typer.Argument(help="Folder of the runs; those that were cut off go on.")],
    config: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="YAML file with the options of run.")],
    methods: Annotated[str, typer.Option(help="Methods, with commas between them.")] = ",".join(defaults.METHODS),
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "0",
    threads: Threads = None,
) -> None:
    """Train a model by several methods, and report what each takes to be as good as from scratch."""
    from kvbuffer.train.config import read_options

    options = read_options(config)
    if not all(seed.isdecimal() for seed in seeds.split(",")):
        raise typer.BadParameter(f"{seeds!r} is not numbers with commas between them.", param_hint="--seeds")
    _run(
        [
            {**options, "data": data, "out": out / f"{method}-{seed}", "method": method, "seed": int(seed)}
            for seed in seeds.split(",")
            for method in methods.split(",")
        ],
        threads,
    )
    report(out)


@train.command()
def report(
    runs: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a run, or of several.")],
) -> None:
    """Print what runs have reached and at what cost, and plot their losses (report.json, report.png)."""
    from kvbuffer.train.report import write_report

    write_report(runs)


@train.command()
def mtp(
    source: CheckpointIn,
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder made by prepare.")],
    out: CheckpointOut,
    steps: Annotated[int, typer.Option(help="Training steps.")] = defaults.MTP_STEPS,
    drafts: Annotated[int, typer.Option(help="Tokens drafted one after the other.")] = defaults.MTP_DRAFTS,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = defaults.BATCH_SIZE,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = defaults.SEQ_LEN,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = defaults.LR,
    seed: Annotated[int, typer.Option(help="Of weights and of the order of the data.")] = 0,
    threads: Threads = None,
) -> None:
    """Give a checkpoint a multi-token-prediction head, with which it drafts its own next tokens."""
    from kvbuffer.train.mtp import MtpOptions, train_mtp

    set_up(threads)
    options = MtpOptions(steps, batch_size, seq_len, lr, drafts, seed)
    shares = ", ".join(f"{share:.1%}" for share in train_mtp(source, data, out, options))
    print(f"of greedy choices on held-out text, the first 1 to {drafts} drafts are right in {shares}; in {out}")


def set_up(threads: int | None) -> None:
    """Train with so many threads (None: PyTorch's choice), and without what transformers says while it loads."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def _run(runs: list[dict[str, Any]], threads: int | None) -> None:
    from kvbuffer.train.config import TrainConfig
    from kvbuffer.train.run import run as go

    set_up(threads)
    try:
        configs = [TrainConfig(**{**options, "model": Path(options["model"])}) for options in runs]
    except KeyError:
        raise ConfigError("the options name no model; give the config.json of one") from None
    for options in configs:
        go(options)


@train.command()
def coalesce(
    source: CheckpointIn,
    out: CheckpointOut,
    width: Annotated[int, typer.Option(min=1, help="Factor by which widths shrink; heads are merged whole.")] = 2,
    depth: Annotated[int, typer.Option(min=1, help="Factor by which layers shrink, in whole blocks.")] = 2,
    pairing: Pairing = PairingOption.ADJACENT,
) -> None:
    """Shrink a checkpoint: average its units and layers."""
    from kvbuffer.train.checkpoints import coalesce_files

    coalesce_files(source, out, width, depth, pairing.value)


@train.command()
def decoalesce(
    source: CheckpointIn,
    out: CheckpointOut,
    like: Annotated[Path, typer.Option(exists=True, help="Checkpoint, or config.json, whose shape OUT gets.")],
    pairing: Pairing = PairingOption.ADJACENT,
) -> None:
    """Grow a checkpoint; in width it goes on computing the same function."""
    from kvbuffer.train.checkpoints import decoalesce_files

    decoalesce_files(source, like, out, pairing.value)


@train.command()
def interpolate(
    large: CheckpointIn,
    grown: CheckpointIn,
    out: CheckpointOut,
    alpha: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the second checkpoint.")] = 0.25,
) -> None:
    """Mix two checkpoints of one shape: (1 - ALPHA) * LARGE + ALPHA * GROWN."""
    from kvbuffer.train.checkpoints import interpolate_files

    interpolate_files(large, grown, out, alpha)
