"""Options of the command line: their types, their help, and the file they may come from.

They have vLLM's names, and beside them SGLang's where it has the same option.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

_SIZE_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Dtype(StrEnum):
    """Element types."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class StateDtype(StrEnum):
    """Element types of states."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class ToolCallParser(StrEnum):
    """How a model writes calls of tools, by vLLM's and SGLang's names."""

    AUTO = "auto"
    HERMES = "hermes"
    QWEN = "qwen"
    QWEN25 = "qwen25"
    QWEN3_CODER = "qwen3_coder"
    QWEN3_XML = "qwen3_xml"

    @property
    def style(self) -> Literal["json", "tags"] | None:
        """The style, None where the chat template says which."""
        if self is ToolCallParser.AUTO:
            return None
        return "tags" if self.value.startswith("qwen3") else "json"


class ReasoningParser(StrEnum):
    """Whether a model's thoughts are told from its answer; the named parsers do as auto does."""

    AUTO = "auto"
    NONE = "none"
    QWEN3 = "qwen3"
    DEEPSEEK_R1 = "deepseek_r1"


class LogLevel(StrEnum):
    """uvicorn's levels; debug and trace log every request."""

    CRITICAL = "critical"
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"
    TRACE = "trace"


def parse_size(text: str) -> int:
    """Return the number of bytes that ``text`` says, as in 8GiB, 500MB or 1000000.

    Raises:
        typer.BadParameter: it is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if match is None or match[2] not in _SIZE_UNITS or (size := int(float(match[1]) * _SIZE_UNITS[match[2]])) < 1:
        raise typer.BadParameter(f"{text!r} is not a size in bytes; write for example 8GiB or 500MB.")
    return size


def use_config_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of the command's options."""
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} must hold options and their values, as in 'port: 8000'.")
    names = {
        name.lstrip("-").replace("-", "_"): parameter.name
        for parameter in context.command.params
        if parameter.name != "config"
        for name in parameter.opts
    }
    values = {
        names.get(name := str(option).replace("-", "_"), name): json.dumps(value) if isinstance(value, dict) else value
        for option, value in values.items()
    }
    if unknown := values.keys() - names.values():
        raise typer.BadParameter(
            f"{path} has unknown options: {', '.join(sorted(unknown))}; see {context.command_path} --help."
        )
    context.default_map = {**values, **(context.default_map or {})}
    return path


def use_model_path(context: typer.Context, path: str | None) -> str | None:
    """Take the model from an option instead of the argument."""
    if path is not None:
        context.default_map = {**(context.default_map or {}), "model": path}
    return path


Model = Annotated[str, typer.Argument(help="Hugging Face folder or hub id, or 'demo' for the embedded model.")]
ModelPath = Annotated[
    str | None, typer.Option(is_eager=True, callback=use_model_path, help="The same as MODEL, as SGLang has it.")
]
StateDtypeOption = Annotated[
    StateDtype,
    typer.Option(
        "--state-dtype",
        "--mamba-ssm-cache-dtype",
        "--mamba-ssm-dtype",
        help="Type of linear-attention states; auto is float32. No fp8: int8 is as small and 2 to 4 times as accurate.",
    ),
]
RecordDtype = Annotated[
    Dtype, typer.Option(help="Type of keys and values in KV buffers; auto is float32 beside float32 states.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of weights and activations; auto is the checkpoint's.")]
MaxModelLen = Annotated[
    int | None,
    typer.Option("--max-model-len", "--context-length", min=1, help="Context length in tokens; default: the model's."),
]
MaxNumSeqs = Annotated[
    int, typer.Option("--max-num-seqs", "--max-running-requests", min=1, help="Most requests in one step.")
]
MaxNumBatchedTokens = Annotated[
    int, typer.Option("--max-num-batched-tokens", "--chunked-prefill-size", min=1, help="Most tokens in one step.")
]
MaxQueueLen = Annotated[
    int,
    typer.Option(
        "--max-queue-len",
        "--max-queued-requests",
        min=1,
        help="Most requests waiting, half of them of one client; then 429.",
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(parser=parse_size, metavar="SIZE", help="Bytes for states, buffers and caches, as in 8GiB."),
]
BufferLen = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens a KV buffer holds before it is folded; default: what is cheapest for each batch."),
]
KvOnlyLen = Annotated[
    int | None,
    typer.Option(min=0, help="Tokens that a request has before it gets a state; default: as long as that pays."),
]
SpeculativeConfigOption = Annotated[
    str | None,
    typer.Option(
        "--speculative-config",
        metavar="JSON",
        help='How next tokens are guessed, as in \'{"method": "ngram", "num_speculative_tokens": 4}\'; default: not.',
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        file_okay=False, help="Folder for cached prefixes that memory has no room for, and for all of them at the end."
    ),
]
CacheDirSize = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="Most bytes in --cache-dir.")]
CqilFile = Annotated[
    Path | None,
    typer.Option("--cqil", dir_okay=False, help="Plan of the layers to compute at once; see 'kvbuffer cqil plan'."),
]
TensorParallelSize = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "--tp-size",
        min=1,
        help="Processes that each hold a part of the model; torchrun starts them.",
    ),
]
ToolCallParserOption = Annotated[
    ToolCallParser,
    typer.Option("--tool-call-parser", help="How the model writes calls of tools; auto: as its chat template says."),
]
ReasoningParserOption = Annotated[
    ReasoningParser,
    typer.Option("--reasoning-parser", help="none leaves a model's thoughts in the answer's text."),
]
#: vLLM wants it said; here a request with tools says enough.
EnableAutoToolChoice = Annotated[bool, typer.Option("--enable-auto-tool-choice", hidden=True)]
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        " /--disable-radix-cache",
        help="Reuse what earlier requests with the same beginning computed.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's choice.")]
