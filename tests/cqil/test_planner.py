"""Groups are chosen by cost within a budget that holds; the commands write what serve takes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvbuffer.cli import app
from kvbuffer.cqil.command import parse_groups
from kvbuffer.cqil.costs import costs_on_ranks
from kvbuffer.cqil.plan import CqilPlan
from kvbuffer.cqil.planner import candidates, cheapest, choose, measure_candidates, sequences
from kvbuffer.cqil.profile import profile_layers
from kvbuffer.cqil.text import Quality, TextModel
from kvbuffer.errors import ConfigError
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from tests.support.checkpoints import VOCAB_SIZE, make_checkpoint

#: Groups that save half of their layers' time.
SECONDS = {1: 1.0, 2: 1.0, 3: 1.5, 4: 2.0}


@pytest.fixture(scope="module")
def text(dense: Path) -> TextModel:
    model = Decoder(dense, ModelConfig.from_folder(dense), torch.float32, 64, show_progress=False)
    return TextModel(model, torch.randint(3, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1)))


def every_cut(layers: list[int]) -> list[list[tuple[int, ...]]]:
    cuts = []
    for borders in itertools.product([False, True], repeat=len(layers) - 1):
        ends = [i + 1 for i, border in enumerate(borders) if border] + [len(layers)]
        cuts.append([tuple(layers[a:b]) for a, b in zip([0, *ends], ends, strict=False)])
    return cuts


def test_the_cheapest_cut_is_that_of_trying_all(rng: torch.Generator) -> None:
    layers, seconds = [1, 2, 4, 5, 6, 8], {1: 1.0, 2: 1.7, 3: 2.2}
    kls = {group: float(torch.rand((), generator=rng)) for group in candidates(layers, 3)}
    qualities = {group: Quality(0.0, kl, 1.0, 0.0) for group, kl in kls.items()}
    for price in (0.0, 0.3, 1.0, 3.0):

        def cost(cut: list[tuple[int, ...]], price: float = price) -> float:
            return sum(seconds.get(len(group), 99.0) + price * kls.get(group, 0.0) for group in cut)

        chosen = cheapest(layers, seconds, qualities, price)
        alone = [(index,) for index in layers if not any(index in group for group in chosen)]
        assert cost([*chosen, *alone]) == pytest.approx(min(map(cost, every_cut(layers))))


def test_outer_layers_stay_alone(dense: Path) -> None:
    config = ModelConfig.from_folder(dense)
    assert sequences(config) == [[3], [4, 5, 6]]
    assert sequences(config, everywhere=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_budget_holds_and_more_of_it_buys_speed(text: TextModel) -> None:
    layers = sequences(text.model.config, everywhere=True)
    qualities = measure_candidates(text, layers, 4, 1, lambda _: None)
    fastest = choose(text, layers, [SECONDS, SECONDS], qualities, 1, lambda _: True)
    assert fastest.seconds == 4.0
    before = 8.0
    for budget in (0.0, fastest.quality.kl / 4, fastest.quality.kl / 2, 1e9):
        choice = choose(text, layers, [SECONDS, SECONDS], qualities, 1, lambda q, most=budget: q.kl <= most)
        assert choice.quality == text.quality(choice.groups, 1)
        assert choice.quality.kl <= budget
        assert choice.seconds <= before
        before = choice.seconds
    assert before == 4.0


def test_a_model_of_one_type_of_layers(tmp_path: Path, words: Path) -> None:
    types = ["full_attention"] * 6
    folder = make_checkpoint(tmp_path, "qwen3_5", num_hidden_layers=6, layer_types=types)
    options = ["--text", str(words), "--tokens", "64", "--window", "32", "--rounds", "2", "--budget", "1e9"]
    arguments = ["cqil", "plan", str(folder), *options, "--out", str(tmp_path / "plan.json")]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    plan = CqilPlan.load(tmp_path / "plan.json")
    plan.check(folder, ModelConfig.from_folder(folder))
    assert "linear" not in result.output


def test_no_groups_is_the_model_itself(text: TextModel) -> None:
    quality = text.quality(())
    assert quality.kl == 0.0
    assert quality.agreement == 1.0


def test_profile(text: TextModel) -> None:
    """Of the first layer, computed by hand; and all layers are there."""
    profiles, streams = profile_layers(text), {}
    text.hidden(observe=lambda index, x: streams.__setitem__(index, x.clone()))
    assert [profile.layer for profile in profiles] == list(range(8))
    assert [profile.kind for profile in profiles] == list(text.model.config.layer_types)
    before, after = streams[0].double(), streams[1].double()
    dots = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
    assert profiles[0].cosine == pytest.approx(float(dots.mean()), abs=1e-5)
    assert profiles[0].delta == pytest.approx(float(((after - before).norm(dim=1) / before.norm(dim=1)).mean()), 1e-4)


def test_costs_on_ranks() -> None:
    """A layer by itself is split and summed twice, so is a group of three on two ranks; a group of two is placed."""
    alone = [{1: 2.0, 2: 3.9, 3: 5.8}, {}]
    assert costs_on_ranks(alone, 2, 0.25, 0) == [{1: 1.5, 2: 2.25, 3: pytest.approx(3.4)}, {}]
    assert costs_on_ranks(alone, 2, 0.25, 1)[0][2] == 2.5


def test_groups_on_the_command_line() -> None:
    assert parse_groups("4-7,8+10+11") == ((4, 5, 6, 7), (8, 10, 11))
    for wrong in ("4-", "a", "1-2-3", "4,,5", "4 5"):
        with pytest.raises(ConfigError, match="is not a group of layers"):
            parse_groups(wrong)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the state of the buffer is a value of the key " * 30)
    return path


def test_commands(dense: Path, words: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        sizes = ("--tokens", 64, "--window", 32, "--max-group", 2)
        result = CliRunner().invoke(app, ["cqil", *map(str, (*arguments, *sizes))], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    output = run("profile", dense, "--text", words, "--out", tmp_path / "profile.json")
    assert "linear_attention" in output
    written = json.loads((tmp_path / "profile.json").read_text())
    assert len(written["layers"]) == 8
    assert [group["layers"] for group in written["groups"]] == [[i, i + 1] for i in (0, 1, 2, 4, 5, 6)]

    run("plan", dense, "--text", words, "--budget", 1e9, "--ranks", 2, "--rounds", 2, "--out", tmp_path / "plan.json")
    plan = CqilPlan.load(tmp_path / "plan.json")
    plan.check(dense, ModelConfig.from_folder(dense))
    assert plan.groups in (((4, 5),), ((5, 6),))
    assert plan.bypass == 0  # with one, ranks would exchange more
    assert plan.measured["layers_ms"] < plan.measured["layers_ms_without"]

    run(
        "plan", dense, "--text", words, "--max-perplexity-increase", 0, "--rounds", 2, "--out", tmp_path / "strict.json"
    )
    strict = CqilPlan.load(tmp_path / "strict.json")
    assert strict.measured["loss"] <= strict.measured["loss_without"]
    assert strict.measured["max_perplexity_increase"] == 0

    run("plan", dense, "--groups", "0-2,4+6", "--out", tmp_path / "given.json")
    assert CqilPlan.load(tmp_path / "given.json").groups == ((0, 1, 2), (4, 6))


def test_errors_name_what_is_missing(dense: Path, words: Path, tmp_path: Path) -> None:
    plan = ["cqil", "plan", str(dense), "--out", str(tmp_path / "plan.json")]
    with pytest.raises(ConfigError, match="--text is needed"):
        CliRunner().invoke(app, plan, catch_exceptions=False)
    both = ["--text", str(words), "--budget", "0.1", "--max-perplexity-increase", "0.1"]
    with pytest.raises(ConfigError, match="give one of them"):
        CliRunner().invoke(app, [*plan, *both], catch_exceptions=False)
    with pytest.raises(ConfigError, match="fewer than a window of 9999"):
        CliRunner().invoke(app, [*plan, "--text", str(words), "--window", "9999"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="cannot read the text"):
        CliRunner().invoke(app, [*plan, "--text", str(tmp_path / "none")], catch_exceptions=False)
