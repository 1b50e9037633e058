"""The check of the cost model, on steps whose times are made up."""

from __future__ import annotations

import pytest

from kvbuffer.bench import choices
from kvbuffer.bench.choices import check_choices
from kvbuffer.bench.pools import Pools
from kvbuffer.ops.cost import KV_ONLY, RECURRENT, Bandwidth, Costs, Form, FormKind, choose, step_seconds
from tests.bench.conftest import SMALL

BYTES = Costs(Bandwidth(1.0, 1.0))
LENGTHS = (1, 2, 4, 8)


@pytest.fixture
def times_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes as long as it moves bytes (what the cost model expects with BYTES), one in three much longer."""

    def times(form: Form, batch: int, context: int = 0) -> list[float]:
        seconds = step_seconds(form, SMALL, batch, context, BYTES)
        return [0.5 * seconds, seconds, 9.0 * seconds]

    def with_a_state(pools: Pools, lengths: tuple[int, ...], rounds: int) -> dict[Form, list[float]]:
        forms = [RECURRENT, *(Form(FormKind.BUFFERED, m) for m in lengths)]
        return {form: times(form, pools.batch) for form in forms}

    def without(pools: Pools, contexts: tuple[int, ...], rounds: int) -> dict[int, list[float]]:
        return {context: times(KV_ONLY, pools.batch, context) for context in contexts}

    monkeypatch.setattr(choices, "_step_times", with_a_state)
    monkeypatch.setattr(choices, "_kv_only_times", without)


@pytest.mark.usefixtures("times_of_bytes")
def test_a_model_that_knows_the_machine_has_no_regret(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.usefixtures("times_of_bytes")
def test_a_wrong_choice_shows_as_regret(monkeypatch: pytest.MonkeyPatch) -> None:
    free_writes = Costs(Bandwidth(1.0, float("inf")))
    monkeypatch.setattr(choices, "costs_of", lambda shape, device: free_writes)
    (choice,) = check_choices(SMALL, 1, (300,), LENGTHS, 2**14, rounds=1)
    assert choice.chosen == "recurrent"
    assert choice.regret == pytest.approx(choice.chosen_s / choice.best_s - 1)
    assert choice.regret > 0.05


def test_every_form_is_timed_every_round() -> None:
    pools = Pools.past_the_cache(SMALL, 2, 20, 2**14)
    with_a_state = choices._step_times(pools, LENGTHS, rounds=2)
    without = choices._kv_only_times(pools, (3, 20), rounds=2)
    assert set(with_a_state) == {RECURRENT, *(Form(FormKind.BUFFERED, m) for m in LENGTHS)}
    assert set(without) == {3, 20}
    for values in (*with_a_state.values(), *without.values()):
        assert len(values) == 2
        assert min(values) > 0
    assert not pools.states.data.isnan().any()
