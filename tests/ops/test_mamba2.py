"""Mamba-2's inputs and skip connection against its discretised state-space model, written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kvbuffer.ops.mamba2 import mamba2_skip, mamba2_tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import MAMBA2
from tests.support.operators import double, rms_ratio

TOKENS, GROUPS, HEADS, STATE, HEAD = 20, 2, 6, 16, 24


def inputs(rng: Generator, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {
        "x": (TOKENS, HEADS, HEAD), "dt": (TOKENS, HEADS), "b": (TOKENS, GROUPS, STATE), "c": (TOKENS, GROUPS, STATE),
        "a_log": (HEADS,), "dt_bias": (HEADS,),
    }  # fmt: skip
    return {name: torch.randn(*shape, generator=rng).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.3, 0.9)], ids=str)
def test_the_rule_runs_the_state_space_model(rng: Generator, dtype: torch.dtype, limit: tuple[float, float]) -> None:
    """h_t = exp(A step_t) h_{t-1} + step_t x_t B_t^T, y_t = h_t C_t + D x_t."""
    given, d = inputs(rng, dtype), torch.randn(HEADS, generator=rng)
    tokens = mamba2_tokens(**given, dt_limit=limit)
    assert all(part is None or part.dtype == torch.float32 for part in tokens)
    out, _ = recurrence(MAMBA2, double(tokens), torch.zeros(HEADS, STATE, HEAD, dtype=torch.float64))
    out = mamba2_skip(out.float(), given["x"], d)

    wide = {name: part.double() for name, part in given.items()}
    h = torch.zeros(HEADS, HEAD, STATE, dtype=torch.float64)
    for t in range(TOKENS):
        step = F.softplus(wide["dt"][t] + wide["dt_bias"]).clamp(*limit)
        b, c = (wide[name][t].repeat_interleave(HEADS // GROUPS, 0) for name in "bc")
        h = torch.exp(-wide["a_log"].exp() * step)[:, None, None] * h
        h += torch.einsum("h,hp,hn->hpn", step, wide["x"][t], b)
        expected = torch.einsum("hpn,hn->hp", h, c) + d.double()[:, None] * wide["x"][t]
        assert rms_ratio(out[t], expected) < 2e-6


def test_huge_time_steps_do_not_overflow(rng: Generator) -> None:
    given = inputs(rng)
    given["dt"] = torch.tensor([-1e4, -100.0, 0.0, 50.0, 1e3, 1e4]).expand(TOKENS, HEADS)
    given["dt_bias"] = torch.zeros(HEADS)
    g = mamba2_tokens(**given).g
    assert g is not None
    assert g.isfinite().all()
    assert (g <= 0).all()
    torch.testing.assert_close(g[:, 3:], -given["a_log"][3:].exp() * given["dt"][:, 3:])
