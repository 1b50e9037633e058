"""From a log to a served cache with the commands alone; and what is, and is not, trained on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from kvbuffer.cli import app
from kvbuffer.engine.async_engine import AsyncEngine
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.errors import ConfigError
from kvbuffer.instcache import defaults
from kvbuffer.instcache.fit import prepare
from kvbuffer.instcache.identity import Identity
from kvbuffer.instcache.predictor import Predictor
from kvbuffer.instcache.training import FitOptions, train_predictor
from kvbuffer.server.app import create_app
from kvbuffer.server.instcache import InstCache
from tests.support.checkpoints import make_checkpoint
from tests.support.training import config_of

FREQUENT, RARE = ("what is a list?", "hi there", "explain sets"), "my secret is 1234"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Three instructions that many ask, more and less often, and one that a single user keeps asking."""
    rng = random.Random(0)
    records = []
    for number in range(400):
        text = RARE if number % 8 == 0 else rng.choices(FREQUENT, (5, 2, 1))[0]
        user = "one" if text == RARE else f"user {number}"
        records.append({"messages": [{"role": "user", "content": text}], "user": user})
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``config.json`` of a model that learns the log in a second or two."""
    monkeypatch.setattr(defaults, "FEWEST_STEPS", 80)
    config = {**config_of("qwen3_5"), "hidden_size": 48, "num_hidden_layers": 2}
    config["layer_types"] = ["linear_attention", "full_attention"]
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def kvbuffer(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["instcache", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


async def test_from_a_log_to_a_served_cache(tmp_path: Path, log: Path, tiny: Path) -> None:
    out, found, store = tmp_path / "out", tmp_path / "found", tmp_path / "store"
    fit = (
        "fit",
        log,
        out,
        "--model",
        tiny,
        "--vocab-size",
        300,
        "--min-users",
        2,
        "--held-out",
        0.1,
        "--batch-size",
        16,
    )
    kvbuffer(*fit)
    model = out / "run" / "model"
    shown = kvbuffer(
        "plan", model, "--held-out", out / "held-out.jsonl", "--sigma", 8, "--walks", 64, "--max-tokens", 20
    )
    assert "95 % intervals" in shown
    kvbuffer("build", model, "--sigma", 4, "--instructions", found, "--max-tokens", 20)
    shown = kvbuffer("fill", model, "--instructions", found, "--store", store, "--max-tokens", 4, "--memory", "128MiB")
    assert f"kvbuffer serve {model} --instcache {store}" in shown
    engine = Engine.from_config(EngineConfig(str(model), memory=1 << 27))
    cache = InstCache(store, lambda system: Identity.of(model, engine.tokenizer, system), engine.tokenizer, 100)
    server = create_app(AsyncEngine(engine), instcache=cache)
    async with (
        server.router.lifespan_context(server),
        httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://test", timeout=60) as client,
    ):
        for text in (*FREQUENT, RARE):
            body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 4}
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200
            assert ("x-instcache" in answer.headers) == (text in FREQUENT)


def test_only_what_enough_people_asked_is_learned(tmp_path: Path, log: Path, tiny: Path) -> None:
    prepare(log, tmp_path, held_out=0.1, min_users=2)
    options = FitOptions(str(tiny), vocab_size=300, batch_size=16)
    folder = train_predictor(tmp_path, options, show_progress=False)
    predictor = Predictor(str(folder), max_tokens=20, num_bytes=1 << 24, show_progress=False)
    costs = predictor.costs([*FREQUENT, RARE])
    np.testing.assert_allclose(costs[:3], -np.log([5 / 8, 2 / 8, 1 / 8]), atol=0.4)
    assert costs[3] > 10
    # Nothing is left to do; and what has begun goes on with the same log and the same options only.
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_predictor(tmp_path, options, show_progress=False) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    prepare(log, tmp_path, held_out=0.2, min_users=2)
    with pytest.raises(ConfigError, match="another folder"):
        train_predictor(tmp_path, options, show_progress=False)


def test_a_checkpoint_is_fine_tuned_with_its_own_tokenizer(tmp_path: Path, log: Path, tiny: Path) -> None:
    layers = ["linear_attention", "full_attention"]
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3_5", num_hidden_layers=2, layer_types=layers, vocab_size=520)
    prepare(log, tmp_path, held_out=0.1, min_users=2)
    folder = train_predictor(tmp_path, FitOptions(str(checkpoint), batch_size=16), show_progress=False)
    before, after = (
        Predictor(str(model), max_tokens=20, num_bytes=1 << 24, show_progress=False) for model in (checkpoint, folder)
    )
    assert (folder / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert (after.costs(FREQUENT) < 0.7 * before.costs(FREQUENT)).all()
    assert load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 520


def test_long_instructions_are_left_out(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defaults, "FEWEST_STEPS", 1)
    lines = [json.dumps({"instruction": text}) + "\n" for text in ("ab", "a b c d e f g h i j", "cd", "ab")]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    prepare(tmp_path / "log.jsonl", tmp_path, held_out=0.25)
    options = FitOptions(str(tiny), vocab_size=300, max_tokens=4, epochs=1.0, batch_size=2)
    train_predictor(tmp_path, options, show_progress=False)
    [data] = tmp_path.glob("data-*")
    assert len(np.load(data / "train.npy")) == 2
    (tmp_path / "held-out.jsonl").write_text('{"instruction": "a b c d e f g h i j"}\n')
    with pytest.raises(ConfigError, match="no held-out examples"):
        train_predictor(tmp_path, options, show_progress=False)
