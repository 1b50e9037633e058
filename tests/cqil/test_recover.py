"""Self-distillation makes good what a plan costs; what it writes is served."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvbuffer.cache.disk.identity import checkpoint_id
from kvbuffer.cli import app
from kvbuffer.cqil.plan import CqilPlan
from kvbuffer.cqil.recover import PLAN_FILE, Recovered, recover
from kvbuffer.cqil.student import Student
from kvbuffer.cqil.text import TextModel
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.errors import ConfigError
from kvbuffer.models.adapter import WEIGHTS_FILE, Adapter, Factors
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.weights import WeightReader
from kvbuffer.train.checkpoints import read_checkpoint
from kvbuffer.train.config import TrainConfig
from kvbuffer.train.data import prepare
from kvbuffer.train.model import load
from kvbuffer.train.optim import descend
from tests.cqil.conftest import TYPES
from tests.support.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.support.rank_worker import generate
from tests.support.training import write_texts

GROUPS, BYPASS = ((0, 1, 2), (4, 5, 6, 7)), 1


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("name", "bypass"), [("dense", 0), ("dense", 2), ("sparse", 1)])
def test_the_student_computes_what_is_served(
    name: str, bypass: int, request: pytest.FixtureRequest, tmp_path: Path, rng: torch.Generator
) -> None:
    """Whatever it has learnt: with groups as the model with plan and adapter, without them as the model."""
    folder = request.getfixturevalue(name)
    token_ids = torch.randint(3, VOCAB_SIZE, (2, 70), generator=rng)
    student = Student(load(folder), GROUPS, bypass, rank=2)
    with torch.no_grad():
        for low_rank in student.adapters:
            low_rank.up.normal_(0, 0.03, generator=rng)
            low_rank.down.normal_(0, 0.1, generator=rng)
        grouped, alone = student.logits(token_ids).flatten(0, 1), student.teacher_logits(token_ids).flatten(0, 1)
    student.learned().save(tmp_path, "base")
    adapted, text = (
        TextModel(
            Decoder(folder, ModelConfig.from_folder(folder), torch.float32, 128, False, adapter=adapter), token_ids
        )
        for adapter in (Adapter.load(tmp_path), None)
    )
    # Random layers that follow each other blow up the differences of rounding.
    assert error(grouped, text.model.lm_head(adapted.hidden(GROUPS, bypass))) < 1e-2
    assert error(alone, text.model.lm_head(text.hidden())) < 1e-2
    assert error(grouped, alone) > 0.1
    assert error(grouped, text.model.lm_head(text.hidden(GROUPS, bypass))) > 0.05


def test_adapters_alone_learn_and_reach_every_projection(sparse: Path) -> None:
    student = Student(load(sparse), GROUPS, BYPASS, rank=2)
    student.logits(torch.randint(3, VOCAB_SIZE, (4, 40), generator=torch.Generator().manual_seed(1))).sum().backward()
    learning = [name for name, parameter in student.model.named_parameters() if parameter.grad is not None]
    assert all("parametrizations" in name for name in learning)
    # Four or five of a mixer; three of a SwiGLU layer; two of stacked experts and three of the shared one.
    assert len(student.adapters) == 4 * 3 + 4 * 4 + 2 * 3 + 6 * 5
    assert all(adapter.up.grad is not None and adapter.up.grad.any() for adapter in student.adapters)


@pytest.fixture(scope="module")
def mtp_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    return make_checkpoint(folder, "qwen3_5", num_hidden_layers=8, layer_types=TYPES, mtp=True)


def prepared(folder: Path, tokenizer: Path) -> Path:
    prepare(write_texts(folder / "texts"), folder / "data", vocab_size=300, held_out=0.2, tokenizer=tokenizer)
    return folder / "data"


@pytest.fixture(scope="module")
def data(mtp_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("data"), mtp_checkpoint)


def options_for(model: Path, data: Path, out: Path, **changes: Any) -> TrainConfig:
    settings = {"steps": 40, "batch_size": 4, "seq_len": 32, "optimizer": "adamw", "lr": 1e-2, "warmup": 2,
                "eval_sequences": 8, **changes}  # fmt: skip
    return TrainConfig(data=data, out=out, model=model, **settings)


@pytest.fixture(scope="module")
def adapter(mtp_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recovered]:
    """The same training as that of :func:`recovered`, kept as an adapter."""
    out = tmp_path_factory.mktemp("out") / "adapter"
    plan = CqilPlan(checkpoint_id(mtp_checkpoint), GROUPS, BYPASS)
    options = options_for(mtp_checkpoint, data, out)
    return out, recover(options, plan, rank=8, merge=False, show_progress=False)


@pytest.fixture(scope="module")
def recovered(mtp_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recovered]:
    out = tmp_path_factory.mktemp("out") / "new" / "model"
    plan = CqilPlan(checkpoint_id(mtp_checkpoint), GROUPS, BYPASS)
    return out, recover(options_for(mtp_checkpoint, data, out), plan, rank=8, show_progress=False)


def test_what_the_plan_costs_falls(recovered: tuple[Path, Recovered]) -> None:
    before, after = recovered[1]
    assert after.kl < 0.7 * before.kl
    assert after.agreement > before.agreement


def test_cut_off_it_goes_on_and_ends_the_same(
    adapter: tuple[Path, Recovered],
    mtp_checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = CqilPlan(checkpoint_id(mtp_checkpoint), GROUPS, BYPASS)
    options = options_for(mtp_checkpoint, data, tmp_path / "out", save_every=10)
    with monkeypatch.context() as patch:
        steps = iter(range(25))
        patch.setattr("kvbuffer.cqil.recover.descend", lambda *args: (next(steps), descend(*args))[1])
        with pytest.raises(StopIteration):
            recover(options, plan, rank=8, merge=False, show_progress=False)
    with pytest.raises(ConfigError, match="rank was 8, is 4"):
        recover(options, plan, rank=4, merge=False, show_progress=False)
    assert recover(options, plan, rank=8, merge=False, show_progress=False) == adapter[1]
    assert Adapter.load(tmp_path / "out").digest == Adapter.load(adapter[0]).digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_new_checkpoint_is_served_with_its_plan(
    recovered: tuple[Path, Recovered], mtp_checkpoint: Path, data: Path
) -> None:
    """The engine writes what transformers' model with the merged weights finds likeliest, computed in groups."""
    out, found = recovered
    plan = CqilPlan.load(out / PLAN_FILE)
    assert (plan.groups, plan.bypass) == (GROUPS, BYPASS)
    assert plan.measured["after"] == found.after._asdict()
    settings = {"dtype": "float32", "max_model_len": 128, "memory": 64 << 20, "show_progress": False}
    prompts = [list(range(3, 40)), [7, 9]]
    engine = Engine.from_config(EngineConfig(model=str(out), cqil=out / PLAN_FILE, **settings))
    student = Student(load(out), plan.groups, plan.bypass, rank=1)
    for prompt, output in zip(prompts, generate(engine, prompts, 12).tokens, strict=True):
        with torch.no_grad():
            logits = student.logits(torch.tensor([prompt + output[:-1]]))[0, len(prompt) - 1 :]
        best = logits.max(-1).values
        assert torch.all(best - logits[range(12), output] <= 1e-4 * best.abs())


def test_an_adapter_serves_what_the_merged_checkpoint_serves(
    adapter: tuple[Path, Recovered], recovered: tuple[Path, Recovered], mtp_checkpoint: Path
) -> None:
    """The weights are the same, bit for bit, and so are tokens, also with a head that the adapter does not touch."""
    assert adapter[1] == recovered[1]
    size = sum(file.stat().st_size for file in adapter[0].iterdir())
    assert size < 0.5 * (mtp_checkpoint / "model.safetensors").stat().st_size
    reader = WeightReader(mtp_checkpoint, torch.float32, (), False, Adapter.load(adapter[0]))
    for name, merged in read_checkpoint(recovered[0]).parameters.items():
        assert torch.equal(reader.take(name, *merged.shape), merged)
    reader.close()
    settings = {"dtype": "float32", "max_model_len": 128, "memory": 64 << 20, "show_progress": False}
    settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 2}
    tokens = []
    for model, folder in ((mtp_checkpoint, adapter[0]), (recovered[0], recovered[0])):
        engine = Engine.from_config(EngineConfig(model=str(model), cqil=folder / PLAN_FILE, **settings))
        tokens.append(generate(engine, [list(range(3, 40)), [7, 9]], 12).tokens)
    assert tokens[0] == tokens[1]


def test_caches_know_the_adapter(adapter: tuple[Path, Recovered]) -> None:
    plan = CqilPlan.load(adapter[0] / PLAN_FILE)
    assert plan.adapter is not None
    other = Adapter({"model.layers.0.mlp.up_proj": Factors(torch.ones(96, 1), torch.ones(1, 64))})
    variants = [plan, dataclasses.replace(plan, adapter=None), dataclasses.replace(plan, adapter=other)]
    assert len({variant.identity for variant in variants}) == 3


def test_plan_and_adapter_belong_together(adapter: tuple[Path, Recovered], tmp_path: Path) -> None:
    shutil.copytree(adapter[0], tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / PLAN_FILE).read_text())
    (tmp_path / PLAN_FILE).write_text(json.dumps({**content, "groups": [[1, 2]]}))
    with pytest.raises(ConfigError, match="is not that of the CQIL plan"):
        CqilPlan.load(tmp_path / PLAN_FILE)
    (tmp_path / PLAN_FILE).write_text(json.dumps(content))
    Adapter({"a": Factors(torch.ones(2, 1), torch.ones(1, 2))}).save(tmp_path, "another")
    with pytest.raises(ConfigError, match="is not that of the CQIL plan"):
        CqilPlan.load(tmp_path / PLAN_FILE)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(ConfigError, match="cannot read the adapter"):
        CqilPlan.load(tmp_path / PLAN_FILE)


def test_all_else_of_the_checkpoint_is_kept(recovered: tuple[Path, Recovered], mtp_checkpoint: Path) -> None:
    old, new = read_checkpoint(mtp_checkpoint), read_checkpoint(recovered[0])
    assert new.config == old.config
    assert new.parameters.keys() == old.parameters.keys()
    changed = {name for name in old.parameters if not torch.equal(old.parameters[name], new.parameters[name])}
    assert changed
    assert all("_proj" in name and not name.startswith("mtp.") for name in changed)


def test_weights_keep_their_dtype(data: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, "qwen3_5", torch.bfloat16, num_hidden_layers=8, layer_types=TYPES)
    plan = CqilPlan(checkpoint_id(model), GROUPS, BYPASS)
    recover(options_for(model, data, tmp_path / "out", steps=1), plan, rank=1, show_progress=False)
    dtypes = {tensor.dtype for tensor in read_checkpoint(tmp_path / "out").parameters.values()}
    assert dtypes == {torch.bfloat16}


def test_bad_input(mtp_checkpoint: Path, dense: Path, data: Path, tmp_path: Path) -> None:
    plan = CqilPlan(checkpoint_id(mtp_checkpoint), GROUPS, BYPASS)
    options = options_for(mtp_checkpoint, data, tmp_path / "out")
    cases = [
        (options, dataclasses.replace(plan, model=checkpoint_id(dense) + "0"), "another checkpoint"),
        (options, dataclasses.replace(plan, groups=((1,),)), "nothing to recover"),
        (dataclasses.replace(options, out=tmp_path), plan, "exists already"),
        (dataclasses.replace(options, data=tmp_path), plan, "holds no prepared data"),
    ]
    for given, of, message in cases:
        with pytest.raises(ConfigError, match=message):
            recover(given, of, rank=2, show_progress=False)


def test_data_of_another_tokenizer(mtp_checkpoint: Path, tmp_path: Path) -> None:
    prepare(write_texts(tmp_path / "texts"), tmp_path / "data", vocab_size=300, held_out=0.2)
    plan = CqilPlan(checkpoint_id(mtp_checkpoint), GROUPS, BYPASS)
    with pytest.raises(ConfigError, match=r"another tokenizer .* --tokenizer"):
        recover(options_for(mtp_checkpoint, tmp_path / "data", tmp_path / "out"), plan, 2, show_progress=False)


def test_the_command(mtp_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    CqilPlan(checkpoint_id(mtp_checkpoint), GROUPS, BYPASS).save(tmp_path / "plan.json")
    short = ["--steps", "1", "--batch-size", "2", "--seq-len", "16", "--rank", "1", "--eval-sequences", "2"]
    arguments = [mtp_checkpoint, data, tmp_path / "out", "--plan", tmp_path / "plan.json", *short]
    done = CliRunner().invoke(app, ["cqil", "recover", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert "KL from the model without the plan" in done.output
    assert json.loads((tmp_path / "out" / PLAN_FILE).read_text())["model"] == checkpoint_id(tmp_path / "out")
    arguments[2] = tmp_path / "adapter"
    done = CliRunner().invoke(app, ["cqil", "recover", *map(str, arguments), "--adapter"])
    assert f"kvbuffer serve {mtp_checkpoint} --cqil {tmp_path / 'adapter' / PLAN_FILE}" in " ".join(done.output.split())
    assert CqilPlan.load(tmp_path / "adapter" / PLAN_FILE).model == checkpoint_id(mtp_checkpoint)
