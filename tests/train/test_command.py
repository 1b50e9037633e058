"""The command line of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvbuffer import cli
from kvbuffer.errors import ConfigError
from kvbuffer.train.checkpoints import read_config
from tests.support.checkpoints import make_checkpoint
from tests.support.training import config_of, write_texts

runner = CliRunner()


def run(*arguments: str | float | Path) -> None:
    """Run a command that must succeed."""
    result = runner.invoke(cli.app, ["train", *map(str, arguments)])
    assert result.exit_code == 0, result.output


def test_operators_from_file_to_file(tmp_path: Path) -> None:
    large = make_checkpoint(tmp_path, "qwen3_5", num_hidden_layers=8)
    run("coalesce", large, tmp_path / "small", "--width", 2, "--depth", 1, "--pairing", "stacked")
    run("decoalesce", tmp_path / "small", tmp_path / "grown", "--like", large)
    run("interpolate", large, tmp_path / "grown", tmp_path / "mixed", "--alpha", "0.5")
    assert read_config(tmp_path / "small")["hidden_size"] == 32
    assert read_config(tmp_path / "mixed") == read_config(large)
    assert (tmp_path / "mixed" / "tokenizer.json").exists()


def test_from_texts_to_a_model_and_a_comparison(tmp_path: Path) -> None:
    texts, data = write_texts(tmp_path / "texts"), tmp_path / "data"
    run("prepare", texts, data, "--vocab-size", 300, "--held-out", 0.2)
    model = tmp_path / "config.json"
    model.write_text(json.dumps({**config_of("llama"), "hidden_size": 32, "head_dim": 16}))
    file = tmp_path / "options.yaml"
    options = "steps: 4\nbatch-size: 2\nseq-len: 16\nwarmup: 1\nrewarm: 1\neval-every: 2\n"
    file.write_text(options)
    run("run", data, tmp_path / "run", "--model", model, "--config", file, "--method", "scratch", "--seq-len", 8)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"]["seq_len"] == 8
    assert (tmp_path / "run" / "model" / "tokenizer.json").exists()
    file.write_text(f"{options}model: {model}\n")
    run("compare", data, tmp_path / "runs", "--config", file, "--methods", "scratch,v-cycle", "--seeds", "1,2")
    rows = json.loads((tmp_path / "runs" / "report.json").read_text())
    assert [(row["method"], row["seeds"]) for row in rows] == [("scratch", [1, 2]), ("v-cycle", [1, 2])]


def test_a_missing_model_is_named(tmp_path: Path, data: Path) -> None:
    (tmp_path / "options.yaml").write_text("steps: 4\n")
    result = runner.invoke(
        cli.app, ["train", "compare", str(data), str(tmp_path / "runs"), "--config", str(tmp_path / "options.yaml")]
    )
    assert isinstance(result.exception, ConfigError)
    assert "name no model" in str(result.exception)


@pytest.mark.parametrize("command", ["coalesce", "decoalesce", "interpolate"])
def test_help_says_what_a_command_does(command: str) -> None:
    result = runner.invoke(cli.app, ["train", command, "--help"])
    assert result.exit_code == 0
    assert "checkpoint" in result.output.lower()
