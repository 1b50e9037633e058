"""A model that learns to compute its layers in groups: transformers' own, with groups and adapters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kvbuffer.cqil.reference import combine
from kvbuffer.models.adapter import Adapter, Factors

#: Parameters that get an adapter: all projections. Routers, embeddings and the output layer stay as they are.
_PROJECTION = re.compile(r"_proj\w*(\.weight)?$")


class LowRank(nn.Module):
    """Adds a product of two thin matrices, zero at first, to a weight (LoRA, Hu et al., arXiv 2106.09685).

    Args:
        weight: [..., rows, columns]; each matrix of a stack gets an adapter of its own.
        rank: r.

    Attributes:
        enabled: whether anything is added.
        up: [..., rows, r].
        down: [..., r, columns].
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.enabled = True
        self.up = nn.Parameter(torch.zeros(*stack, rows, rank))
        self.down = nn.Parameter(torch.empty(*stack, rank, columns).uniform_(-1, 1) * columns**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight."""
        return weight + self.up @ self.down if self.enabled else weight


class Student:
    """A model with adapters whose layers are computed in groups; without both it is its own teacher.

    Args:
        model: one of :data:`kvbuffer.train.widths.ARCHITECTURES`, as transformers has it; gets adapters.
        groups: layers that are computed at once.
        bypass: D.
        rank: of the adapters.

    Attributes:
        adapters: what there is to learn.
    """

    def __init__(self, model: Any, groups: Sequence[tuple[int, ...]], bypass: int, rank: int) -> None:
        self.model, self._groups, self._bypass = model.requires_grad_(False), groups, bypass
        adapted = [
            (f"{path}.{name}", module, name)
            for path, module in model.named_modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.ndim >= 2 and _PROJECTION.search(f"{path}.{name}")
        ]
        self._names = [full for full, _, _ in adapted]
        self.adapters = nn.ModuleList(LowRank(getattr(module, name), rank) for _, module, name in adapted)
        for (_, module, name), adapter in zip(adapted, self.adapters, strict=True):
            parametrize.register_parametrization(module, name, adapter)

    def logits(self, token_ids: Tensor) -> Tensor:
        """Return the logits [B, T, vocab_size] of the grouped model for tokens [B, T]."""
        with computed_in_groups(self.model, self._groups, self._bypass), parametrize.cached():
            return self._logits(token_ids)

    @torch.no_grad()
    def teacher_logits(self, token_ids: Tensor) -> Tensor:
        """Return those of the model as it was, without adapters and groups."""
        self._enable(False)
        try:
            return self._logits(token_ids)
        finally:
            self._enable(True)

    def learned(self) -> Adapter:
        """Return what has been learnt, for the checkpoint that the model is from."""
        factors: dict[str, Factors] = {}
        for name, low_rank in zip(self._names, self.adapters, strict=True):
            up, down = low_rank.up.detach(), low_rank.down.detach()  # type: ignore[operator]
            if up.ndim == 2:
                factors[name.removesuffix(".weight")] = Factors(up, down)
                continue
            # A stack of experts, whose gates and ups may be in one matrix.
            prefix, kinds = name.rpartition(".")[0], name.rpartition(".")[2].removesuffix("_proj").split("_")
            for expert, own in enumerate(up):
                for kind, rows in zip(kinds, own.chunk(len(kinds)), strict=True):
                    factors[f"{prefix}.{expert}.{kind}_proj"] = Factors(rows, down[expert])
        return Adapter(factors)

    def _logits(self, token_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=token_ids, use_cache=False).logits
        return logits.float()

    def _enable(self, enabled: bool) -> None:
        for adapter in self.adapters:
            adapter.enabled = enabled  # type: ignore[assignment]  # typed as if it were a parameter


@contextmanager
def computed_in_groups(model: Any, groups: Sequence[tuple[int, ...]], bypass: int) -> Iterator[None]:
    """Compute groups of the layers of transformers' ``model`` at once inside; a group runs in its first one's place."""
    several = [[model.model.layers[index] for index in group] for group in groups if len(group) > 1]
    for first, *others in several:
        first.forward = partial(_group, [first, *others], bypass)
        for layer in others:
            layer.forward = _unchanged
    try:
        yield
    finally:
        for layers in several:
            for layer in layers:
                del layer.forward  # the class has it


def _group(layers: Sequence[Any], bypass: int, x: Tensor, **inputs: Any) -> Tensor:
    def mlp(layer: Any, seen: Tensor) -> Tensor:
        out = layer.mlp(layer.post_attention_layernorm(x + seen))
        # Some mixtures of experts return what their router chose, too.
        only: Tensor = out[0] if isinstance(out, tuple) else out
        return only

    mixed = [_mixed(layer, x, inputs) for layer in layers]
    return x + combine(mixed, [partial(mlp, layer) for layer in layers], bypass)


def _mixed(layer: Any, x: Tensor, inputs: dict[str, Any]) -> Tensor:
    normed = layer.input_layernorm(x)
    if hasattr(layer, "linear_attn"):
        mixed: Tensor = layer.linear_attn(normed, attention_mask=inputs["attention_mask"])
        return mixed
    mixed, _ = layer.self_attn(normed, **inputs)
    return mixed


def _unchanged(x: Tensor, **_: Any) -> Tensor:
    return x
