"""The commands ``kvbuffer cqil profile``, ``plan`` and ``recover``; torch is imported when one runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbuffer.cli_options import Dtype, DtypeOption, Model, Threads
from kvbuffer.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from kvbuffer.cqil.planner import Choice, Group
    from kvbuffer.cqil.profile import LayerProfile
    from kvbuffer.cqil.text import Quality, TextModel
    from kvbuffer.models.decoder import Decoder

cqil = typer.Typer(help="Choose layers of a model that are computed at once.", no_args_is_help=True)

Text = Annotated[Path, typer.Option(dir_okay=False, help="Text like that which the model will see.")]
Tokens = Annotated[int, typer.Option(min=2, help="Tokens of the text to use.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens that the model sees at a time.")]
MaxGroup = Annotated[int, typer.Option(min=2, help="Most layers in a group.")]
AllLayers = Annotated[
    bool, typer.Option("--all-layers", help="Also consider the first third of the layers and the last one.")
]


@cqil.command()
def profile(
    model: Model,
    text: Text,
    tokens: Tokens = 2048,
    window: Window = 512,
    max_group: MaxGroup = 4,
    bypass: Annotated[int, typer.Option(min=0, help="How many layers back each MLP of a group sees.")] = 1,
    dtype: DtypeOption = Dtype.AUTO,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write everything to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Draw it; needs matplotlib.")] = None,
) -> None:
    """Show how alike the inputs of MODEL's layers are, and what each possible group costs in quality."""
    from rich.console import Console

    from kvbuffer.cqil import profile as profiles
    from kvbuffer.cqil.planner import measure_candidates, sequences

    decoder, windows = _load(model, dtype, text, tokens, window, threads)
    with Console(stderr=True).status("measuring") as status:
        model_text = windows(decoder)
        layers = profiles.profile_layers(model_text)
        ordered = sequences(decoder.config, everywhere=True)
        groups = measure_candidates(model_text, ordered, max_group, bypass, _reports(status.update))
    _show_profile(model_text, layers, groups)
    if out is not None:
        out.write_text(json.dumps(profiles.as_json(layers, groups, bypass), indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        profiles.plot(plot, layers, groups)


@cqil.command()
def plan(
    model: Model,
    out: Annotated[Path, typer.Option(dir_okay=False, help="JSON file to write.")],
    text: Annotated[Path | None, typer.Option(dir_okay=False, help="As for profile; needed to choose.")] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="Most divergence from the model, KL in nats per token; default: 0.05.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(min=0.0, help="In place of --budget: by what share perplexity may rise, as in 0.02 for 2 %."),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Groups as in 4-7,8-11 or 4+6+8,7+11: not chosen but taken from here.")
    ] = None,
    tokens: Tokens = 2048,
    window: Window = 512,
    max_group: MaxGroup = 4,
    bypass: Annotated[
        int | None,
        typer.Option(min=0, help="How many layers back each MLP of a group sees; default: chosen, 1 with --groups."),
    ] = None,
    all_layers: AllLayers = False,
    batch: Annotated[int, typer.Option(min=1, help="Requests that decode together while layers are timed.")] = 1,
    ranks: Annotated[
        int, typer.Option(min=1, help="Processes the layers of a group are placed on; 1 computes them together.")
    ] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Decode steps in which layers are timed.")] = 50,
    dtype: DtypeOption = Dtype.AUTO,
    threads: Threads = None,
) -> None:
    """Write a plan for MODEL: the fastest groups, by measured costs of its layers, within a budget of quality."""
    from rich.console import Console

    from kvbuffer.cache.disk.identity import checkpoint_id
    from kvbuffer.cqil.costs import costs_on_ranks, exchange_seconds, group_costs
    from kvbuffer.cqil.plan import CqilPlan
    from kvbuffer.cqil.planner import choose, measure_candidates, sequences
    from kvbuffer.models.config import ModelConfig
    from kvbuffer.models.weights import resolve_model

    folder = resolve_model(model)
    config = ModelConfig.from_folder(folder)
    if groups is not None:
        given = CqilPlan(checkpoint_id(folder), parse_groups(groups), 1 if bypass is None else bypass)
        given.check(folder, config)
        given.save(out)
        return
    if text is None:
        raise ConfigError("--text is needed to choose groups: give a text, or the groups with --groups")
    if budget is not None and max_perplexity_increase is not None:
        raise ConfigError("--budget and --max-perplexity-increase are two ways to say the budget: give one of them")
    most_kl = 0.05 if budget is None else budget
    decoder, windows = _load(model, dtype, text, tokens, window, threads)
    with Console(stderr=True).status("timing layers") as status:
        layers = sequences(config, all_layers)
        alone = group_costs(folder, decoder, layers, max_group, batch, rounds)
        exchange = exchange_seconds(ranks, batch * config.hidden_size, rounds) if ranks > 1 else 0.0
        model_text, choices = windows(decoder), []
        distances = range(max_group) if bypass is None else (bypass,)
        within = _budget(model_text, most_kl, max_perplexity_increase)
        costs = {d: costs_on_ranks(alone, ranks, exchange, d) if ranks > 1 else alone for d in distances}
        for distance, seconds in costs.items():
            qualities = measure_candidates(model_text, layers, max_group, distance, _reports(status.update))
            choices.append(choose(model_text, layers, seconds, qualities, distance, within))
        choice = min(choices, key=lambda choice: (choice.seconds, choice.quality.kl))
        before = choose(model_text, layers, costs[choice.bypass], {}, choice.bypass, within)
    _show_choice(choice, before, costs[choice.bypass])
    measured = {
        "budget": most_kl if max_perplexity_increase is None else None,
        "max_perplexity_increase": max_perplexity_increase,
        **choice.quality._asdict(),
        "loss_without": before.quality.loss,
        "layers_ms": 1e3 * choice.seconds,
        "layers_ms_without": 1e3 * before.seconds,
        "batch": batch,
        "ranks": ranks,
    }
    CqilPlan(checkpoint_id(folder), choice.groups, choice.bypass, measured).save(out)


@cqil.command()
def recover(
    model: Model,
    data: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder made by kvbuffer train prepare.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist.")],
    plan: Annotated[Path, typer.Option(dir_okay=False, help="Plan made by kvbuffer cqil plan.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters (LoRA).")] = 32,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapters alone, not a checkpoint to which they are added.")
    ] = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of rising learning rate.")] = 20,
    decay: Annotated[float, typer.Option(help="Share of the steps in which the rate falls.")] = 0.3,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 for matrix products.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of adapters and of the order of the data.")] = 0,
    eval_sequences: Annotated[int, typer.Option(help="Held-out sequences to evaluate.")] = 64,
    threads: Threads = None,
) -> None:
    """Train MODEL on DATA to make good what a plan costs in quality; OUT gets checkpoint or adapter, and plan."""
    from kvbuffer.cqil.plan import CqilPlan
    from kvbuffer.cqil.recover import PLAN_FILE
    from kvbuffer.cqil.recover import recover as train
    from kvbuffer.models.weights import resolve_model
    from kvbuffer.train import defaults
    from kvbuffer.train.command import set_up
    from kvbuffer.train.config import TrainConfig

    set_up(threads)
    options = TrainConfig(
        data=data, out=out, model=resolve_model(model), steps=steps, batch_size=batch_size, seq_len=seq_len,
        optimizer="adamw", lr=lr, weight_decay=0.0, warmup=warmup, decay=decay, precision=precision, seed=seed,
        eval_sequences=eval_sequences, save_every=defaults.SAVEPOINT_EVERY,
    )  # fmt: skip
    before, after = train(options, CqilPlan.load(plan), rank, merge=not adapter)
    print(f"KL from the model without the plan: {before.kl:.4f} -> {after.kl:.4f} nats")
    print(f"held-out loss: {before.loss:.4f} -> {after.loss:.4f}")
    print(f"same next token: {before.agreement:.1%} -> {after.agreement:.1%}")
    print(f"right next token: {before.accuracy:.1%} -> {after.accuracy:.1%}")
    print(f"to serve it: kvbuffer serve {model if adapter else out} --cqil {out / PLAN_FILE}")


def parse_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Return the groups that ``text`` says: 4-7 is 4 to 7, 4+6+8 these layers; commas part groups.

    Raises:
        ConfigError: it says none.
    """
    groups = []
    for part in text.split(","):
        numbers = part.split("-" if "-" in part else "+")
        if not all(number.strip().isdecimal() for number in numbers) or ("-" in part and len(numbers) != 2):
            raise ConfigError(f"--groups {part!r} is not a group of layers, as in 4-7 or 4+6+8")
        values = [int(number) for number in numbers]
        groups.append(tuple(range(values[0], values[1] + 1)) if "-" in part else tuple(values))
    return tuple(groups)


def _load(
    model: str, dtype: Dtype, text: Path, tokens: int, window: int, threads: int | None
) -> tuple[Decoder, Callable[[Decoder], TextModel]]:
    """Return the model without groups, and what puts the text through it."""
    import torch

    from kvbuffer.cqil.text import TextModel, read_windows
    from kvbuffer.engine.config import DTYPES
    from kvbuffer.models.config import ModelConfig
    from kvbuffer.models.decoder import Decoder
    from kvbuffer.models.weights import resolve_model
    from kvbuffer.tokenizer import Tokenizer

    if threads is not None:
        torch.set_num_threads(threads)
    folder = resolve_model(model)
    config = ModelConfig.from_folder(folder)
    windows = read_windows(text, Tokenizer(folder), tokens, window)
    weights: torch.dtype = DTYPES.get(dtype.value) or (
        torch.float32 if config.dtype == torch.float32 else torch.bfloat16
    )
    decoder = Decoder(folder, config, weights, max(window, 256), show_progress=True)
    return decoder, lambda of: TextModel(of, windows)


def _budget(text: TextModel, kl: float, perplexity_increase: float | None) -> Callable[[Quality], bool]:
    """Return what says whether a quality is within the budget that was given."""
    if perplexity_increase is not None:
        most = text.quality(()).loss + math.log1p(perplexity_increase)
        return lambda quality: quality.loss <= most
    return lambda quality: quality.kl <= kl


def _reports(update: Callable[[str], None]) -> Callable[[str], None]:
    return lambda done: update(f"measuring quality: {done}")


def _show_profile(text: TextModel, layers: Sequence[LayerProfile], groups: Mapping[Group, Quality]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "type", "cosine of input and output", "relative norm added")
    for layer in layers:
        table.add_row(str(layer.layer), layer.kind, f"{layer.cosine:.4f}", f"{layer.delta:.3f}")
    for kind in dict.fromkeys(layer.kind for layer in layers):
        own = [layer for layer in layers if layer.kind == kind]
        means = (sum(getattr(layer, name) for layer in own) / len(own) for name in ("cosine", "delta"))
        table.add_row("mean", kind, *(f"{mean:.4f}" for mean in means), style="bold")
    console = Console()
    console.print(table)
    table = Table("group", "KL (nats)", "loss", "same next token")
    for group, quality in groups.items():
        table.add_row(_name(group), f"{quality.kl:.4f}", f"{quality.loss:.4f}", f"{quality.agreement:.1%}")
    console.print(table)
    console.print(f"loss without groups: {text.quality(()).loss:.4f}")


def _show_choice(choice: Choice, before: Choice, costs: Sequence[Mapping[int, float]]) -> None:
    for kind, seconds in zip(("linear-attention", "full-attention"), costs, strict=True):
        if seconds:
            sizes = ", ".join(f"{size}: {1e3 * value:.3f}" for size, value in sorted(seconds.items()))
            print(f"milliseconds of {kind} layers by size of the group: {sizes}")
    print(f"groups: {', '.join(map(_name, choice.groups)) or 'none, as none within the budget is faster'}")
    print(f"bypass: {choice.bypass}")
    print(f"layers in a decode step: {1e3 * before.seconds:.3f} ms alone, {1e3 * choice.seconds:.3f} ms in groups")
    print(f"loss {before.quality.loss:.4f} -> {choice.quality.loss:.4f}, KL {choice.quality.kl:.4f} nats")


def _name(group: Group) -> str:
    return "+".join(map(str, group))
