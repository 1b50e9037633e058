"""``kvbuffer bench ops`` from the command line, on a layer small enough to take no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvbuffer import cli
from kvbuffer.bench import machine, ops
from kvbuffer.bench.ops import Settings
from kvbuffer.errors import ConfigError

runner = CliRunner()
TINY = "bench ops --quick --heads 1x2 --dim 16x32 --working-set 32KiB --batch 2"


@pytest.fixture
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "measure_limits", lambda: {"read_bandwidth": 1e9})


@pytest.mark.usefixtures("own_costs", "quick_machine")
def test_tables_and_json_hold_the_same_run(tmp_path: Path) -> None:
    out = tmp_path / "ops.json"
    result = runner.invoke(cli.app, f"{TINY} --dtypes float32,int8/bfloat16 --out {out}".split())
    assert result.exit_code == 0, result.output
    saved = json.loads(out.read_text())
    assert {"cpu", "cores", "threads", "working_set"} <= saved["machine"].keys()
    assert {"python", "torch", "kvbuffer", "transformers"} <= saved["versions"].keys()
    assert saved["settings"]["tiers"] == [["torch.float32"] * 2, ["torch.int8", "torch.bfloat16"]]
    forms = {row["form"] for row in saved["rows"]}
    assert forms == {
        "recurrent", "buffered m=4", "buffered m=8", "buffered m=16", "KV only, 16 tokens",
        "verify 4 drafts", "verify 8 drafts", "prefill 128",
    }  # fmt: skip
    assert {row["batch"] for row in saved["rows"]} == {2}
    assert all(row["gate"] == "" and row["seconds"] > 0 for row in saved["rows"])
    for text in (*forms, "transformers", "gated_deltanet, batch 2, 1x2 heads of 16x32"):
        assert text in result.stdout
    assert ("Choices of the cost model" in result.stdout) == bool(saved["choices"])


@pytest.mark.usefixtures("own_costs", "quick_machine")
def test_the_working_set_is_twice_the_cache_unless_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "last_level_cache", lambda device: 10**6)
    monkeypatch.setattr(machine, "free_memory", lambda device: 10**12)
    assert ops._working_set(Settings()) == 2 * 10**6
    assert ops._working_set(Settings(working_set=12345)) == 12345
    monkeypatch.setattr(machine, "free_memory", lambda device: 16 * 10**5)
    assert ops._working_set(Settings()) == 10**5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--heads 16", "two numbers"),
        ("--dim 16x0", "positive numbers"),
        ("--batch 1,x", "positive numbers"),
        ("--dtypes float16", "float16"),
        ("--dtypes float32/int8", "float32/int8"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: str, message: str) -> None:
    result = runner.invoke(cli.app, ["bench", "ops", *options.split()])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "message"), [("--families gla,nosuch", "no family nosuch"), ("--heads 3x4", "cannot share 3 key heads")]
)
def test_settings_that_make_no_sense_are_refused(options: str, message: str) -> None:
    result = runner.invoke(cli.app, ["bench", "ops", *options.split()])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from kvbuffer import cli; from typer.testing import CliRunner; "
        "assert CliRunner().invoke(cli.app, ['bench', 'ops', '--help']).exit_code == 0; "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(["src", *sys.path])})
