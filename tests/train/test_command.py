"""The command line of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvbuffer import cli
from kvbuffer.train.checkpoints import read_config
from tests.support.checkpoints import make_checkpoint

runner = CliRunner()


def run(*arguments: str | int | Path) -> None:
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


@pytest.mark.parametrize("command", ["coalesce", "decoalesce", "interpolate"])
def test_help_says_what_a_command_does(command: str) -> None:
    result = runner.invoke(cli.app, ["train", command, "--help"])
    assert result.exit_code == 0
    assert "checkpoint" in result.output.lower()
