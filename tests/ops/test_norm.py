"""The row-wise operators equal their formulas in float64, for every width and for strided rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kvbuffer.ops.norm import UNIT_EPS, add_rms_norm, gated_delta_inputs, gated_rms_norm

EPS = 1e-6
TOLERANCE = 2e-6


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def rms_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


@pytest.mark.parametrize("dim", [1, 5, 16, 37, 130])
@pytest.mark.parametrize("rows", [0, 1, 6])
@pytest.mark.parametrize("add", [True, False])
def test_add_rms_norm(backend: str, rng: Generator, dim: int, rows: int, add: bool) -> None:
    x = torch.randn(rows, dim, generator=rng)
    residual = torch.randn(rows, dim, generator=rng)
    weight = torch.randn(dim, generator=rng)
    total = residual + x if add else residual.clone()
    x_before = x.clone()
    out = add_rms_norm(x if add else None, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)
    close(out, rms_norm(total.double()) * weight.double())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_add_rms_norm_of_tiny_and_huge_rows(backend: str, rng: Generator, scale: float) -> None:
    residual = torch.randn(2, 33, generator=rng) * scale
    expected = rms_norm(residual.double())
    close(add_rms_norm(None, residual, torch.ones(33), EPS), expected)


@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (3, 7), (2, 16), (4, 37)])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gated_rms_norm(backend: str, rng: Generator, heads: int, dim: int, rows: int) -> None:
    x = torch.randn(rows, heads, dim, generator=rng)
    projected = torch.randn(rows, heads * dim + 11, generator=rng) * 3
    gate = projected[:, 4 : 4 + heads * dim]
    weight = torch.randn(dim, generator=rng)
    out = gated_rms_norm(x, gate, weight, EPS)
    assert out.shape == (rows, heads * dim)
    close(out, (rms_norm(x.double()) * weight.double()).flatten(1) * F.silu(gate.double()))


@pytest.mark.parametrize(("key_heads", "value_heads", "dim"), [(1, 1, 1), (2, 4, 16), (1, 3, 7), (3, 3, 33)])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_gated_delta_inputs(
    backend: str, rng: Generator, key_heads: int, value_heads: int, dim: int, rows: int
) -> None:
    """Queries and keys are columns of the convolution's output, b and a of the projection: both strided."""
    qkv = torch.randn(rows, 2 * key_heads * dim + 9, generator=rng)
    before = qkv.double()
    projected = torch.randn(rows, 2 * value_heads + 5, generator=rng) * 3
    b, a = projected[:, 5:].split(value_heads, dim=1)
    a_log, dt_bias = torch.randn(value_heads, generator=rng), torch.randn(value_heads, generator=rng)
    qk = qkv[:, : 2 * key_heads * dim].unflatten(1, (2 * key_heads, dim))
    g, beta = gated_delta_inputs(qk, b, a, a_log, dt_bias)

    expected = before[:, : 2 * key_heads * dim].unflatten(1, (2 * key_heads, dim))
    expected = expected * torch.rsqrt(expected.square().sum(-1, keepdim=True) + UNIT_EPS)
    close(qk[:, :key_heads], expected[:, :key_heads] * dim**-0.5)
    close(qk[:, key_heads:], expected[:, key_heads:])
    assert torch.equal(qkv[:, 2 * key_heads * dim :].double(), before[:, 2 * key_heads * dim :])  # values untouched
    close(g, -a_log.double().exp() * F.softplus(a.double() + dt_bias.double()))
    close(beta, torch.sigmoid(b.double()))


def test_gates_saturate_without_overflow(backend: str) -> None:
    a = torch.tensor([[-200.0, -30.0, 25.0, 200.0]])
    g, beta = gated_delta_inputs(torch.ones(1, 2, 4), a.clone(), a, torch.zeros(4), torch.zeros(4))
    close(g, -F.softplus(a.double()))
    close(beta, torch.sigmoid(a.double()))


def test_a_row_does_not_depend_on_its_neighbours(backend: str, rng: Generator) -> None:
    if backend == "portable":
        pytest.skip("PyTorch's reductions may choose their order by the number of rows")
    dim, weight = 37, torch.randn(37, generator=rng)
    residual = torch.randn(600, dim, generator=rng)
    x, gate = torch.randn(600, 1, dim, generator=rng), torch.randn(600, dim, generator=rng)
    normed, gated = add_rms_norm(None, residual.clone(), weight, EPS), gated_rms_norm(x, gate, weight, EPS)
    for row in (0, 1, 299, 599):
        one = slice(row, row + 1)
        assert torch.equal(add_rms_norm(None, residual[one].clone(), weight, EPS), normed[one])
        assert torch.equal(gated_rms_norm(x[one].contiguous(), gate[one], weight, EPS), gated[one])
