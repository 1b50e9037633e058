"""The command line, around an engine that repeats its prompt."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from kvbuffer import cli
from kvbuffer.cli_options import parse_size
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.errors import ConfigError, ModelError
from kvbuffer.server import app, launch
from tests.server.fake_engine import FakeEngine

runner = CliRunner()


class Started(Exception):
    """Raised in place of running a server."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Load a fake engine in place of a model; returns the options it was loaded with."""
    options: dict[str, Any] = {}

    def load(**given: Any) -> FakeEngine:
        options.update(given)
        engine: Any = FakeEngine()
        engine.plan = SimpleNamespace(describe=lambda: "the plan")
        engine.take_memory = lambda: options.update(took_memory=True)
        return engine

    monkeypatch.setattr(cli, "load_engine", load)
    return options


@pytest.fixture
def served(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stop ``serve`` where the server would run; returns the options the engine was loaded with."""

    def run(self: launch.Server, sockets: Any) -> None:
        loaded["address"] = sockets[0].getsockname()
        loaded["log_level"] = self.config.log_level
        self._on_started()
        sockets[0].close()

    monkeypatch.setattr(launch.Server, "run", run)
    return loaded


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from kvbuffer import cli; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(cli.app, ['serve', '--help']).exit_code == 0; "
        "assert not {'torch', 'fastapi', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(["src", *sys.path])})


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "info"])
def test_options_of_the_engine_have_the_engines_defaults(command: str) -> None:
    engine = {field.name: field.default for field in dataclasses.fields(EngineConfig) if field.name != "model"}
    options = typer.main.get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    defaults = {option.name: option.default for option in options if option.name in engine}
    assert defaults == {name: engine[name] for name in defaults}
    assert "buffer_len" in defaults


def test_serve_takes_vllms_flags(served: dict[str, Any]) -> None:
    flags = (
        "some/model --host 127.0.0.1 --port 0 --served-model-name tiny --dtype float32 --max-model-len 512 "
        "--max-num-seqs 8 --max-num-batched-tokens 128 --memory 2GiB --buffer-len 4 --threads 2 "
        "--uvicorn-log-level info"
    )
    result = runner.invoke(cli.app, ["serve", *flags.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    expected = {
        "model": "some/model",
        "served_model_name": "tiny",
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "memory": 2 * 2**30,
        "took_memory": True,
        "buffer_len": 4,
        "threads": 2,
        "log_level": "info",
    }
    assert {name: served[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "style", "tells_thoughts"),
    [
        ("", None, True),
        ("--enable-auto-tool-choice --tool-call-parser hermes", "json", True),
        ("--tool-call-parser qwen25 --reasoning-parser none", "json", False),
        ("--enable-auto-tool-choice --tool-call-parser qwen3_coder --reasoning-parser qwen3", "tags", True),
    ],
)
def test_serve_takes_the_parsers_of_vllm_and_sglang(
    served: dict[str, Any], monkeypatch: pytest.MonkeyPatch, flags: str, style: str | None, tells_thoughts: bool
) -> None:
    create = app.create_app

    def recorded(*args: Any, **kwargs: Any) -> Any:
        served.update(kwargs)
        return create(*args, **kwargs)

    monkeypatch.setattr(app, "create_app", recorded)
    result = runner.invoke(cli.app, ["serve", "some/model", "--port", "0", *flags.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (served["call_style"], served["tells_thoughts"]) == (style, tells_thoughts)


def test_serve_takes_sglangs_flags(served: dict[str, Any]) -> None:
    flags = (
        "--model-path some/model --port 0 --context-length 512 --max-running-requests 8 --chunked-prefill-size 128 "
        "--max-queued-requests 9 --mamba-ssm-dtype bfloat16 --disable-radix-cache --log-level info"
    )
    result = runner.invoke(cli.app, ["serve", *flags.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    expected = {
        "model": "some/model",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "max_queue_len": 9,
        "state_dtype": "bfloat16",
        "enable_prefix_caching": False,
        "log_level": "info",
    }
    assert {name: served[name] for name in expected} == expected


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_a_model_path_wins_over_the_file_which_knows_sglangs_names(
    served: dict[str, Any], tmp_path: Path, order: slice
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("model: from/file\nport: 0\ncontext-length: 512\n")
    flags = [["--config", str(config)], ["--model-path", "from/flag"]][order]
    result = runner.invoke(cli.app, ["serve", *flags[0], *flags[1]], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (served["model"], served["max_model_len"]) == ("from/flag", 512)


def test_serve_says_what_it_runs_and_how_to_call_it(served: dict[str, Any]) -> None:
    output = runner.invoke(cli.app, ["serve", "demo", "--port", "0", "--api-key", "secret"]).output
    port = served["address"][1]
    assert "the plan" in output
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in output
    assert '"model": "demo"' in output
    assert "Bearer" in output
    assert "secret" not in output


def test_serve_takes_no_memory_at_the_start_unless_it_is_given_it(served: dict[str, Any]) -> None:
    runner.invoke(cli.app, ["serve", "some/model", "--port", "0"], catch_exceptions=False)
    assert "took_memory" not in served


def test_a_configuration_file_gives_defaults_and_flags_win(served: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("model: some/model\nport: 0\nmax-num-seqs: 8\nmemory: 1MiB\ndtype: float32\n")
    result = runner.invoke(cli.app, ["serve", "--config", str(config), "--max-num-seqs", "16"])
    assert result.exit_code == 0, result.output
    assert (served["model"], served["max_num_seqs"], served["memory"], served["dtype"]) == (
        "some/model",
        16,
        2**20,
        "float32",
    )


@pytest.mark.parametrize("flag", [True, False])
def test_speculation_is_json_or_a_mapping_in_the_file(served: dict[str, Any], tmp_path: Path, flag: bool) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(
        "port: 0\n" if flag else "port: 0\nspeculative-config: {method: ngram, num_speculative_tokens: 4}\n"
    )
    options = ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}'] if flag else []
    result = runner.invoke(cli.app, ["serve", "demo", "--config", str(config), *options])
    assert result.exit_code == 0, result.output
    assert SpeculativeConfig.parse(served["speculative_config"]) == SpeculativeConfig("ngram", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max-num-seq: 8", "unknown options: max_num_seq"),
        ("- 8", "must hold options"),
        ("a: [", "cannot read"),
        ("max-num-seqs: many", "--max-num-seqs"),
        ("max-num-seqs: 0", "--max-num-seqs"),
        ("memory: lots", "lots"),
        ("config: other.yaml", "unknown options: config"),
    ],
)
def test_faulty_configuration_files(served: dict[str, Any], tmp_path: Path, content: str, message: str) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(content)
    result = runner.invoke(cli.app, ["serve", "demo", "--port", "0", "--config", str(config)])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "flags", [["--prot", "1"], ["--dtype", "float8"], ["--memory", "-3"], ["--port", "70000"], ["--max-num-seqs", "0"]]
)
def test_faulty_flags(served: dict[str, Any], flags: list[str]) -> None:
    assert runner.invoke(cli.app, ["serve", "demo", *flags]).exit_code == 2
    assert not served


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 * 2**30), ("1.5 mb", 1_500_000), ("1000", 1000), ("2KiB", 2048)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_taken_port_is_one_line(served: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with launch.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["kvbuffer", "serve", "demo", "--port", str(port)])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvbuffer: Cannot listen on 127.0.0.1:{port}")
    assert not served


@pytest.mark.parametrize(("error", "code"), [(ModelError("no such model"), 1), (ConfigError("bad option"), 2)])
def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, error: Exception, code: int) -> None:
    def load(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "load_engine", load)
    monkeypatch.setattr(sys, "argv", ["kvbuffer", "generate", "some/model", "--prompt", "x"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert capsys.readouterr().err == f"kvbuffer: {error}\n"


def test_generate_prints_the_continuation(loaded: dict[str, Any]) -> None:
    result = runner.invoke(cli.app, ["generate", "demo", "--prompt", "hé there", "--temperature", "0"])
    assert (result.exit_code, result.stdout) == (0, "hé there\n")
    result = runner.invoke(cli.app, ["generate", "demo", "--max-tokens", "3"], input="from standard input")
    assert (result.exit_code, result.stdout) == (0, "fro\n")


def test_chat_keeps_the_conversation(loaded: dict[str, Any]) -> None:
    result = runner.invoke(cli.app, ["chat", "demo", "--system", "be brief"], input="one\n\ntwo\n")
    assert result.exit_code == 0, result.output
    first = "[system]be brief[user]one[assistant]"
    text = result.output.replace("\n", "")
    assert first in text
    assert f"{first}{first}[user]two[assistant]" in text


def test_info_prints_the_environment_and_the_plan(loaded: dict[str, Any]) -> None:
    result = runner.invoke(cli.app, ["info", "demo", "--buffer-len", "8"])
    assert result.exit_code == 0, result.output
    for word in ("kvbuffer", "python", "torch", "kernels", "the plan"):
        assert word in result.output
    assert loaded["buffer_len"] == 8
