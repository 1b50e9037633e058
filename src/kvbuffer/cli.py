"""The command ``kvbuffer``.

What takes long to import (torch, the server) is imported by the command that needs it.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbuffer import __version__
from kvbuffer.bench.command import bench
from kvbuffer.cli_options import (
    BufferLen,
    CacheDir,
    CacheDirSize,
    CqilFile,
    Dtype,
    DtypeOption,
    EnableAutoToolChoice,
    KvOnlyLen,
    LogLevel,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MaxQueueLen,
    Memory,
    Model,
    ModelPath,
    PrefixCaching,
    ReasoningParser,
    ReasoningParserOption,
    RecordDtype,
    SpeculativeConfigOption,
    StateDtype,
    StateDtypeOption,
    TensorParallelSize,
    Threads,
    ToolCallParser,
    ToolCallParserOption,
    use_config_file,
)
from kvbuffer.cqil.command import cqil as cqil_commands
from kvbuffer.engine import defaults
from kvbuffer.errors import ConfigError, KVBufferError
from kvbuffer.instcache.command import instcache
from kvbuffer.train.command import train

if TYPE_CHECKING:
    from kvbuffer.engine.async_engine import AsyncEngine
    from kvbuffer.engine.engine import Engine
    from kvbuffer.engine.request import CompletionDelta
    from kvbuffer.engine.sampling_params import SamplingParams
    from kvbuffer.server.instcache import InstCache

app = typer.Typer(
    help="Serve linear-attention language models with KV buffers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
app.add_typer(cqil_commands, name="cqil")
app.add_typer(train, name="train")
app.add_typer(instcache, name="instcache")


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="KVBUFFER_API_KEY", help="Key that clients must send; default: none needed."),
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in the API; default: MODEL.")] = None,
    dtype: DtypeOption = Dtype.AUTO,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = defaults.MAX_NUM_SEQS,
    max_num_batched_tokens: MaxNumBatchedTokens = defaults.MAX_NUM_BATCHED_TOKENS,
    max_queue_len: MaxQueueLen = defaults.MAX_QUEUE_LEN,
    memory: Memory = None,
    buffer_len: BufferLen = None,
    kv_only_len: KvOnlyLen = None,
    state_dtype: StateDtypeOption = StateDtype.AUTO,
    record_dtype: RecordDtype = Dtype.AUTO,
    enable_prefix_caching: PrefixCaching = True,
    speculative_config: SpeculativeConfigOption = None,
    cache_dir: CacheDir = None,
    cache_dir_size: CacheDirSize = defaults.CACHE_DIR_BYTES,
    cqil: CqilFile = None,
    tensor_parallel_size: TensorParallelSize = 1,
    threads: Threads = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Jinja file in place of the model's template."),
    ] = None,
    tool_call_parser: ToolCallParserOption = ToolCallParser.AUTO,
    enable_auto_tool_choice: EnableAutoToolChoice = True,
    reasoning_parser: ReasoningParserOption = ReasoningParser.AUTO,
    uvicorn_log_level: Annotated[
        LogLevel, typer.Option("--uvicorn-log-level", "--log-level", help="How much the HTTP server logs.")
    ] = LogLevel.WARNING,
    instcache_store: Annotated[
        Path | None,
        typer.Option(
            "--instcache", exists=True, dir_okay=False, help="Store of predicted answers (kvbuffer instcache fill)."
        ),
    ] = None,
    instcache_sampled: Annotated[
        bool, typer.Option(help="Answer requests with a temperature from the store, too.")
    ] = False,
    shutdown_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running requests get to finish on SIGINT or SIGTERM.")
    ] = 30.0,
    model_path: ModelPath = None,
    config: Annotated[
        Path | None,
        typer.Option(is_eager=True, callback=use_config_file, help="YAML file of these options; flags win."),
    ] = None,
) -> None:
    """Serve MODEL over HTTP with OpenAI's API."""
    from kvbuffer.engine.async_engine import AsyncEngine
    from kvbuffer.engine.config import EngineConfig
    from kvbuffer.engine.loading import follow_engine
    from kvbuffer.engine.ranks import is_follower
    from kvbuffer.ops.dispatch import explain
    from kvbuffer.server.app import create_app
    from kvbuffer.server.launch import Server, bind, call_in_thread, raise_open_files_limit

    options: dict[str, Any] = {
        "model": model,
        "served_model_name": served_model_name,
        "dtype": dtype.value,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_queue_len": max_queue_len,
        "memory": memory,
        "buffer_len": buffer_len,
        "kv_only_len": kv_only_len,
        "state_dtype": state_dtype.value,
        "record_dtype": record_dtype.value,
        "enable_prefix_caching": enable_prefix_caching,
        "speculative_config": speculative_config,
        "cache_dir": cache_dir,
        "cache_dir_bytes": cache_dir_size,
        "cqil": cqil,
        "tensor_parallel_size": tensor_parallel_size,
        "threads": threads,
    }
    if is_follower():
        follow_engine(EngineConfig(**options))
        return
    template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    listener = bind(host, port)
    raise_open_files_limit()
    engine = call_in_thread(load_engine, **options)
    if memory is not None:
        engine.take_memory()
    print(engine.plan.describe())
    print(explain())
    async_engine = AsyncEngine(engine)
    answers = None
    if instcache_store is not None:
        answers = open_instcache(instcache_store, async_engine, template, instcache_sampled)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    key = "" if api_key is None else " -H 'Authorization: Bearer YOUR_KEY'"
    name = served_model_name or model

    def announce() -> None:
        print(f"\nServing {name} on {url} (API: {url}/v1, documentation: {url}/docs). Ctrl-C stops. Try:\n")
        print(f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\")
        print(
            f'  -d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}\'\n',
            flush=True,
        )

    server = Server(
        create_app(
            async_engine,
            api_key=api_key,
            chat_template=template,
            call_style=tool_call_parser.style,
            tells_thoughts=reasoning_parser is not ReasoningParser.NONE,
            instcache=answers,
        ),
        async_engine,
        shutdown_timeout_s=shutdown_timeout,
        log_level=uvicorn_log_level.value,
        on_started=announce,
    )
    server.run([listener])


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; default: read from standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; default: the model's.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling; default: the model's.")] = None,
    dtype: DtypeOption = Dtype.AUTO,
    memory: Memory = None,
    buffer_len: BufferLen = None,
    cqil: CqilFile = None,
    threads: Threads = None,
    speculative_config: SpeculativeConfigOption = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
) -> None:
    """Continue a text with MODEL and print it as it comes."""
    if prompt is None:
        prompt = sys.stdin.read()
    engine = load_engine(
        model=model, dtype=dtype.value, memory=memory, buffer_len=buffer_len, cqil=cqil, threads=threads,
        speculative_config=speculative_config,
    )  # fmt: skip
    params = local_sampling_params(engine, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    for delta in run_one(engine, engine.tokenizer.encode(prompt), params):
        print(delta.text, end="", flush=True)
    print()


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model as for serve; with --url, its name there.")] = "demo",
    url: Annotated[str | None, typer.Option(help="Chat with a running server, as in http://127.0.0.1:8000.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KVBUFFER_API_KEY", help="The server's API key.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens per reply.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token; default: the model's.")
    ] = None,
    dtype: DtypeOption = Dtype.AUTO,
    memory: Memory = None,
    buffer_len: BufferLen = None,
    threads: Threads = None,
) -> None:
    """Chat in the terminal; Ctrl-C stops a reply, Ctrl-D ends the chat."""
    from kvbuffer import terminal

    if url is not None:
        options = {"model": model, "max_tokens": max_tokens, "temperature": temperature}
        reply = terminal.remote_replies(url, api_key, options)
    else:
        engine = load_engine(model=model, dtype=dtype.value, memory=memory, buffer_len=buffer_len, threads=threads)
        params = local_sampling_params(engine, max_tokens=max_tokens, temperature=temperature)

        def reply(messages: terminal.Messages) -> Generator[str, None, None]:
            prompt = engine.tokenizer.apply_chat_template(messages)
            with terminal.deferred_interrupt() as raise_if_interrupted:
                for delta in run_one(engine, prompt, params):
                    yield delta.text
                    raise_if_interrupted()

    terminal.converse(reply, system)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="Also load this model and print its memory plan.")] = None,
    dtype: DtypeOption = Dtype.AUTO,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = defaults.MAX_NUM_SEQS,
    memory: Memory = None,
    buffer_len: BufferLen = None,
    kv_only_len: KvOnlyLen = None,
    state_dtype: StateDtypeOption = StateDtype.AUTO,
    record_dtype: RecordDtype = Dtype.AUTO,
    enable_prefix_caching: PrefixCaching = True,
) -> None:
    """Print the environment, the kernels chosen and why, and MODEL's memory plan and maximum concurrency."""
    import os
    import platform

    import torch
    import transformers

    from kvbuffer.ops.dispatch import explain, explain_operators

    print(f"kvbuffer      {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    print(f"torch         {torch.__version__}, {torch.get_num_threads()} threads on {os.cpu_count()} CPUs")
    print(f"transformers  {transformers.__version__}")
    print(f"kernels       {explain()}")
    print(explain_operators())
    if model is not None:
        engine = load_engine(
            model=model,
            dtype=dtype.value,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            memory=memory,
            buffer_len=buffer_len,
            kv_only_len=kv_only_len,
            state_dtype=state_dtype.value,
            record_dtype=record_dtype.value,
            enable_prefix_caching=enable_prefix_caching,
        )
        print(engine.plan.describe())


def open_instcache(path: Path, async_engine: AsyncEngine, chat_template: str | None, allow_sampled: bool) -> InstCache:
    """Return the store of predicted answers at ``path``, checked to be those of an engine."""
    from functools import partial

    from kvbuffer.instcache.identity import Identity
    from kvbuffer.models.weights import resolve_model
    from kvbuffer.server.instcache import InstCache

    engine = async_engine.engine
    folder, plan = resolve_model(engine.config.model), engine.cqil.identity
    return InstCache(
        path,
        partial(Identity.of, folder, engine.tokenizer, chat_template=chat_template, plan=plan),
        engine.tokenizer,
        engine.max_model_len,
        allow_sampled,
        seconds=lambda num_tokens: num_tokens * async_engine.metrics.seconds_per_token,
    )


def load_engine(**options: Any) -> Engine:
    """Return the engine for these options of ``EngineConfig``."""
    from kvbuffer.engine.config import EngineConfig
    from kvbuffer.engine.engine import Engine

    return Engine.from_config(EngineConfig(**options))


def local_sampling_params(engine: Engine, **options: Any) -> SamplingParams:
    """Return the options that were given over the model's own defaults."""
    from kvbuffer.engine.sampling_params import SamplingParams

    given = {name: value for name, value in options.items() if value is not None}
    return SamplingParams(**{"max_tokens": None, **engine.generation_defaults, **given})


def run_one(engine: Engine, prompt_token_ids: list[int], params: SamplingParams) -> Iterator[CompletionDelta]:
    """Run one request in this thread; leaving the iteration aborts it."""
    engine.add_request("local", prompt_token_ids, params)
    try:
        while engine.has_work():
            yield from engine.step()
    finally:
        engine.abort_request("local")


def main() -> None:
    """Run the command line; our errors are one line each, with exit status 1, or 2 for bad options."""
    try:
        app()
    except KVBufferError as error:
        print(f"kvbuffer: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
