"""Ways to train a model, each as a sequence of stages.

Every method gets the same FLOPs: what the earlier stages spend is taken from the last one's steps.

| method | stages |
|---|---|
| ``scratch`` | the model itself |
| ``v-cycle`` | large for E_a, coalesced, small for E_small, grown and interpolated with the large (arXiv 2404.07999) |
| ``v-cycle-3`` | the same with a third model, half the small one |
| ``stack`` | half the layers (or less, if blocks cannot be halved) for E_small, stacked (G_stack, arXiv 2405.15319) |
| ``late-expansion`` | one block of layers for most of the FLOPs, stacked (as in arXiv 2511.04981) |
| ``small-first`` | the V-cycle's small model from fresh weights, grown; no first stage |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from kvbuffer.errors import ConfigError
from kvbuffer.train.config import TrainConfig
from kvbuffer.train.operators import Pairing, coalesced_config, num_blocks

#: From a ``config.json`` to the FLOPs of a training step.
Count = Callable[[dict[str, Any]], int]
#: Share of the FLOPs that late expansion gives to the model of one block.
LATE_SHARE = 0.8
#: Share of the grown model where it is mixed with fresh weights, which only have to tell the copies apart.
FRESH_ALPHA = 0.9


@dataclass(frozen=True)
class Start:
    """How a stage's weights come to be.

    Attributes:
        checkpoint: folder of a model of this shape, or of a smaller one to be grown.
        coalesce: stage whose model is shrunk; None for fresh weights, or where one is grown.
        grow: stage whose model is grown.
        large: stage whose model the grown one is interpolated with; None for fresh weights.
        alpha: share of the grown one.
        pairing: which layers belong together.
    """

    checkpoint: str | None = None
    coalesce: int | None = None
    grow: int | None = None
    large: int | None = None
    alpha: float = 1.0
    pairing: Pairing = "adjacent"


FRESH = Start()


@dataclass(frozen=True)
class Stage:
    """One model, trained without a break.

    Attributes:
        name: for people.
        config: ``config.json`` of the model.
        start: how its weights come to be.
        steps: training steps.
        step_flops: FLOPs of each.
        warmup, decay: of the learning rate, in steps and as a share of them.
        moments: stage whose optimizer state is taken up, or None.
    """

    name: str
    config: dict[str, Any]
    start: Start
    steps: int
    step_flops: int
    warmup: int
    decay: float
    moments: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields, for ``run.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Stage:
        """Rebuild what :meth:`as_json` returned."""
        return cls(**{**values, "start": Start(**values["start"])})


def make_plan(options: TrainConfig, model: dict[str, Any], count: Count) -> list[Stage]:
    """Return the stages of ``options.method`` for the model with this ``config.json``.

    Args:
        options: the method and its shares.
        model: complete ``config.json``.
        count: FLOPs of one training step of a model.

    Raises:
        ConfigError: the model cannot be divided as the method wants, or the stages before the last spend everything.
    """
    methods: dict[str, Callable[[TrainConfig, dict[str, Any], Count], list[Stage]]] = {
        "scratch": _scratch,
        "v-cycle": partial(_v_cycle, levels=2),
        "v-cycle-3": partial(_v_cycle, levels=3),
        "stack": _stack,
        "late-expansion": _late_expansion,
        "small-first": _small_first,
    }
    total = options.budget * options.steps * count(model)
    stages = methods[options.method](options, model, count)
    if options.init is not None:
        start = Start(checkpoint=str(options.init), alpha=FRESH_ALPHA, pairing=options.pairing)
        stages[0] = replace(stages[0], start=start, warmup=options.rewarm)
    *earlier, last = stages
    left = total - sum(stage.steps * stage.step_flops for stage in earlier)
    if (steps := round(left / last.step_flops)) < 1:
        raise ConfigError(
            f"the stages of {options.method} before the last spend all of {options.steps} steps' FLOPs; "
            "lower first_share or small_share, or raise budget"
        )
    return [*earlier, replace(last, steps=steps, decay=options.decay)]


def _scratch(options: TrainConfig, model: dict[str, Any], count: Count) -> list[Stage]:
    return [_stage("from scratch", options, model, count)]


def _v_cycle(options: TrainConfig, model: dict[str, Any], count: Count, levels: int) -> list[Stage]:
    """Down from level to level with little training, and up again (algorithm 1 of the paper)."""
    configs = [model]
    while len(configs) < levels:
        configs.append(_halved(configs[-1]))
    first, small = round(options.first_share * options.steps), round(options.small_share * options.steps)
    stages = [_stage("level 1, down", options, model, count, steps=first)]
    for level in range(1, levels - 1):
        start = Start(coalesce=level - 1, pairing=options.pairing)
        stages.append(_stage(f"level {level + 1}, down", options, configs[level], count, start, first))
    start = Start(coalesce=levels - 2, pairing=options.pairing)
    stages.append(_stage(f"level {levels}", options, configs[-1], count, start, small, options.small_decay))
    for level in reversed(range(levels - 1)):
        start = Start(grow=len(stages) - 1, large=level, alpha=options.alpha, pairing=options.pairing)
        moments = level if options.optimizer_state == "keep" else None
        up = _stage(f"level {level + 1}, up", options, configs[level], count, start, small, options.small_decay)
        stages.append(replace(up, moments=moments))
    return stages


def _stack(options: TrainConfig, model: dict[str, Any], count: Count) -> list[Stage]:
    blocks = num_blocks(model)
    parts = next((parts for parts in range(2, blocks + 1) if blocks % parts == 0), 1)
    small = coalesced_config(model, width=1, depth=parts)
    return _grown(options, model, small, count, round(options.small_share * options.steps), 1.0, "stacked")


def _late_expansion(options: TrainConfig, model: dict[str, Any], count: Count) -> list[Stage]:
    one_block = coalesced_config(model, width=1, depth=num_blocks(model))
    steps = round(LATE_SHARE * options.budget * options.steps * count(model) / count(one_block))
    return _grown(options, model, one_block, count, steps, 1.0, "stacked")


def _small_first(options: TrainConfig, model: dict[str, Any], count: Count) -> list[Stage]:
    steps = round(options.small_share * options.steps)
    return _grown(options, model, _halved(model), count, steps, FRESH_ALPHA, options.pairing)


def _halved(model: dict[str, Any]) -> dict[str, Any]:
    """Return the model of half the width, and half the depth as long as there are blocks of layers to merge."""
    return coalesced_config(model, width=2, depth=2 if num_blocks(model) > 1 else 1)


def _grown(
    options: TrainConfig, model: dict[str, Any], small: dict[str, Any], count: Count, steps: int, alpha: float,
    pairing: Pairing,
) -> list[Stage]:  # fmt: skip
    start = Start(grow=0, alpha=alpha, pairing=pairing)
    return [
        _stage("small", options, small, count, steps=steps, decay=options.small_decay),
        _stage("grown", options, model, count, start),
    ]


def _stage(
    name: str, options: TrainConfig, config: dict[str, Any], count: Count, start: Start = FRESH, steps: int = 0,
    decay: float = 0.0,
) -> Stage:  # fmt: skip
    warmup = options.warmup if start == FRESH else options.rewarm
    return Stage(name, config, start, steps, count(config), warmup, decay)
