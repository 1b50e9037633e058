"""The command ``kvbuffer instcache``; torch is imported by what needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbuffer.cli_options import CqilFile, Dtype, DtypeOption, MaxNumSeqs, Memory, Model, Threads, parse_size
from kvbuffer.engine import defaults
from kvbuffer.errors import ConfigError
from kvbuffer.instcache.defaults import BATCH_SIZE, EPOCHS, MAX_ANSWER_TOKENS, MAX_TOKENS, MEMORY, VOCAB_SIZE

# What an LMDB file has behind the head of its first page.
_LMDB_MAGIC = b"\xde\xc0\xef\xbe"

if TYPE_CHECKING:
    from collections.abc import Iterator

instcache = typer.Typer(
    help="Predict instructions, answer them in advance, and serve the answers from a table.", no_args_is_help=True
)

MaxTokens = Annotated[int, typer.Option(min=1, help="Longest instruction, in tokens.")]
TreeMemory = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="Memory for the search, as in 2GiB.")]
StorePath = Annotated[Path, typer.Option("--store", dir_okay=False, help="The file with the answers.")]


@instcache.command()
def plan(
    predictor: Annotated[str, typer.Argument(help="Model of what users ask: a folder, hub id, or 'demo'.")],
    held_out: Annotated[
        Path,
        typer.Option(
            exists=True, dir_okay=False, help="Log that the predictor has not seen: JSON lines, JSON, Parquet."
        ),
    ],
    sigma: Annotated[float, typer.Option(min=0.5, help="Largest bound to look at, in nats.")] = 14.0,
    walks: Annotated[int, typer.Option(min=16, help="More of them make the intervals narrower.")] = 2048,
    max_instructions: Annotated[int, typer.Option(min=1, help="Most instructions of the log to score.")] = 5000,
    bytes_per_entry: Annotated[float, typer.Option(min=1, help="Of the store; kvbuffer instcache info tells.")] = 400,
    seconds_per_answer: Annotated[float, typer.Option(min=0, help="What filling an entry takes.")] = 0.0,
    max_bytes: Annotated[
        int | None, typer.Option(parser=parse_size, metavar="SIZE", help="Choose sigma for a store of this size.")
    ] = None,
    max_hours: Annotated[float | None, typer.Option(min=0, help="Choose sigma for this time to build.")] = None,
    max_tokens: MaxTokens = MAX_TOKENS,
    memory: TreeMemory = MEMORY,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the plan to this JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(dir_okay=False, help="Also draw it, as SVG.")] = None,
) -> None:
    """Predict hit rate, entries, bytes and time for every sigma, before anything is built."""
    import itertools
    import math

    from kvbuffer.instcache.logs import read_log
    from kvbuffer.instcache.plan import Walks, choose
    from kvbuffer.instcache.plan import plan as make_plan
    from kvbuffer.instcache.predictor import Predictor
    from kvbuffer.instcache.report import show, write_json, write_svg

    asked = [logged.instruction for logged in itertools.islice(read_log(held_out), max_instructions)]
    if not asked:
        raise ConfigError(f"{held_out} holds no instructions")
    model = Predictor(predictor, max_tokens=max_tokens, num_bytes=memory)
    sigmas = [0.5 * i for i in range(1, int(2 * sigma) + 1)]
    costs = model.costs(asked)
    rows = make_plan(Walks(model, sigma, walks), costs, sigmas, bytes_per_entry, seconds_per_answer)
    show(rows)
    if out is not None:
        write_json(rows, out)
    if plot is not None:
        write_svg(rows, plot)
    if max_bytes is not None or max_hours is not None:
        seconds = math.inf if max_hours is None else 3600 * max_hours
        chosen = choose(rows, math.inf if max_bytes is None else max_bytes, seconds)
        if chosen is None:
            raise ConfigError("no sigma of the table fits: allow more bytes or more time")
        print(f"within the budget: --sigma {chosen.sigma:g}, {chosen.hit_rate.value:.1%} hits")


@instcache.command()
def build(
    predictor: Annotated[str, typer.Argument(help="Model of what users ask: a folder, hub id, or 'demo'.")],
    sigma: Annotated[float, typer.Option(help="Find what costs at most so many nats, -log p; see plan.")],
    instructions: Annotated[Path, typer.Option(dir_okay=False, help="The file to write.")],
    max_tokens: MaxTokens = MAX_TOKENS,
    memory: TreeMemory = MEMORY,
    threads: Threads = None,
) -> None:
    """Find every instruction that PREDICTOR gives a probability of exp(-SIGMA) or more; go on where it was stopped."""
    import torch

    from kvbuffer.instcache.plan import Walks
    from kvbuffer.instcache.predictor import Predictor
    from kvbuffer.instcache.progress import progress_bar

    if threads is not None:
        torch.set_num_threads(threads)
    model = Predictor(predictor, max_tokens=max_tokens, num_bytes=memory)
    expected = int(Walks(model, sigma, num_walks=256).entries(sigma).value)
    with progress_bar("Searching") as report:
        count = model.build(instructions, sigma, report, expected)
    print(f"{instructions}: {count:,} instructions")


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
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = MAX_ANSWER_TOKENS,
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
    from kvbuffer.instcache.instructions import InstructionFile
    from kvbuffer.instcache.logs import read_log

    with path.open("rb") as file:
        if file.read(20)[16:] == _LMDB_MAGIC:
            return (text for text, _ in InstructionFile(path))
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


@instcache.command()
def proxy(
    model: Annotated[str, typer.Argument(help="Whose tokenizer and chat template the answers have.")],
    store: StorePath,
    upstream: Annotated[str, typer.Option(help="Server to pass everything else to, as in http://127.0.0.1:8001.")],
    served_model_name: Annotated[str | None, typer.Option(help="The model's name there; default: MODEL.")] = None,
    max_model_len: Annotated[int, typer.Option(min=2, help="Longest prompt with its answer there.")] = 32768,
    sampled: Annotated[bool, typer.Option(help="Answer requests with a temperature from the store, too.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="KVBUFFER_API_KEY", help="Key that clients must send; it is passed on.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port.")] = 8000,
) -> None:
    """Answer what the store holds in front of any server with OpenAI's API, and pass everything else to that."""
    from functools import partial

    import uvicorn

    from kvbuffer.instcache.identity import Identity
    from kvbuffer.models.weights import resolve_model
    from kvbuffer.server.instcache import InstCache
    from kvbuffer.server.launch import bind, raise_open_files_limit, uvicorn_config
    from kvbuffer.server.proxy import create_proxy
    from kvbuffer.tokenizer import Tokenizer

    listener = bind(host, port)
    raise_open_files_limit()
    folder = resolve_model(model)
    tokenizer = Tokenizer(folder)
    answers = InstCache(store, partial(Identity.of, folder, tokenizer), tokenizer, max_model_len, sampled)
    app = create_proxy(upstream, answers, tokenizer, served_model_name or model, api_key)
    print(f"{answers.num_entries:,} answers in front of {upstream}, on http://{host}:{port}. Ctrl-C stops.")
    uvicorn.Server(uvicorn_config(app, server_header=False)).run(sockets=[listener])


@instcache.command()
def fit(
    log: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="Log of conversations: JSON lines, JSON, Parquet.")
    ],
    out: Annotated[Path, typer.Argument(file_okay=False, help="Folder for what was asked, and for the predictor.")],
    held_out: Annotated[float, typer.Option(min=0.001, max=0.5, help="Share of the log, its end, for plan.")] = 0.05,
    min_users: Annotated[
        int, typer.Option(min=1, help="Train only on instructions that so many different users asked.")
    ] = 1,
    unique: Annotated[bool, typer.Option(help="Train on each instruction once, whatever its frequency.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to fine-tune (a folder, hub id, or 'demo'), or config.json of what to train from scratch; "
            "default: a small model from scratch."
        ),
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=260, help="Of the tokenizer of a model from scratch.")] = VOCAB_SIZE,
    max_tokens: MaxTokens = MAX_TOKENS,
    epochs: Annotated[float, typer.Option(min=0.0, help="How often each instruction is seen.")] = EPOCHS,
    batch_size: Annotated[int, typer.Option(min=1, help="Instructions per training step.")] = BATCH_SIZE,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; default: 0.003, to fine-tune 0.0003.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the training.")] = 0,
    threads: Threads = None,
) -> None:
    """Train a predictor on a log: on what users ask first, and on nothing else of it; go on where it was stopped."""
    from kvbuffer.instcache.fit import prepare
    from kvbuffer.instcache.training import FitOptions, train_predictor
    from kvbuffer.train.command import set_up

    set_up(threads)
    counts = prepare(log, out, held_out, min_users, unique)
    print(f"{out}: {counts.train:,} instructions to train on, {counts.held_out:,} held out, of {counts.asked:,} asked")
    options = FitOptions(model, vocab_size, max_tokens, epochs, batch_size, lr, seed)
    predictor = train_predictor(out, options)
    print(f"kvbuffer instcache plan {predictor} --held-out {out / 'held-out.jsonl'}")
