"""Two processes compute what one does: layers split between them, groups placed on them, or both; and end together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbuffer.cache.disk.identity import checkpoint_id
from kvbuffer.cqil.plan import CqilPlan
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.ranks import ProcessRanks
from kvbuffer.errors import ConfigError
from kvbuffer.models.adapter import Adapter, Factors
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.parallel import ShardedReader, shard_config
from tests.cqil.test_serving import prompts_of
from tests.support import rank_worker
from tests.support.checkpoints import make_checkpoint
from tests.support.processes import run_processes

ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_batched_tokens": 64, "memory": 64 << 20, "buffer_len": 4,
          "kv_only_len": 24, "show_progress": False}  # fmt: skip
LENGTHS = (1, 9, 70, 130)
TOKENS = 10
TIMEOUT_S = 300


def task_for(folder: Path, tmp_path: Path, cqil: Path | None = None, **changes: Any) -> Path:
    """The worker's task for two ranks; it writes to out.json."""
    task = {
        "engine": {**ENGINE, "model": str(folder), "tensor_parallel_size": 2},
        "cqil": None if cqil is None else str(cqil),
        "prompts": prompts_of(LENGTHS),
        "max_tokens": TOKENS,
        "out": str(tmp_path / "out.json"),
        "dies": None,
        **changes,
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    return tmp_path / "task.json"


def run_rank(rank: int, task: Path, port: int) -> None:
    environment = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    rank_worker.run(task)


def fork(task: Path) -> tuple[int | None, ...]:
    """Run two ranks as copies of this process, which is faster than torchrun; return how they ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return run_processes(2, run_rank, task, port, timeout_s=TIMEOUT_S)


def plan_file(folder: Path, tmp_path: Path, groups: tuple[tuple[int, ...], ...], bypass: int) -> Path | None:
    """Return a plan with an adapter for a layer of either type; None for no groups."""
    if not groups:
        return None
    shapes = {"model.layers.1.linear_attn.out_proj": (64, 128), "model.layers.5.self_attn.q_proj": (256, 64)}
    adapter = Adapter({name: Factors(torch.ones(of[0], 1), torch.rand(1, of[1]) / 9) for name, of in shapes.items()})
    adapter.save(tmp_path, str(folder))
    CqilPlan(checkpoint_id(folder), groups, bypass, adapter=adapter).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def check(folder: Path, tmp_path: Path, path: Path | None) -> None:
    """What rank 0 wrote is what one process writes, and each rank had half of the memory."""
    engine = Engine.from_config(EngineConfig(model=str(folder), cqil=path, **ENGINE))
    alone = rank_worker.generate(engine, prompts_of(LENGTHS), TOKENS).tokens
    found = json.loads((tmp_path / "out.json").read_text())
    assert [run["tokens"] for run in found["runs"]] == [alone, alone]
    assert found["slot_bytes"] * 2 == engine.plan.block_bytes.slot


@pytest.mark.parametrize(
    ("name", "groups", "bypass"),
    [
        ("sparse", (), 0),
        ("dense", ((0, 1), (2, 3), (4, 5, 6, 7)), 0),
        ("sparse", ((0, 1, 2, 3), (5, 6)), 2),
        ("sparse", ((1, 2), (4, 5, 6)), 1),
    ],
    ids=["split", "placed", "placed with a bypass", "placed and split with a bypass"],
)
def test_two_ranks_write_what_one_writes(
    name: str, groups: tuple[tuple[int, ...], ...], bypass: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    path = plan_file(folder, tmp_path, groups, bypass)
    assert fork(task_for(folder, tmp_path, path)) == (0, 0)
    check(folder, tmp_path, path)


@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model"])
def test_drafts_are_verified_on_all_ranks(method: str, dense: Path, tmp_path: Path) -> None:
    """Rank 0 drafts, with a model of its own if need be; with drafts, too, two ranks write what one writes without."""
    speculation: dict[str, Any] = {"method": method, "num_speculative_tokens": 3, "adaptive": False}
    speculation |= {"ngram": {"prompt_lookup_min": 1}, "draft_model": {"model": str(dense)}}.get(method, {})
    path = plan_file(dense, tmp_path, ((0, 1), (4, 5, 6, 7)), 1)
    options = {**ENGINE, "model": str(dense), "tensor_parallel_size": 2, "speculative_config": speculation}
    assert fork(task_for(dense, tmp_path, path, engine=options)) == (0, 0)
    check(dense, tmp_path, path)
    first, second = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert first["drafted"] > first["accepted"]
    # What comes next in random tokens is no earlier one; but the second time it is what came the first time.
    assert second["accepted"] > 0 or method == "ngram"


def test_torchrun(dense: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, rank_worker.__file__, str(task_for(dense, tmp_path))], capture_output=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    check(dense, tmp_path, None)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_dies_the_other_ends_with_an_error(
    dense: Path, tmp_path: Path, rank: int, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = fork(task_for(dense, tmp_path, dies=rank))
    assert codes[rank] == rank_worker.DEATH
    assert codes[1 - rank] == 1
    assert "another process of this model has ended or does not answer" in capfd.readouterr().err


def test_parts_of_tensors_make_the_whole(sparse: Path, tmp_path: Path) -> None:
    """Rows of several kinds are cut kind by kind: the parts of both layouts, put together, have every row once."""
    for folder in (sparse, make_checkpoint(tmp_path, "qwen3_5_moe")):
        config = ModelConfig.from_folder(folder)
        whole, prefix = shard_config(config, 1), "model.layers.0.linear_attn."
        parts = []
        for rank in range(2):
            ranks = type("Two", (), {"rank": rank, "size": 2})()
            reader = ShardedReader(folder, torch.float32, (), False, None, config, ranks)
            conv = reader.take_float(f"{prefix}conv1d.weight", config.linear.conv_dim // 2, 1, 4)
            parts.append(conv.split(shard_config(config, 2).linear.conv_parts))
            with reader.whole():
                expected = reader.take_float(f"{prefix}conv1d.weight", whole.linear.conv_dim, 1, 4)
            reader.close()
        assert torch.equal(torch.cat([torch.cat(kind) for kind in zip(*parts, strict=True)]), expected)


def test_what_cannot_be_divided_is_named(dense: Path) -> None:
    config = ModelConfig.from_folder(dense)
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 3 .* num_attention_heads \(4\)"):
        shard_config(config, 3)
    assert shard_config(config, 2).num_kv_heads == config.num_kv_heads // 2


def test_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        ProcessRanks(2)


@pytest.mark.parametrize(
    "option", [{"cache_dir": Path("cache")}, {"speculative_config": '{"method": "mtp", "num_speculative_tokens": 2}'}]
)
def test_options_for_one_process_only(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="works in one process only"):
        EngineConfig(model="demo", tensor_parallel_size=2, **option)
