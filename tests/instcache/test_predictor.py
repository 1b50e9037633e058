"""From a checkpoint with its tokenizer to a file of instructions, through crashes; and the plan made before."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvbuffer.errors import ConfigError, ModelError, StoreError
from kvbuffer.instcache import predictor as predictor_module
from kvbuffer.instcache.identity import normalise
from kvbuffer.instcache.instructions import InstructionFile, SearchState
from kvbuffer.instcache.plan import Interval, Row, Walks, choose, hit_rate, plan
from kvbuffer.instcache.predictor import Predictor
from kvbuffer.instcache.report import show, write_json, write_svg
from kvbuffer.instcache.turn import UserTurn
from kvbuffer.tokenizer import Tokenizer
from tests.support.checkpoints import make_checkpoint

MEMORY = 16 << 20
#: Some ten instructions, some two thousand nodes.
SIGMA = 11.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = ["linear_attention", "full_attention"]
    path = make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_5", num_hidden_layers=2, layer_types=layers)
    file = path / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] *= 0.3  # a flatter distribution, in which some instructions are not too unlikely
    save_file(weights, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor(str(folder), max_tokens=2, num_bytes=MEMORY, show_progress=False)


@pytest.fixture(scope="module")
def every(predictor: Predictor) -> dict[str, float]:
    """What every instruction of one token, and many of two, cost."""
    tokens = [token for token, allowed in enumerate(predictor.allowed) if allowed]
    pairs = itertools.islice(itertools.product(tokens, tokens), 0, None, 97)
    texts = {text for ids in [*((token,) for token in tokens), *pairs] if (text := predictor.turn.text(ids))}
    ordered = sorted(texts)
    return dict(zip(ordered, predictor.costs(ordered).tolist(), strict=True))


def built(predictor: Predictor, path: Path, sigma: float) -> dict[str, float]:
    count = predictor.build(path, sigma)
    file = InstructionFile(path)
    found = dict(file)
    assert count == len(found) == file.state.num_found
    assert file.state.complete
    file.close()
    return found


def test_an_instruction_is_found_if_and_only_if_it_costs_no_more(
    tmp_path: Path, predictor: Predictor, every: dict[str, float]
) -> None:
    for sigma in sorted(every.values())[3:30:13]:  # on the boundary itself
        found = built(predictor, tmp_path / f"{sigma}", sigma)
        assert {text for text, cost in every.items() if cost <= sigma} <= found.keys()
        texts = list(found)
        assert predictor.costs(texts).tolist() == list(found.values())
        assert all(cost <= sigma for cost in found.values())
        assert all(normalise(text) == text for text in texts)


def test_what_is_sampled_is_found(tmp_path: Path, predictor: Predictor) -> None:
    """10,000 instructions drawn from the model: none within sigma is missing."""
    sigma = 12.0
    found = built(predictor, tmp_path / "i", sigma)
    texts = [text for ids in sampled(predictor, 10_000) if (text := predictor.turn.text(ids)) is not None]
    costs = predictor.costs(texts)
    within = {text for text, cost in zip(texts, costs, strict=True) if cost <= sigma}
    assert within
    assert within <= found.keys()


def sampled(predictor: Predictor, count: int) -> set[tuple[int, ...]]:
    """Draw instructions token by token; those that do not end in time are left out."""
    rng, end = np.random.default_rng(0), predictor.turn.end
    drawn: list[tuple[int, ...]] = [()] * count
    following = {(): predictor.tree.root_costs}
    done = set()
    for _ in range(predictor.tree.max_tokens + 1):
        longer = []
        for text, costs in following.items():
            shares = np.exp(-costs.astype(np.float64))
            tokens = rng.choice(len(shares), drawn.count(text), p=shares / shares.sum()).tolist()
            done |= {text for token in tokens if token == end}
            longer += [(*text, token) for token in tokens if predictor.allowed[token]]
        drawn, unique = longer, sorted(set(longer))
        if not unique or len(unique[0]) > predictor.tree.max_tokens:
            break
        following = {}
        for begin in range(0, len(unique), 400):
            part = unique[begin : begin + 400]
            for numbers, _, costs in predictor.tree.walk(part):
                following |= {part[i]: row for i, row in zip(numbers, costs, strict=True)}
            predictor.tree.reset()
    return done


def test_two_tokenisations_of_one_text_count_once(predictor: Predictor) -> None:
    turn = predictor.turn
    ids = turn.encode("the state of")
    assert ids is not None
    assert turn.text(ids) == "the state of"
    spelt = [token for letter in "the state of" for token in turn.encode(f"x{letter}x")[1:-1]]  # type: ignore[index]
    assert turn._tokenizer.decode(spelt) == "the state of"
    assert turn.text(spelt) is None
    for text in (" the", "the ", "a\r\nb", "<|im_end|>", "a<|im_start|>b"):
        assert predictor.costs([text]) == [np.inf]


def test_templates_whose_turns_cannot_be_told_apart_are_refused(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    with pytest.raises(ModelError, match="between special tokens"):
        UserTurn(tokenizer, "User: {{ messages[0].content }}. Assistant:")
    with pytest.raises(ModelError, match="rewrites user messages"):
        UserTurn(tokenizer, "<|im_start|>{{ messages[0].content | upper }}<|im_end|>")


class Killed(Exception):
    pass


def test_a_build_goes_on_after_a_crash_and_finds_everything_once(
    tmp_path: Path, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor_module, "_SAVE_INTERVAL_S", 0.0)
    expected = built(predictor, tmp_path / "whole", SIGMA)
    crashes = []

    def crash(done: int, total: int | None) -> None:
        if len(crashes) < 3 and done > 2 * len(crashes):
            crashes.append(done)
            raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            predictor.build(tmp_path / "i", SIGMA, crash)
    assert built(predictor, tmp_path / "i", SIGMA) == expected
    evaluated = predictor.tree.num_evaluated
    assert built(predictor, tmp_path / "i", SIGMA) == expected
    assert predictor.tree.num_evaluated == evaluated, "it was complete"


def test_a_build_survives_kill_9(tmp_path: Path, folder: Path, predictor: Predictor) -> None:
    program = f"""
import kvbuffer.instcache.predictor as p, kvbuffer.instcache.search as s, pathlib, time, torch
torch.set_num_threads(1)
p._SAVE_INTERVAL_S, s.MAX_BATCH = 0.0, 64
slowly = lambda done, total: time.sleep(0.2)
p.Predictor({str(folder)!r}, None, 2, {MEMORY}, False).build(pathlib.Path({str(tmp_path / "i")!r}), {SIGMA}, slowly)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "i").exists() or (tmp_path / "i").stat().st_size < 40_000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    file = InstructionFile(tmp_path / "i")
    assert not file.state.complete
    file.close()
    assert built(predictor, tmp_path / "i", SIGMA) == built(predictor, tmp_path / "whole", SIGMA)


def test_a_file_is_of_one_search(tmp_path: Path, predictor: Predictor) -> None:
    predictor.build(tmp_path / "i", 4.0)
    with pytest.raises(StoreError, match=r"search with sigma 4\.0, not 5\.0"):
        predictor.build(tmp_path / "i", 5.0)
    with pytest.raises(StoreError, match="search with predictor"):
        InstructionFile(tmp_path / "i", SearchState("other", 4.0, 2))
    (tmp_path / "text").write_bytes(b"something else " * 1000)
    with pytest.raises(StoreError, match="not a file of instructions"):
        InstructionFile(tmp_path / "text")
    with pytest.raises(StoreError, match="no instructions"):
        InstructionFile(tmp_path / "missing")
    with pytest.raises(ConfigError, match="sigma must be"):
        predictor.build(tmp_path / "j", float("nan"))


def test_the_number_of_instructions_is_estimated(tmp_path: Path, predictor: Predictor) -> None:
    walks = Walks(predictor, 12.0, num_walks=3000)
    for sigma in (11.2, 12.0):
        before = predictor.tree.num_evaluated
        count = len(built(predictor, tmp_path / f"{sigma}", sigma))
        nodes = predictor.tree.num_evaluated - before
        for estimate, truth in ((walks.entries(sigma), count), (walks.nodes(sigma), nodes)):
            assert estimate.low < estimate.value < estimate.high
            assert estimate.value == pytest.approx(truth, rel=0.35)
            # Twice the interval's width: 95 % of intervals hold the truth, all of these do.
            spread = estimate.high - estimate.low
            assert estimate.low - spread / 2 < truth < estimate.high + spread / 2
        assert count <= np.exp(sigma)


def test_the_hit_rate_is_predicted(tmp_path: Path, predictor: Predictor, every: dict[str, float]) -> None:
    """Of held-out instructions, just the share that was predicted is found."""
    rng = torch.Generator().manual_seed(3)
    texts = sorted(every, key=lambda text: every[text])[:60]
    asked = [texts[i] for i in torch.randint(len(texts), (400,), generator=rng).tolist()]
    costs = predictor.costs(asked)
    for sigma in (10.5, 11.0, 11.3, 11.6, 11.9):
        found = built(predictor, tmp_path / f"{sigma}", sigma)
        predicted = hit_rate(costs, sigma)
        assert predicted.value == sum(text in found for text in asked) / len(asked)
        assert predicted.low <= predicted.value <= predicted.high


def test_a_plan_is_chosen_by_its_budget_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = Interval(0.5, 0.4, 0.6)
    rows = [
        Row(sigma, half, Interval(10**sigma, 0.5 * 10**sigma, 2 * 10**sigma), 100.0 * 10**sigma, 10.0**sigma)
        for sigma in (1.0, 2.0, 3.0)
    ]
    assert choose(rows) is rows[2]
    assert choose(rows, max_bytes=20_000) is rows[1]
    assert choose(rows, max_bytes=19_999) is rows[0]
    assert choose(rows, max_seconds=100) is rows[0]
    assert choose(rows, max_seconds=1) is None
    show(rows)
    assert "50.0%" in capsys.readouterr().out
    write_json(rows, tmp_path / "plan.json")
    write_svg(rows, tmp_path / "plan.svg")
    assert "1,000" in (tmp_path / "plan.svg").read_text()


def test_rows_of_a_plan(predictor: Predictor) -> None:
    row, wider = plan(
        Walks(predictor, 11.8, 200), np.array([1.0, 11.5, np.inf]), [11.0, 11.8], 100, seconds_per_entry=2.0
    )
    assert (row.hit_rate.value, wider.hit_rate.value) == (1 / 3, 2 / 3)
    assert wider.num_bytes == 100 * wider.entries.value > row.num_bytes
    assert wider.seconds > 2.0 * wider.entries.value
