"""Routing picks the most probable experts; their weighted sum equals a plain loop over tokens and slots."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from kvbuffer.ops import dispatch, moe
from kvbuffer.ops.moe import PackedExperts, moe_mlp, route
from tests.support.operators import rms_ratio

DTYPES = [torch.float32, torch.bfloat16]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
needs_kernels = pytest.mark.skipif(dispatch.cpu_kernels() is None, reason="no compiled kernels")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def random_experts(e: int, h: int, i: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (random(e, 2 * i, h) / h**0.5).to(dtype), (random(e, h, i) / i**0.5).to(dtype)


def random_routing(m: int, e: int, top_k: int, skew: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts per token; a positive skew makes low indices far more popular."""
    return route(random(m, e, seed=5) - skew * torch.arange(e), top_k, True)


def reference(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        expert = int(ids[token, slot])
        gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
        hidden = F.silu(gate) * up
        out[token] += weights[token, slot].double() * (down[expert].double() @ hidden)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("e", "h", "i", "top_k"), [(4, 48, 20, 2), (8, 33, 7, 3), (3, 1, 1, 1), (16, 64, 64, 16), (5, 130, 100, 2)]
)
@pytest.mark.parametrize("skew", [0.0, 2.0], ids=["balanced", "skewed"])
def test_matches_a_plain_loop(
    backend: str, dtype: torch.dtype, e: int, h: int, i: int, top_k: int, skew: float
) -> None:
    weights = random_experts(e, h, i, dtype)
    experts = PackedExperts(*weights)
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (e, h, i)
    for m in [1, 2, 13, 40]:
        x = random(m, h)
        ids, expert_weights = random_routing(m, e, top_k, skew)
        y = moe_mlp(x, ids, expert_weights, experts)
        assert y.shape == (m, h)
        assert y.dtype == torch.float32
        bound = BOUND[dtype] * (4 if m * h < 100 else 1)
        assert rms_ratio(y, reference(x, ids, expert_weights, *weights)) < bound


def test_one_expert_takes_every_token(backend: str) -> None:
    """More rows on one expert than one group holds, while the others see none."""
    weights = random_experts(4, 40, 24, torch.float32)
    x, ids = random(250, 40), torch.full((250, 1), 2, dtype=torch.int32)
    y = moe_mlp(x, ids, torch.ones(250, 1), PackedExperts(*weights))
    assert rms_ratio(y, reference(x, ids, torch.ones(250, 1), *weights)) < BOUND[torch.float32]


def test_no_tokens(backend: str) -> None:
    experts = PackedExperts(*random_experts(4, 40, 24, torch.float32))
    ids, weights = route(torch.empty(0, 4), 2, True)
    assert ids.shape == weights.shape == (0, 2)
    assert moe_mlp(torch.empty(0, 40), ids, weights, experts).shape == (0, 40)


def test_unknown_experts_add_nothing(backend: str) -> None:
    experts = PackedExperts(*random_experts(4, 40, 24, torch.float32))
    x = random(3, 40)
    ids = torch.tensor([[1, 4], [-1, 2], [7, -3]], dtype=torch.int32)
    y = moe_mlp(x, ids, torch.ones(3, 2), experts)
    known = moe_mlp(x[:2], torch.tensor([[1], [2]], dtype=torch.int32), torch.ones(2, 1), experts)
    torch.testing.assert_close(y[:2], known)
    assert (y[2] == 0).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_do_not_depend_on_the_batch_nor_on_threads(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    experts = PackedExperts(*random_experts(8, 96, 40, dtype))
    x = random(300, 96)
    ids, weights = random_routing(300, 8, 3, skew=0.5)
    alone = torch.cat([moe_mlp(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], experts) for t in range(300)])
    for count in [1, 2, 3]:
        threads(count)
        for m in [1, 2, 5, 12, 13, 64, 300]:
            assert torch.equal(moe_mlp(x[:m], ids[:m], weights[:m], experts), alone[:m])
            assert torch.equal(moe_mlp(x[-m:], ids[-m:], weights[-m:], experts), alone[-m:])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("e", "top_k"), [(1, 1), (4, 4), (7, 2), (64, 8), (513, 10)])
def test_route_picks_the_most_probable(backend: str, normalize: bool, e: int, top_k: int) -> None:
    # Rounded, so that logits are often equal, and then the lower index comes first.
    logits = (3 * random(50, e)).bfloat16().float()
    ids, weights = route(logits, top_k, normalize)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    order = torch.sort(logits.double(), dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(ids.long(), order)
    expected = torch.softmax(logits.double(), dim=-1).gather(1, order)
    if normalize:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


def test_route_breaks_ties_by_index(backend: str) -> None:
    ids, weights = route(torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]]), 3, True)
    assert ids.tolist() == [[1, 3, 4], [0, 1, 2]]
    torch.testing.assert_close(weights, torch.full((2, 3), 1 / 3))


def test_route_of_extreme_logits(backend: str) -> None:
    ids, weights = route(torch.tensor([[-1e30, 1e30, 0.0], [-torch.inf, 5.0, 4.0]]), 2, True)
    assert ids[:, 0].tolist() == [1, 1]
    assert weights.isfinite().all()
    assert weights[0, 0] == 1.0


@needs_kernels
def test_packing_keeps_no_reference_to_the_checkpoint() -> None:
    gate_up, down = random_experts(2, 16, 8, torch.float32)
    experts = PackedExperts(gate_up, down)
    x, (ids, weights) = random(4, 16), random_routing(4, 2, 1)
    before = moe_mlp(x, ids, weights, experts)
    gate_up.fill_(torch.nan)
    down.fill_(torch.nan)
    assert torch.equal(moe.moe_mlp(x, ids, weights, experts), before)
