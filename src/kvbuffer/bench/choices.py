"""Is the cost model right? Every form measured over a grid of batch sizes and contexts, beside the one it chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from kvbuffer.bench.pools import Pools
from kvbuffer.ops.buffered import buffered_decode, recurrent_decode
from kvbuffer.ops.calibration import costs_of, random_tokens, seconds_of
from kvbuffer.ops.cost import KV_ONLY, RECURRENT, Form, FormKind, LayerShape, choose, step_seconds


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

    The steps of a cycle are timed one by one (reading the state and n records; folding m), so that one sweep gives the
    time of every buffer length.

    Args:
        shape: the layer.
        batch: requests per step.
        contexts: tokens of each request before the step.
        buffer_lengths: the m that may be chosen.
        working_set: bytes of states that a step through all layers reads.
        rounds: how often each step is timed, in turns; the median counts.
        device: where to run.
    """
    pools = Pools.past_the_cache(shape, batch, max(*contexts, *buffer_lengths) + 1, working_set, device)
    times = {key: median(values) for key, values in _step_times(pools, contexts, buffer_lengths, rounds).items()}
    measured: dict[Form, float] = {RECURRENT: times["recurrent", 0]}
    for m in buffer_lengths:
        measured[Form(FormKind.BUFFERED, m)] = (times["fold", m] + sum(times["read", n] for n in range(1, m))) / m
    costs = costs_of(shape, device)
    choices = []
    for context in contexts:
        measured[KV_ONLY] = times["KV only", context]
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


def _step_times(
    pools: Pools, contexts: Sequence[int], buffer_lengths: Sequence[int], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Return the times of a step of one layer, by kind of step and number of records before it."""
    shape, batch = pools.shape, pools.batch
    heads = shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim
    tokens = random_tokens(shape.rule, batch, *heads, pools.device)

    def recurrent() -> None:
        for slots in pools.slots:
            recurrent_decode(shape.rule, tokens, pools.states, slots)

    def decode(records: int, *, fold: bool = False, states: bool = True) -> Callable[[], None]:
        fill, folds = pools.int32(records), pools.flags(fold)

        def all_layers() -> None:
            for slots, page_table in zip(pools.slots, pools.page_tables, strict=True):
                own = slots if states else pools.no_slots
                buffered_decode(shape.rule, tokens, pools.states, own, pools.records, page_table, fill, folds)

        return all_layers

    # In the order of a cycle, so that each step finds the records that it reads.
    steps: dict[tuple[str, int], Callable[[], None]] = {("recurrent", 0): recurrent}
    steps |= {("read", n): decode(n) for n in range(1, max(buffer_lengths))}
    steps |= {("fold", m): decode(m, fold=True) for m in buffer_lengths}
    steps |= {("KV only", context): decode(context, states=False) for context in contexts}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            times[key].append(seconds_of(step, pools.device) / pools.num_layers)
    return times
