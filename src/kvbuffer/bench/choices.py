"""Is the cost model right? Every form measured over a grid of batch sizes and contexts, beside the one it chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

from torch import Tensor

from kvbuffer.bench.forms import Step, TimedForm, buffered, recurrent
from kvbuffer.bench.pools import Pools
from kvbuffer.ops.buffered import buffered_decode
from kvbuffer.ops.calibration import costs_of, random_tokens, seconds_of
from kvbuffer.ops.cost import KV_ONLY, RECURRENT, Form, FormKind, LayerShape, choose, step_seconds
from kvbuffer.ops.layout import Tokens

K = TypeVar("K")


@dataclass(frozen=True)
class Choice:
    """One point of the grid.

    Attributes:
        family: name of the rule.
        state_dtype: of the states.
        record_dtype: of the records.
        batch: requests per step.
        context: tokens of each before the step.
        chosen: what the cost model takes.
        best: what was measured to be fastest.
        chosen_s: measured time of a step of the chosen form.
        best_s: of the best.
        expected_s: what the cost model expected of the chosen form.
        regret: how much longer the chosen form takes than the best, 0 where they are the same.
    """

    family: str
    state_dtype: str
    record_dtype: str
    batch: int
    context: int
    chosen: str
    best: str
    chosen_s: float
    best_s: float
    expected_s: float
    regret: float


def check_choices(
    shape: LayerShape,
    batch: int,
    contexts: Sequence[int],
    buffer_lengths: Sequence[int],
    working_set: int,
    rounds: int,
    device: str = "cpu",
) -> list[Choice]:
    """Measure every form that could be chosen, and compare.

    A buffered form is timed in passes of whole cycles, folds included.

    Args:
        shape: the layer.
        batch: requests per step.
        contexts: tokens of each request before the step.
        buffer_lengths: the m that may be chosen.
        working_set: bytes of states that a step through all layers reads.
        rounds: how often each form is timed, in turns; the median counts.
        device: where to run.
    """
    pools = Pools.past_the_cache(shape, batch, max(*contexts, *buffer_lengths) + 1, working_set, device)
    measured = {form: median(times) for form, times in _step_times(pools, buffer_lengths, rounds).items()}
    kv_only = {context: median(times) for context, times in _kv_only_times(pools, contexts, rounds).items()}
    costs = costs_of(shape, device)
    choices = []
    for context in contexts:
        measured[KV_ONLY] = kv_only[context]
        chosen = choose(shape, batch, context, costs, buffer_lengths=buffer_lengths)
        best = min(measured, key=lambda form: measured[form])
        choices.append(
            Choice(
                family=shape.rule.name,
                state_dtype=str(shape.state_dtype).removeprefix("torch."),
                record_dtype=str(shape.record_dtype).removeprefix("torch."),
                batch=batch,
                context=context,
                chosen=str(chosen),
                best=str(best),
                chosen_s=measured[chosen],
                best_s=measured[best],
                expected_s=step_seconds(chosen, shape, batch, context, costs),
                regret=measured[chosen] / measured[best] - 1,
            )
        )
    return choices


def _step_times(pools: Pools, buffer_lengths: Sequence[int], rounds: int) -> dict[Form, list[float]]:
    """Return the times of a step of one layer in every form that has a state."""
    forms = {RECURRENT: recurrent(), **{Form(FormKind.BUFFERED, m): buffered(m) for m in buffer_lengths}}
    tokens = _tokens(pools)

    def seconds(form: TimedForm, step: Step) -> float:
        passing = seconds_of(lambda: form.run_pass(step, pools.num_layers, tokens), pools.device)
        return passing / form.calls_in_pass(pools.num_layers)

    return _in_turns({key: partial(seconds, form, form.bind(pools)) for key, form in forms.items()}, rounds)


def _kv_only_times(pools: Pools, contexts: Sequence[int], rounds: int) -> dict[int, list[float]]:
    """Return the times of a step of one layer without a state, by context."""
    rule, tokens, no_fold = pools.shape.rule, _tokens(pools), pools.flags(False)

    def seconds(fill: Tensor) -> float:
        def all_layers() -> None:
            for page_table in pools.page_tables:
                buffered_decode(rule, tokens, pools.states, pools.no_slots, pools.records, page_table, fill, no_fold)

        return seconds_of(all_layers, pools.device) / pools.num_layers

    return _in_turns({context: partial(seconds, pools.int32(context)) for context in contexts}, rounds)


def _in_turns(calls: Mapping[K, Callable[[], float]], rounds: int) -> dict[K, list[float]]:
    results: dict[K, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            results[key].append(call())
    return results


def _tokens(pools: Pools) -> Tokens:
    shape = pools.shape
    heads = shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim
    return random_tokens(shape.rule, pools.batch, *heads, pools.device)
