"""Every method's stages: what each starts from, and that all cost the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbuffer.errors import ConfigError
from kvbuffer.train.config import TrainConfig
from kvbuffer.train.defaults import METHODS
from kvbuffer.train.plan import FRESH_ALPHA, Stage, Start, make_plan
from tests.support.training import config_of

STEPS = 1000


def flops(config: dict[str, Any]) -> int:
    return int(config["hidden_size"] ** 2 * config["num_hidden_layers"])


def plan_of(method: str, model: dict[str, Any] | None = None, **changes: Any) -> list[Stage]:
    folder = Path("unused")
    options = TrainConfig(folder, folder, folder, **{"method": method, "steps": STEPS, "decay": 0.2, **changes})
    return make_plan(options, model or config_of("llama", num_hidden_layers=4), flops)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1.0, 0.8])
def test_every_method_costs_the_same(method: str, budget: float) -> None:
    model = config_of("llama", num_hidden_layers=4)
    stages = plan_of(method, model, budget=budget)
    spent = sum(stage.steps * stage.step_flops for stage in stages)
    assert abs(spent - budget * STEPS * flops(model)) <= flops(model)
    assert stages[-1].config == model
    assert [stage.decay for stage in stages] == [0.0] * (len(stages) - 1) + [0.2]
    assert [Stage.from_json(stage.as_json()) for stage in stages] == stages


def test_a_v_cycle_of_three_levels() -> None:
    stages = plan_of("v-cycle-3", alpha=0.3, optimizer_state="keep", rewarm=7, warmup=9, small_decay=0.1)
    assert [stage.config["hidden_size"] for stage in stages] == [64, 32, 16, 32, 64]
    assert [stage.config["num_hidden_layers"] for stage in stages] == [4, 2, 1, 2, 4]
    assert [stage.steps for stage in stages[:-1]] == [100, 100, 500, 500]
    assert [stage.start for stage in stages] == [
        Start(),
        Start(coalesce=0),
        Start(coalesce=1),
        Start(grow=2, large=1, alpha=0.3),
        Start(grow=3, large=0, alpha=0.3),
    ]
    assert [stage.moments for stage in stages] == [None, None, None, 1, 0]
    assert [stage.warmup for stage in stages] == [9, 7, 7, 7, 7]
    assert [stage.decay for stage in stages] == [0.0, 0.0, 0.1, 0.1, 0.2]


def test_depth_is_halved_in_blocks_as_long_as_there_are_any() -> None:
    stages = plan_of("v-cycle-3", config_of("qwen3_5", hidden_size=128, linear_num_key_heads=4))
    assert [stage.config["num_hidden_layers"] for stage in stages] == [8, 4, 4, 4, 8]


def test_controls() -> None:
    small, grown = plan_of("stack")
    assert (small.config["hidden_size"], small.config["num_hidden_layers"], small.steps) == (64, 2, 500)
    assert grown.start == Start(grow=0, pairing="stacked")
    third, _ = plan_of("stack", config_of("llama", num_hidden_layers=9))
    assert third.config["num_hidden_layers"] == 3
    one_block, late = plan_of("late-expansion", config_of("qwen3_5"))
    assert one_block.config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert (one_block.steps, late.steps) == (1600, 200)
    first, second = plan_of("small-first")
    assert first.start == Start()
    assert second.start == Start(grow=0, alpha=FRESH_ALPHA)


def test_stages_that_leave_nothing_for_the_last_are_refused() -> None:
    with pytest.raises(ConfigError, match="lower first_share or small_share"):
        plan_of("v-cycle", first_share=1.0)
