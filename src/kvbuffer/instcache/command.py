"""The command ``kvbuffer instcache``; torch is imported by what needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbuffer.cli_options import CqilFile, Dtype, DtypeOption, MaxNumSeqs, Memory, Model, Threads
from kvbuffer.engine import defaults

if TYPE_CHECKING:
    from collections.abc import Iterator

instcache = typer.Typer(
    help="Predict instructions, answer them in advance, and serve the answers from a table.", no_args_is_help=True
)

StorePath = Annotated[Path, typer.Option("--store", dir_okay=False, help="The file with the answers.")]


@instcache.command()
def fill(
    model: Model,
    instructions: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="What build has found, or a log (JSON lines, JSON, Parquet)."),
    ],
    store: StorePath,
    system_prompt: Annotated[str | None, typer.Option(help="System message before every instruction.")] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Jinja file in place of the model's template, as for serve."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    dtype: DtypeOption = Dtype.AUTO,
    max_num_seqs: MaxNumSeqs = defaults.MAX_NUM_SEQS,
    memory: Memory = None,
    cqil: CqilFile = None,
    threads: Threads = None,
) -> None:
    """Answer every instruction with MODEL, greedily; go on where an earlier run was stopped.

    Answers that the store has already are kept while model, template and system prompt are the same.
    """
    from kvbuffer.engine.config import EngineConfig
    from kvbuffer.engine.engine import Engine
    from kvbuffer.instcache.fill import Filler
    from kvbuffer.instcache.identity import Identity
    from kvbuffer.instcache.progress import progress_bar
    from kvbuffer.models.weights import resolve_model

    config = EngineConfig(
        model,
        dtype=dtype.value,
        max_num_seqs=max_num_seqs,
        max_queue_len=None,
        memory=memory,
        cqil=cqil,
        threads=threads,
    )
    engine = Engine.from_config(config)
    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    identity = Identity.of(resolve_model(model), engine.tokenizer, system_prompt, template, engine.cqil.identity)
    filler = Filler(engine, identity, model, system_prompt, template, max_tokens)
    with progress_bar("Answering") as report:
        count = filler.fill(store, _read_instructions(instructions), report)
    size = store.stat().st_size
    print(f"{store}: {count:,} answers, {size:,} bytes, {size / max(1, count):.0f} bytes each")
    print(f"kvbuffer serve {model} --instcache {store}")


def _read_instructions(path: Path) -> Iterator[str]:
    from kvbuffer.instcache.logs import read_log

    return (logged.instruction for logged in read_log(path))


@instcache.command()
def info(store: Annotated[Path, typer.Argument(help="A file with answers.")]) -> None:
    """Check a store, every answer in it included, and describe it."""
    from kvbuffer.instcache.store import Store

    opened = Store(store)
    count = sum(1 for _ in opened.answers())
    header = opened.header
    print(
        f"{count:,} answers of {header.model}, {opened.num_bytes:,} bytes, {opened.num_bytes / max(1, count):.0f} each"
    )
    print(f"system prompt: {header.identity.system_prompt or 'none'}")
