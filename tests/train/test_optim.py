"""Learning rates, and which optimizer has which parameter."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from kvbuffer.train.model import build, loss_of
from kvbuffer.train.optim import Optimizers, learning_rate
from tests.support.training import config_of, random_batch


def test_warm_up_stable_decay() -> None:
    rates = [learning_rate(step, 100, warmup=9, decay=0.2) for step in range(100)]
    assert rates[:9] == pytest.approx([(i + 1) / 10 for i in range(9)])
    assert rates[9:80] == pytest.approx([1.0] * 71, abs=0.05)
    assert rates[79:] == sorted(rates[79:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 21)
    assert [learning_rate(step, 100, warmup=0, decay=0.0) for step in (0, 99)] == [1.0, 1.0]


def test_muon_makes_the_update_of_every_expert_orthogonal() -> None:
    model = build(config_of("qwen3_next"), seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = Optimizers(model, "muon", lr=1e-2, weight_decay=0.0)
    loss_of(model, random_batch(4, 32)).total.backward()
    optimizers.step(1.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        update = before[name] - parameter.detach()
        assert update.abs().max() > 0, name
        if name.endswith("experts.down_proj"):
            for expert in update[update.abs().amax((1, 2)) > 0]:
                values = torch.linalg.svdvals(expert) / (1e-2 * 0.2 * max(expert.shape) ** 0.5)
                # Newton-Schulz leaves them near 1, but for directions that hardly a token has a gradient in.
                assert values.max() < 1.25
                assert values.median() > 0.6
        if name.endswith(("embed_tokens.weight", "A_log")):  # Adam's first step is the learning rate everywhere
            assert update.abs().max() == pytest.approx(1e-2, rel=1e-3)


def test_state_is_taken_up_whole() -> None:
    """A step after loading is the step that would have come."""
    torch.manual_seed(1)
    batches = [random_batch(2, 16) for _ in range(3)]
    models = [build(config_of("qwen3_next"), seed=0) for _ in range(2)]
    optimizers = [Optimizers(model, "muon", lr=1e-2, weight_decay=0.1) for model in models]
    for batch in batches[:2]:
        loss_of(models[0], batch).total.backward()
        optimizers[0].step(1.0)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load(deepcopy(optimizers[0].state()))
    for model, optimizer in zip(models, optimizers, strict=True):
        loss_of(model, batches[2]).total.backward()
        optimizer.step(0.5)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
