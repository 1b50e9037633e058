"""The training loop: what it learns, what it leaves behind, and that nothing can interrupt it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

from kvbuffer import LLM, SamplingParams
from kvbuffer.errors import ConfigError, KVBufferError, ModelError
from kvbuffer.train.checkpoints import read_checkpoint, read_config
from kvbuffer.train.data import prepare
from kvbuffer.train.operators import LevelMap
from kvbuffer.train.records import read_log
from kvbuffer.train.run import run
from tests.support.training import tiny_options, write_chats

ROOT = Path(__file__).parents[2]

# One child after another is forked, trains, and is killed after a random time, until one gets to the end.
KILLED = """
import os, pathlib, random, signal, sys, time
import torch
from kvbuffer.train.run import run
from tests.support.training import tiny_options

torch.set_num_threads(1)
data, out, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
options = tiny_options(data, out, method="v-cycle", save_every=2)
rng, kills = random.Random(3), 0
while True:
    child = os.fork()
    if child == 0:
        run(options, show_progress=False)
        os._exit(0)
    deadline = time.monotonic() + (rng.uniform(0, seconds / 4) if kills < 15 else 300)
    ended, status = 0, 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.005)
        ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        assert status == 0, status
        break
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
print(kills)
"""


def curve(out: Path) -> list[dict[str, Any]]:
    """A run's log without its times."""
    times = ("seconds", "cpu_seconds")
    return [{name: value for name, value in record.items() if name not in times} for record in read_log(out)]


def same_model(first: Path, second: Path) -> bool:
    ours, theirs = read_checkpoint(first / "model"), read_checkpoint(second / "model")
    return ours.config == theirs.config and all(
        torch.equal(tensor, theirs.parameters[name]) for name, tensor in ours.parameters.items()
    )


def rms(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def program(source: str, *arguments: Path | float) -> str:
    result = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        cwd=ROOT, env={"PYTHONPATH": ":".join(["src", *sys.path])}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_it_learns(data: Path, tmp_path: Path, optimizer: str) -> None:
    run(tiny_options(data, tmp_path / "run", method="scratch", optimizer=optimizer, steps=60), show_progress=False)
    held_out = [record["held_out"] for record in curve(tmp_path / "run") if "held_out" in record]
    assert held_out[-1] < 0.7 * held_out[0]


def test_killed_at_random_moments_it_ends_the_same(data: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    run(tiny_options(data, tmp_path / "whole", method="v-cycle", save_every=2), show_progress=False)
    kills = int(program(KILLED, data, tmp_path / "killed", time.monotonic() - begin))
    assert kills > 2
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert same_model(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.partial"))


@pytest.mark.parametrize("model", ["qwen3_next", "qwen3_5_tied"])
def test_a_hybrid_by_the_v_cycle_is_served_at_once(data: Path, tmp_path: Path, model: str) -> None:
    options = tiny_options(data, tmp_path / "run", model, method="v-cycle", optimizer_state="keep", steps=6)
    run(options, show_progress=False)
    records = curve(tmp_path / "run")
    assert [record["total"] for record in records] == list(range(1, len(records) + 1))
    assert [record["stage"] for record in records] == sorted(record["stage"] for record in records)
    llm = LLM(str(tmp_path / "run" / "model"), memory=32 << 20, show_progress=False)
    output = llm.generate(["astate"], SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
    assert output[0].outputs[0].text
    assert llm.chat([{"role": "user", "content": "a"}], SamplingParams(max_tokens=2), use_tqdm=False)


def test_bfloat16_follows_float32(data: Path, tmp_path: Path) -> None:
    finals = []
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        run(tiny_options(data, out, "qwen3_5", method="scratch", precision=precision, steps=4), show_progress=False)
        finals.append(curve(out)[-1]["held_out"])
        config, parameters = read_checkpoint(out / "model")
        assert config["dtype"] == precision
        assert {x.dtype for x in parameters.values()} == {getattr(torch, precision)}
    assert finals[0] != finals[1]
    assert finals[1] == pytest.approx(finals[0], rel=0.02)


def test_two_processes_train_as_one(data: Path, tmp_path: Path) -> None:
    """By torchrun and the command line, on conversations: each process has its own share of what is learned."""
    prepare(write_chats(tmp_path), tmp_path / "data", vocab_size=300, held_out=0.2, tokenizer=data)
    options = tiny_options(tmp_path / "data", tmp_path / "one", method="v-cycle", steps=8)
    run(options, show_progress=False)
    config = tmp_path / "options.yaml"
    values = {name: value for name, value in options.as_json().items() if name not in ("data", "out")}
    config.write_text(json.dumps(values))
    subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
            sys.executable, "-c", "from kvbuffer.cli import main; main()",
            "train", "run", options.data, tmp_path / "two", "--config", config, "--model", options.model,
            "--threads", "1",
        ],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": ":".join(["src", *sys.path]), "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert len(one) == len(two)
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)


DEEPER = {"num_hidden_layers": 16, "mlp_only_layers": [1, 5, 9, 13]}


@pytest.mark.parametrize("changes", [{}, {"moe_intermediate_size": 96}, DEEPER], ids=["same", "wider", "deeper"])
def test_it_begins_with_a_checkpoint_and_grows_it(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    first = tiny_options(data, tmp_path / "first", "qwen3_next", method="scratch", steps=40)
    run(first, show_progress=False)
    path = tmp_path / "larger.json"
    path.write_text(json.dumps({**read_config(first.model), **changes, "layer_types": None}))
    options = replace(first, out=tmp_path / "second", model=path, init=first.out / "model", steps=1, lr=1e-9)
    run(options, show_progress=False)
    small, grown = read_checkpoint(first.out / "model"), read_checkpoint(options.out / "model")
    assert all(grown.config[name] == value for name, value in changes.items())
    again = LevelMap(grown.config, small.config).coalesce(grown.parameters)
    for name, tensor in small.parameters.items():
        # What is wider has a tenth of fresh weights in it.
        loose = ".mlp.experts." in name and "moe_intermediate_size" in changes
        assert rms(again[name] - tensor) <= (0.3 if loose else 1e-5) * rms(tensor), name
    if changes is not DEEPER:
        untrained, before, after = (
            curve(out)[i]["held_out"] for out, i in ((first.out, 3), (first.out, -1), (options.out, -1))
        )
        assert after == pytest.approx(before, abs=0.3 * (untrained - before) if changes else 1e-4)


class Writer:
    """What TensorBoard's writer would have been given."""

    scalars: ClassVar[list[tuple[str, float, int]]] = []

    def __init__(self, folder: str) -> None:
        assert folder.endswith("tensorboard")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def close(self) -> None:
        """Nothing to do."""


def test_tensorboard_gets_what_the_log_has(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = tiny_options(data, tmp_path / "run", method="scratch", steps=4, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvbuffer\[tensorboard\]'"):
        run(options)
    stub = ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    run(options)
    for name in ("loss", "held_out", "lr"):
        logged = [(name, record[name], record["total"]) for record in curve(options.out) if name in record]
        assert [scalar for scalar in Writer.scalars if scalar[0] == name] == logged
        assert logged


def test_what_stands_in_the_way_is_named(data: Path, tmp_path: Path) -> None:
    run(tiny_options(data, tmp_path / "run", method="scratch", steps=1), show_progress=False)
    with pytest.raises(ConfigError, match=r"lr was 0\.01, is 0\.02"):
        run(tiny_options(data, tmp_path / "run", method="scratch", steps=1, lr=0.02), show_progress=False)
    with pytest.raises(ConfigError, match="is not empty"):
        run(tiny_options(data, tmp_path, method="scratch"), show_progress=False)
    broken = tiny_options(data, tmp_path / "broken", method="scratch")
    broken.model.write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ModelError, match="GPT2LMHeadModel"):
        run(broken, show_progress=False)
    with pytest.raises(KVBufferError, match="lower lr"):
        run(tiny_options(data, tmp_path / "inf", method="scratch", lr=1e30, optimizer="adamw"), show_progress=False)
