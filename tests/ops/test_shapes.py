"""Every family and form over random shapes, lengths, pages and gates, against the recurrence in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from kvbuffer.ops.layout import Tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, UpdateRule
from tests.support.forms import FORMS
from tests.support.operators import Pool, double, make_tokens

BOUND = 1e-5
RULES = list(FAMILIES.values())

#: What a gate or a strength is replaced by, if at all.
GATES = {"mixed": [], "near 0": [-1e-6, -0.0], "closed": [-60.0, -1e4], "either": [-1e-6, -1e4]}
STRENGTHS = {"mixed": [], "all 0": [0.0], "all 1": [1.0], "either": [0.0, 1.0]}


class Case(NamedTuple):
    """One call's shape and the values of its gates."""

    key_heads: int
    ratio: int
    k: int
    v: int
    lengths: list[int]
    m: int
    page: int
    gates: str
    strengths: str
    seed: int

    def sequences(self, rule: UpdateRule) -> list[Tokens]:
        """Random tokens of each request."""
        rng = Generator().manual_seed(self.seed)
        shape = self.key_heads, self.key_heads * self.ratio, self.k, self.v
        return [self._with_extremes(rng, make_tokens(rng, rule, n, *shape)) for n in self.lengths]

    def pool(self, rule: UpdateRule) -> Pool:
        """Random states and empty buffers, the same at every call."""
        rng = Generator().manual_seed(self.seed + 1)
        shape = self.key_heads, self.key_heads * self.ratio, self.k, self.v
        return Pool(rule, len(self.lengths), *shape, self.m, self.page, rng)

    def _with_extremes(self, rng: Generator, x: Tokens) -> Tokens:
        def replaced(values: Tensor | None, choices: list[float]) -> Tensor | None:
            if values is None or not choices:
                return values
            return torch.tensor(choices)[torch.randint(len(choices), values.shape, generator=rng)]

        return x._replace(g=replaced(x.g, GATES[self.gates]), beta=replaced(x.beta, STRENGTHS[self.strengths]))


def error(actual: Tensor, expected: Tensor, k: int) -> float:
    """RMS error over RMS size; a lone dot product of K terms may cancel, so the size is at least a typical one's."""
    if not len(actual):
        return 0.0
    assert actual.isfinite().all()
    size = expected.square().mean().sqrt().clamp_min(1 / k)
    return float((actual - expected).square().mean().sqrt() / size)


#: Widths of whole vectors and of odd ones, in any pairing.
width = st.sampled_from([16, 32, 64, 128, 256]) | st.integers(16, 256)
cases = st.builds(
    Case,
    key_heads=st.integers(1, 2),
    ratio=st.integers(1, 3),
    k=width,
    v=width,
    lengths=st.lists(st.integers(0, 20) | st.integers(64, 70), min_size=1, max_size=3).filter(any),
    m=st.integers(1, 24),
    page=st.sampled_from([1, 4, 16]),
    gates=st.sampled_from(list(GATES)),
    strengths=st.sampled_from(list(STRENGTHS)),
    seed=st.integers(0, 2**31),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@given(case=cases)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_form_is_the_recurrence(backend: str, rule: UpdateRule, case: Case) -> None:
    sequences, pool = case.sequences(rule), case.pool(rule)
    starts = [pool.state(b) for b in range(len(sequences))]
    from_states = [recurrence(rule, double(x), start) for x, start in zip(sequences, starts, strict=True)]
    from_zero = [recurrence(rule, double(x), start * 0) for x, start in zip(sequences, starts, strict=True)]
    for name, form in FORMS.items():
        pool = case.pool(rule)
        outputs = form(pool, sequences)
        for b, (expected, final) in enumerate(from_zero if name == "kv_only" else from_states):
            assert error(outputs[b], expected, case.k) < BOUND, (name, b)
            assert error(pool.state(b), final, case.k) < BOUND, (name, b)
