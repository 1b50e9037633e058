"""Plans are checked against the model, and what they do to caches has a name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvbuffer.cache.disk.identity import checkpoint_id
from kvbuffer.cqil.plan import CqilPlan
from kvbuffer.errors import ConfigError
from kvbuffer.models.config import ModelConfig


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (((1, 2), (2, 3)), r"layers \[2\] are in more than one group"),
        (((3, 2),), r"group \[3, 2\] .* must ascend"),
        (((2, 2),), r"group \[2, 2\] .* must ascend"),
        (((3, 4),), r"group \[3, 4\] .* mixes full_attention and linear_attention"),
        (((6, 8),), r"names layers \[8\]; the model has 0 to 7"),
        (((-1, 2),), r"names layers \[-1\]"),
        (((),), "is empty"),
    ],
)
def test_groups_that_make_no_sense(dense: Path, groups: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CqilPlan(checkpoint_id(dense), groups).check(dense, ModelConfig.from_folder(dense))


def test_bypass_is_a_distance(dense: Path) -> None:
    with pytest.raises(ConfigError, match=r"bypass .* at least 0, got -1"):
        CqilPlan(checkpoint_id(dense), ((0, 1),), -1).check(dense, ModelConfig.from_folder(dense))


def test_another_model(dense: Path, sparse: Path) -> None:
    plan = CqilPlan(checkpoint_id(sparse), ((0, 1),))
    plan.check(sparse, ModelConfig.from_folder(sparse))
    with pytest.raises(ConfigError, match="made for another checkpoint"):
        plan.check(dense, ModelConfig.from_folder(dense))


def test_a_file_and_back(tmp_path: Path) -> None:
    plan = CqilPlan("abc", ((1, 2), (5, 7)), 1, {"kl": 0.01})
    plan.save(tmp_path / "plan.json")
    assert CqilPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "is not a CQIL plan"),
        ({"groups": []}, "must hold model and groups"),
        ({"model": "a", "groups": [], "layers": 3}, "is not a CQIL plan"),
        ({"model": "a", "groups": [[1, "2"]]}, "lists of layer numbers"),
        ({"model": "a", "groups": [[1, True]]}, "lists of layer numbers"),
        ({"model": "a", "groups": [[1, 2]], "bypass": "far"}, "must be an integer, got 'far'"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        CqilPlan.load(path)


def test_no_file_or_no_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        CqilPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        CqilPlan.load(tmp_path / "plan.json")


def test_identity_is_that_of_what_is_computed() -> None:
    plain = CqilPlan("a", ((1, 2), (4, 5, 6)), 1)
    assert plain.identity == CqilPlan("a", ((4, 5, 6), (0,), (1, 2)), 1, {"kl": 1.0}).identity
    assert CqilPlan("a", ((1, 2), (4, 5, 6)), 2).identity == CqilPlan("a", ((1, 2), (4, 5, 6)), 9).identity
    others = [CqilPlan("a", ((1, 2), (4, 5, 6)), 2), CqilPlan("a", ((1, 2), (5, 6)), 1), CqilPlan("a", ((1,),))]
    assert len({plan.identity for plan in [plain, *others]}) == 4
    assert others[-1].identity == ""
