"""The check of the cost model, on steps whose times are made up."""

from __future__ import annotations

import pytest

from kvbuffer.bench import choices
from kvbuffer.bench.choices import check_choices
from kvbuffer.bench.pools import Pools
from kvbuffer.ops.cost import Bandwidth, Costs, choose, step_seconds
from tests.bench.conftest import SMALL

BYTES = Costs(Bandwidth(1.0, 1.0))
LENGTHS = (1, 2, 4, 8)


def step_seconds_of_bytes(pools: Pools, *_: object) -> dict[tuple[str, int], list[float]]:
    """Every step takes as long as it moves bytes: what the cost model expects with BYTES."""
    state, record, batch = SMALL.state_bytes, SMALL.record_bytes, pools.batch
    times = {("recurrent", 0): 2.0 * state}
    times |= {("read", n): state + (n + 1.0) * record for n in range(1, 8)}
    times |= {("fold", m): 2.0 * state + (m + 1) * record for m in LENGTHS}
    times |= {("KV only", context): (context + 1.0) * record for context in (2, 300)}
    return {key: [0.5 * batch * value, batch * value, 9.0 * batch * value] for key, value in times.items()}


def test_a_model_that_knows_the_machine_has_no_regret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_step_times", step_seconds_of_bytes)
    monkeypatch.setattr(choices, "costs_of", lambda shape, device: BYTES)
    found = check_choices(SMALL, 3, (2, 300), LENGTHS, 2**14, rounds=1)
    assert [(choice.batch, choice.context) for choice in found] == [(3, 2), (3, 300)]
    for choice in found:
        form = choose(SMALL, 3, choice.context, BYTES, buffer_lengths=LENGTHS)
        assert choice.chosen == choice.best == str(form)
        assert choice.regret == 0
        assert choice.chosen_s == pytest.approx(step_seconds(form, SMALL, 3, choice.context, BYTES))
        assert choice.expected_s == pytest.approx(choice.chosen_s)
    assert found[0].chosen == "KV only"
    assert found[1].chosen.startswith("buffered")


def test_a_wrong_choice_shows_as_regret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "_step_times", step_seconds_of_bytes)
    free_writes = Costs(Bandwidth(1.0, float("inf")))
    monkeypatch.setattr(choices, "costs_of", lambda shape, device: free_writes)
    (choice,) = check_choices(SMALL, 1, (300,), LENGTHS, 2**14, rounds=1)
    assert choice.chosen == "recurrent"
    assert choice.regret == pytest.approx(choice.chosen_s / choice.best_s - 1)
    assert choice.regret > 0.05


def test_every_kind_of_step_is_timed_every_round() -> None:
    pools = Pools.past_the_cache(SMALL, 2, 20, 2**14)
    times = choices._step_times(pools, (3, 20), LENGTHS, rounds=2)
    assert set(times) == {
        ("recurrent", 0),
        *(("read", n) for n in range(1, 8)),
        *(("fold", m) for m in LENGTHS),
        ("KV only", 3),
        ("KV only", 20),
    }
    assert all(len(values) == 2 and min(values) > 0 for values in times.values())
    assert not pools.states.data.isnan().any()
