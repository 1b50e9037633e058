"""A packed dense layer computes x Wᵀ + b: close to float64, with bits that depend on nothing but the row itself."""

from collections.abc import Callable

import pytest
import torch

from kvbuffer.ops import dispatch
from kvbuffer.ops import linear as linear_module
from kvbuffer.ops.linear import Compute, Linear
from kvbuffer.ops.norm import add_rms_norm, gated_rms_norm

DTYPES = [torch.float32, torch.bfloat16]
# (N, K): single elements, odd and prime sizes; below, at and above whole panels and K blocks; a deep K.
SHAPES = [(1, 1), (1, 300), (3, 1), (32, 16), (33, 17), (100, 65), (257, 129), (64, 1030), (8, 5000)]
ROWS = [0, 1, 2, 3, 5, 11, 12, 13, 25, 64, 70, 300]
# How much rounding of the inputs and of short sums may show, by the way of computing.
ROUNDING = {Compute.FLOAT32: 0.0, Compute.WIDENED: 0.0, Compute.PAIR_DOT: 2**-8, Compute.HALF: 2**-10}

needs_kernels = pytest.mark.skipif(dispatch.cpu_kernels() is None, reason="no compiled kernels")


@pytest.fixture(params=list(Compute), ids=lambda c: c.name)
def compute(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Compute:
    """Every way the compiled kernels compute products."""
    needs = {Compute.PAIR_DOT: "avx512_bf16", Compute.HALF: "avx512_fp16"}.get(request.param)
    with open("/proc/cpuinfo") as info:
        if needs is not None and needs not in info.read():
            pytest.skip(f"this CPU has no {needs}")
    monkeypatch.setattr(linear_module, "choose_compute", lambda lib, dtype: request.param)
    return request.param


def weight_dtype(compute: Compute) -> torch.dtype:
    return torch.float32 if compute is Compute.FLOAT32 else torch.bfloat16


def assert_close(actual: torch.Tensor, expected: torch.Tensor, k: int, rounding: float) -> None:
    """Compare sums of k products of normal numbers, whose typical size is sqrt(k), by RMS."""
    error = (actual - expected).square().mean() ** 0.5
    assert error <= (2 * rounding + 2e-6) * k**0.5


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_matches_float64(backend: str, dtype: torch.dtype, shape: tuple[int, int], with_bias: bool) -> None:
    n, k = shape
    weight = random(n, k, dtype=dtype)
    bias = random(n, dtype=dtype, seed=1) if with_bias else None
    layer = Linear(weight, bias)
    assert (layer.out_features, layer.in_features, layer.dtype) == (n, k, dtype)
    for m in ROWS:
        x = random(m, k, dtype=torch.float32, seed=2)
        y = layer(x)
        assert y.shape == (m, n)
        assert y.dtype == torch.float32
        if m:
            expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
            assert_close(y, expected, k, 0.0 if dtype == torch.float32 else 2**-8)


@needs_kernels
@pytest.mark.parametrize("shape", [(64, 1030), (257, 129), (33, 2050)], ids=str)
def test_every_way_of_computing_matches_float64(compute: Compute, shape: tuple[int, int]) -> None:
    weight, x = random(*shape, dtype=weight_dtype(compute)), random(70, shape[1], dtype=torch.float32)
    expected = x.double() @ weight.double().T
    assert_close(Linear(weight)(x), expected, shape[1], ROUNDING[compute])


@needs_kernels
def test_float16_keeps_the_range_of_bfloat16(compute: Compute) -> None:
    """Rows, columns and whole weights of very different size lose no more than those of one size."""
    n, k = 64, 512
    weight = random(n, k, dtype=weight_dtype(compute))
    x = random(20, k, dtype=torch.float32)
    expected = x.double() @ weight.double().T
    layer = Linear(weight)
    for factor in (1e-30, 1e-6, 1e6, 1e30):
        assert_close(layer(x * factor) / factor, expected, k, ROUNDING[compute])
        scaled = (weight.double() * factor).to(weight.dtype)
        assert_close(Linear(scaled)(x) / factor, x.double() @ (scaled.double() / factor).T, k, ROUNDING[compute])
    x[:, 7] *= 3e4  # an activation far beyond the others, as real models have
    weight[3] *= 64
    expected = x.double() @ weight.double().T
    size = expected.square().mean(0).sqrt()
    assert_close(Linear(weight)(x) / size, expected / size, 1, ROUNDING[compute])
    assert (layer(torch.zeros(3, k)) == 0).all()


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 300), (257, 129), (100, 2050)], ids=str)
def test_rows_do_not_depend_on_the_batch(compute: Compute, shape: tuple[int, int]) -> None:
    dtype = weight_dtype(compute)
    layer = Linear(random(*shape, dtype=dtype), random(shape[0], dtype=dtype))
    x = random(1000, shape[1], dtype=torch.float32)
    alone = torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
    for m in [*ROWS, 241, 512, 1000]:
        for start in {0, len(x) - m}:
            assert torch.equal(layer(x[start : start + m]), alone[start : start + m])


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads(compute: Compute, threads: Callable[[int], None]) -> None:
    layer, x = Linear(random(1000, 515, dtype=weight_dtype(compute))), random(300, 515, dtype=torch.float32)
    results = []
    for count in [1, 2, 3]:
        threads(count)
        results.append([layer(x[:m]) for m in [1, 7, 300]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_and_writes_only_what_it_is_given(dtype: torch.dtype) -> None:
    """Slices of wider tensors: no NaN around the inputs leaks in, nothing around the output changes."""
    n, k, m = 37, 21, 14
    weight = torch.full((n + 2, k + 2), torch.nan, dtype=dtype)
    weight[1:-1, 1:-1] = random(n, k, dtype=dtype)
    wide_x = torch.full((m + 2, k + 8), torch.nan)
    wide_x[1:-1, 3 : 3 + k] = random(m, k, dtype=torch.float32)
    wide_out = torch.full((m + 2, n + 8), 7.0)
    x, out = wide_x[1:-1, 3 : 3 + k], wide_out[1:-1, 5 : 5 + n]
    layer = Linear(weight[1:-1, 1:-1])
    weight.fill_(torch.nan)  # the packed copy is the layer's own
    assert layer(x, out=out) is out
    assert torch.equal(out, layer(x.contiguous()))
    assert out.isfinite().all()
    wide_out[1:-1, 5 : 5 + n] = 7.0
    assert (wide_out == 7.0).all()


@needs_kernels
def test_non_finite_values_stay_in_their_row_and_column(compute: Compute) -> None:
    weight, x = random(40, 50, dtype=weight_dtype(compute)), random(20, 50, dtype=torch.float32)
    clean = Linear(weight)(x)
    x[3, 7], x[5, 2] = torch.inf, torch.nan
    y = Linear(weight)(x)
    assert not y[[3, 5]].isfinite().any()
    rest = [r for r in range(20) if r not in (3, 5)]
    assert torch.equal(y[rest], clean[rest])
    weight[11, 2] = torch.nan
    y = Linear(weight)(x)[rest]
    assert not y[:, 11].isfinite().any()
    assert torch.allclose(y[:, :11], clean[rest][:, :11], atol=1e-2)


def test_writes_into_out(backend: str) -> None:
    layer, x = Linear(random(10, 6, dtype=torch.float32)), random(4, 6, dtype=torch.float32)
    out = torch.empty(4, 10)
    assert layer(x, out=out) is out
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_norm_in_front_is_the_norm_and_then_the_layer(
    backend: str, rng: torch.Generator, dtype: torch.dtype, add: bool, with_bias: bool
) -> None:
    n, k = 70, 37
    layer = Linear(random(n, k, dtype=dtype), random(n, dtype=dtype) if with_bias else None)
    weight = torch.randn(k, generator=rng)
    for m in (0, 1, 13, 150):
        x = torch.randn(m, k, generator=rng) if add else None
        residual = torch.randn(m, k, generator=rng)
        expected_residual = residual.clone()
        expected = layer(add_rms_norm(x, expected_residual, weight, 1e-6))
        assert torch.equal(layer.of_add_rms_norm(x, residual, weight, 1e-6), expected)
        assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_norm_in_front_is_the_norm_and_then_the_layer(
    backend: str, rng: torch.Generator, dtype: torch.dtype
) -> None:
    n, heads, dim = 70, 3, 21
    layer, weight = Linear(random(n, heads * dim, dtype=dtype)), torch.randn(dim, generator=rng)
    for m in (0, 1, 13, 150):
        x = torch.randn(m, heads, dim, generator=rng)
        gate = torch.full((m, heads * dim + 9), torch.nan)[:, 4 : 4 + heads * dim]
        gate.copy_(torch.randn(m, heads * dim, generator=rng))
        expected = layer(gated_rms_norm(x, gate, weight, 1e-6))
        assert torch.equal(layer.of_gated_rms_norm(x, gate, weight, 1e-6), expected)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 300), (257, 129)], ids=str)
def test_rows_behind_a_norm_do_not_depend_on_the_batch_or_the_threads(
    compute: Compute, rng: torch.Generator, shape: tuple[int, int], threads: Callable[[int], None]
) -> None:
    layer, weight = Linear(random(*shape, dtype=weight_dtype(compute))), torch.randn(shape[1], generator=rng)
    x, residual = torch.randn(2, 200, shape[1], generator=rng)
    alone = [layer.of_add_rms_norm(x[i : i + 1], residual[i : i + 1].clone(), weight, 1e-6) for i in range(200)]
    for count in (1, 3):
        threads(count)
        assert torch.equal(layer.of_add_rms_norm(x, residual.clone(), weight, 1e-6), torch.cat(alone))
