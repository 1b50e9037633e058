"""The optimizer and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kvbuffer.errors import KVBufferError
from kvbuffer.train.workers import Workers

# Not matrices between hidden features: looked up, or with a handful of outputs.
_NOT_MUON = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "shared_expert_gate.weight")
_GATES = ("in_proj_ba.weight", "in_proj_a.weight", "in_proj_b.weight", "conv1d.weight")


def learning_rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Return the share of the peak learning rate for ``step`` of ``steps``: warm-up, stable, linear decay (WSD).

    ``decay`` is the share of the steps in which it falls; the last step still has a rate above zero.
    """
    up = (step + 1) / (warmup + 1)
    down = (steps - step) / (decay * steps + 1) if decay else 1.0
    return min(1.0, up, down)


class Optimizers:
    """AdamW, or Muon for the matrices and AdamW for all else.

    PyTorch's Muon takes matrices only, so stacked experts are given to it one by one, as views.

    Args:
        model: whose parameters are trained.
        kind: ``adamw`` or ``muon``.
        lr: peak learning rate; Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982).
        weight_decay: of matrices and embeddings; vectors have none.
    """

    def __init__(self, model: nn.Module, kind: str, lr: float, weight_decay: float) -> None:
        self._lr = lr
        self._views: list[tuple[nn.Parameter, int, nn.Parameter]] = []
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if kind == "muon" and parameter.ndim >= 2 and not name.endswith((*_NOT_MUON, *_GATES)):
                matrices += [parameter] if parameter.ndim == 2 else self._split(parameter)
            else:
                (others if parameter.ndim >= 2 else vectors).append(parameter)
        groups: list[dict[str, Any]] = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
        ]
        if matrices:
            muon = torch.optim.Muon(matrices, lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._all.append(muon)

    def _split(self, stack: nn.Parameter) -> list[nn.Parameter]:
        views = [nn.Parameter(matrix) for matrix in stack.detach()]
        self._views += [(stack, i, view) for i, view in enumerate(views)]
        return views

    def step(self, share: float) -> None:
        """Take one step at this share of the peak learning rate, and forget the gradients."""
        for stack, i, view in self._views:
            view.grad = None if stack.grad is None else stack.grad[i]
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = share * self._lr
            optimizer.step()
            optimizer.zero_grad()
        for stack, _, _ in self._views:
            stack.grad = None

    def state(self) -> list[dict[str, Any]]:
        """Return the state of all optimizers, for ``torch.save``."""
        return [optimizer.state_dict() for optimizer in self._all]

    def load(self, state: list[dict[str, Any]]) -> None:
        """Take up a state that :meth:`state` returned."""
        for optimizer, saved in zip(self._all, state, strict=True):
            optimizer.load_state_dict(saved)


def descend(
    model: nn.Module,
    optimizers: Optimizers,
    minimised: Tensor,
    shown: Tensor,
    share: float,
    clip: float,
    processes: Workers,
) -> tuple[float, float]:
    """Take one training step.

    Args:
        model: whose parameters are trained.
        optimizers: of these.
        minimised: this process's loss.
        shown: the part of it that is reported.
        share: of the peak learning rate.
        clip: largest norm of the gradient.
        processes: whose gradients are averaged.

    Returns:
        The mean of ``shown`` over the processes, and the norm of the gradient.

    Raises:
        KVBufferError: either is not finite; nothing is changed then.
    """
    minimised.backward()
    loss = float(processes.average(model, shown.detach()))
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise KVBufferError(f"loss {loss}, gradient norm {norm}; lower lr")
    optimizers.step(share)
    return loss, norm
