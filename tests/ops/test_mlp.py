"""A dense SwiGLU layer equals its formula in float64, with bits that depend on nothing but the row itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kvbuffer.ops import dispatch
from kvbuffer.ops.mlp import SwigluMlp
from kvbuffer.ops.norm import add_rms_norm
from tests.support.operators import rms_ratio

DTYPES = [torch.float32, torch.bfloat16]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
# (H, I): single elements, below, at and above whole panels and blocks of columns.
SHAPES = [(1, 1), (33, 7), (64, 64), (130, 100), (70, 600)]

needs_kernels = pytest.mark.skipif(dispatch.cpu_kernels() is None, reason="no compiled kernels")


def random_weights(rng: Generator, h: int, i: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(2 * i, h, generator=rng) / h**0.5
    return gate_up.to(dtype), (torch.randn(h, i, generator=rng) / i**0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "i"), SHAPES)
def test_matches_float64(backend: str, rng: Generator, dtype: torch.dtype, h: int, i: int) -> None:
    gate_up, down = random_weights(rng, h, i, dtype)
    mlp = SwigluMlp(gate_up, down)
    for m in (0, 1, 8, 13, 300):
        x = torch.full((m, h + 5), torch.nan)[:, 2 : 2 + h]
        x.copy_(torch.randn(m, h, generator=rng))
        y = mlp(x)
        assert y.shape == (m, h)
        assert y.dtype == torch.float32
        if m:
            gate, up = (x.double() @ gate_up.double().T).chunk(2, dim=-1)
            assert rms_ratio(y, (F.silu(gate) * up) @ down.double().T) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_in_front_is_the_norm_and_then_the_layer(backend: str, rng: Generator, dtype: torch.dtype) -> None:
    h, i = 70, 100
    mlp, weight = SwigluMlp(*random_weights(rng, h, i, dtype)), torch.randn(h, generator=rng)
    for m in (0, 1, 13, 150):
        x, residual = torch.randn(2, m, h, generator=rng)
        expected_residual = residual.clone()
        expected = mlp(add_rms_norm(x, expected_residual, weight, 1e-6))
        assert torch.equal(mlp.of_add_rms_norm(x, residual, weight, 1e-6), expected)
        assert torch.equal(residual, expected_residual)


def test_extreme_gates(backend: str) -> None:
    mlp = SwigluMlp(torch.tensor([[1.0], [0.0]]), torch.ones(1, 1))
    assert mlp(torch.tensor([[-1e4], [0.0]])).abs().max() == 0
    gate_is_up = SwigluMlp(torch.ones(2, 1), torch.ones(1, 1))
    y = gate_is_up(torch.tensor([[-1e4], [0.0], [1e4], [torch.nan]])).flatten()
    assert y[:2].abs().max() < 1e-30
    assert y[2] == 1e8
    assert y[3].isnan()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("h", "i"), SHAPES)
def test_rows_depend_neither_on_the_batch_nor_on_the_threads(
    rng: Generator, dtype: torch.dtype, h: int, i: int, threads: Callable[[int], None]
) -> None:
    mlp, weight = SwigluMlp(*random_weights(rng, h, i, dtype)), torch.randn(h, generator=rng)
    x, residual = torch.randn(2, 160, h, generator=rng)

    def run(rows: slice) -> Tensor:
        return mlp.of_add_rms_norm(x[rows], residual[rows].clone(), weight, 1e-6)

    alone = torch.cat([run(slice(row, row + 1)) for row in range(160)])
    for count in (1, 2, 3):
        threads(count)
        for rows in (slice(8), slice(3, 16), slice(160)):
            assert torch.equal(run(rows), alone[rows])
