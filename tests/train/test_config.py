"""Options from code, command line and file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import typer

from kvbuffer import cli
from kvbuffer.errors import ConfigError
from kvbuffer.train.config import TrainConfig, read_options

PATH = Path("unused")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"alpha": 1.5}, r"alpha must be from 0 to 1, got 1\.5"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"warmup": -1}, "warmup must not be negative"),
        ({"method": "magic"}, "method must be one of scratch, v-cycle, .*; got 'magic'"),
        ({"optimizer": "sgd"}, "optimizer must be one of muon, adamw"),
    ],
)
def test_values_out_of_range_are_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TrainConfig(PATH, PATH, PATH, **changes)


def test_files_hold_known_options_only(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 10\nsmall-share: 0.4\n")
    assert read_options(file) == {"steps": 10, "small_share": 0.4}
    file.write_text("step: 10\n")
    with pytest.raises(ConfigError, match="unknown options: step; see"):
        read_options(file)
    file.write_text("- steps\n")
    with pytest.raises(ConfigError, match="must hold options and their values"):
        read_options(file)


def test_a_run_may_change_how_it_is_kept_but_not_what_it_is() -> None:
    options = TrainConfig(PATH, PATH, PATH)
    dataclasses.replace(options, save_every=7, tensorboard=True).check_same(options.as_json())
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        dataclasses.replace(options, seed=1).check_same(options.as_json())


def test_the_command_line_has_the_same_options_and_defaults() -> None:
    command = typer.main.get_command(cli.app).commands["train"].commands["run"]  # type: ignore[attr-defined]
    shown = {option.name: option.default for option in command.params}
    for field in dataclasses.fields(TrainConfig):
        assert field.name in shown
        if field.default is not dataclasses.MISSING:
            assert shown[field.name] == field.default
    assert shown.keys() - {field.name for field in dataclasses.fields(TrainConfig)} == {"threads", "config"}
