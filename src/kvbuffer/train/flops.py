"""Floating-point operations of a training step, counted while one runs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from kvbuffer.train.data import Batch
from kvbuffer.train.model import build, loss_of
from kvbuffer.train.optim import Optimizers

aten = torch.ops.aten
Size = tuple[int, ...]


def _solve(a: Size, b: Size, *args: Any, **kwargs: Any) -> int:
    # A triangular system [n, n] for b [n, m]: n (n - 1) / 2 products and sums per column.
    return prod(a[:-2]) * a[-1] * (a[-1] - 1) * b[-1]


def _attention(query: Size, key: Size, value: Size, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Size, query: Size, key: Size, value: Size, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


#: What PyTorch's counter has no formula for.
_FORMULAS = {
    aten.linalg_solve_triangular: _solve,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def step_flops(config: Mapping[str, Any], batch_size: int, seq_len: int, optimizer: str) -> int:
    """Return the FLOPs of one training step: forward, backward and optimizer.

    Products of matrices, attention, convolutions and triangular systems count; element-wise work does not. One sequence
    is run, and counted ``batch_size`` times. Attention counts in full, as if it were not causal.
    """
    state = torch.get_rng_state()
    model = build(config, seed=0)
    # Experts one by one: fused kernels have no formula, and do the same work.
    model.config._experts_implementation = "eager"
    optimizers = Optimizers(model, optimizer, lr=1e-3, weight_decay=0.0)
    tokens = torch.randint(config["vocab_size"], (1, seq_len))
    batch = Batch(tokens, tokens, float(seq_len))
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as passes:
        loss_of(model, batch).total.backward()
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as update:
        optimizers.step(1.0)
    torch.set_rng_state(state)
    return int(passes.get_total_flops()) * batch_size + int(update.get_total_flops())
