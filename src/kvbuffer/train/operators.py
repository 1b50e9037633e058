"""Coalescing, de-coalescing and interpolation of models (Zou et al., arXiv 2404.07999, section 3).

A model here is a dict of its parameters under their names in the checkpoint; nothing is changed in place. Arithmetic is
in float32 or wider, results have the dtype of what they are made from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from kvbuffer.errors import ConfigError, ModelError
from kvbuffer.train.widths import WIDTH_FIELDS, Axis, Shape

Parameters = dict[str, Tensor]
Pairing = Literal["adjacent", "stacked"]


def coalesced_config(config: Mapping[str, Any], width: int = 2, depth: int = 2) -> dict[str, Any]:
    """Return the ``config.json`` of a model with ``1 / width`` of the widths and ``1 / depth`` of the layers.

    Head dims, vocabulary and experts stay. So does a count of heads that is 1 already: all the others share it.

    Raises:
        ConfigError: a field is not a multiple of its factor.
        ModelError: the architecture is not known.
    """
    shape = Shape.from_config(config)
    small = dict(config)
    for name in WIDTH_FIELDS:
        if isinstance(config.get(name), int) and not (config[name] == 1 and name.startswith(("num_", "linear_"))):
            small[name] = _divided(name, config[name], width)
    small["head_dim"] = shape.fixed["head_dim"]
    layers = small["num_hidden_layers"] = _divided("num_hidden_layers", len(shape.kinds), depth)
    if config.get("layer_types"):
        small["layer_types"] = list(config["layer_types"][:layers])
    if config.get("mlp_only_layers"):
        small["mlp_only_layers"] = [layer for layer in config["mlp_only_layers"] if layer < layers]
    return small


def num_blocks(config: Mapping[str, Any]) -> int:
    """Return the number of blocks of layers: how often the pattern of layers is repeated."""
    kinds = Shape.from_config(config).kinds
    return len(kinds) // _period(kinds)


def _divided(name: str, value: int, factor: int) -> int:
    if value % factor:
        raise ConfigError(f"{name} ({value}) cannot be divided by {factor}; choose another factor or another size")
    return value // factor


class LevelMap:
    """The linear maps between a large model and a small one.

    Args:
        large, small: both ``config.json``; every width and the number of layers of the first must be a multiple of the
            second's.
        pairing: which layers are merged: ``adjacent`` blocks, as in the paper, or ``stacked``: layer i with layer
            i + L/2, as in the released code and in stacking (G_stack, arXiv 2405.15319). A block is one period of the
            pattern of layers, so a linear-attention layer is never merged with a full-attention one.

    Raises:
        ConfigError: the two do not fit each other.
        ModelError: the architecture is not known.
    """

    def __init__(self, large: Mapping[str, Any], small: Mapping[str, Any], pairing: Pairing = "adjacent") -> None:
        self.large, self.small = Shape.from_config(large), Shape.from_config(small)
        self._check()
        self._ratios = {name: size // max(1, self.small.widths[name]) for name, size in self.large.widths.items()}
        self._layer = _layer_map(self.large.kinds, self.small.kinds, pairing)

    def _check(self) -> None:
        large, small = self.large, self.small
        for name in ("architecture", "tied", "fixed"):
            if (theirs := getattr(large, name)) != (ours := getattr(small, name)):
                raise ConfigError(f"the two models differ in what must be the same: {theirs} and {ours}")
        for name, size in large.widths.items():
            # The grouped axes of a single key head are not used: see ``Shape.row``.
            if size % max(1, small.widths[name]) and name not in ("qkvz", "ba"):
                raise ConfigError(f"width {name} of the large model ({size}) is no multiple of {small.widths[name]}")
        for (heads, groups), (fewer, small_groups) in zip(large.heads, small.heads, strict=True):
            if heads * small_groups != groups * fewer and not groups == small_groups == 1:
                raise ConfigError(
                    f"{heads} heads in {groups} groups cannot become {fewer} in {small_groups}: "
                    "heads and groups must shrink by the same factor, or all heads share one group"
                )

    def coalesce(self, large: Parameters) -> Parameters:
        """Return the small model: merged units averaged or summed, merged layers averaged."""
        small = {}
        for name, sources in self._sources(large).items():
            row = self.large.row(name)
            merged = torch.stack([_wide(large[source]) for source in sources]).mean(0) + row.offset
            for dim, axis in enumerate(row.axes):
                merged = self._shrink(merged, dim, axis)
            small[name] = (merged - row.offset).to(large[sources[0]].dtype)
        return small

    def decoalesce(self, small: Parameters) -> Parameters:
        """Return the large model that this one describes: units and layers copied, inputs shared among the copies.

        In width it computes the same function. :meth:`coalesce` of it is ``small`` again, bit for bit, but for the last
        norm of tied models with zero-centred norms, where it is so up to rounding.
        """
        large = {}
        for name, source in self._targets(small).items():
            row = self.large.row(name)
            grown = _wide(small[source]) + row.offset
            for dim, axis in enumerate(row.axes):
                grown = self._grow(grown, dim, axis)
            large[name] = (grown - row.offset).to(small[source].dtype).contiguous()
        return large

    def widens(self, name: str) -> bool:
        """Return whether this parameter of the large model is wider than the one it grows from."""
        axes = [axis for axis in self.large.row(name).axes if axis is not None]
        return any(self._ratios[width] > 1 for axis in axes for width in axis.widths)

    def _sources(self, large: Parameters) -> dict[str, list[str]]:
        sources: dict[str, list[str]] = {}
        for name in large:
            layer = _layer_number(name)
            target = name if layer is None else _renumbered(name, self._layer[layer])
            sources.setdefault(target, []).append(name)
        return sources

    def _targets(self, small: Parameters) -> dict[str, str]:
        targets = {name: name for name in small if _layer_number(name) is None}
        for layer, source in enumerate(self._layer):
            targets |= {_renumbered(name, layer): name for name in small if _layer_number(name) == source}
        return targets

    def _shrink(self, x: Tensor, dim: int, axis: Axis | None) -> Tensor:
        if axis is None:
            return x
        parts = []
        for part, width in zip(x.split([self.large.widths[w] for w in axis.widths], dim), axis.widths, strict=True):
            copies = part.unflatten(dim, (self._ratios[width], -1))
            parts.append(copies.mean(dim) if axis.role == "out" else copies.sum(dim))
        return torch.cat(parts, dim)

    def _grow(self, x: Tensor, dim: int, axis: Axis | None) -> Tensor:
        if axis is None:
            return x
        parts = []
        for part, width in zip(x.split([self.small.widths[w] for w in axis.widths], dim), axis.widths, strict=True):
            ratio = self._ratios[width]
            parts += [part if axis.role == "out" else part / ratio] * ratio
        return torch.cat(parts, dim)


def interpolate(large: Parameters, grown: Parameters, alpha: float) -> Parameters:
    """Return ``(1 - alpha) * large + alpha * grown`` (section 3.3).

    With ``alpha`` below 1 the copies in ``grown`` differ afterwards. Copies that are equal stay so under training, as
    their gradients are equal.

    Raises:
        ConfigError: ``alpha`` is outside 0 to 1.
        ModelError: the two do not have the same parameters.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha must be from 0 to 1, got {alpha}")
    if unlike := sorted(large.keys() ^ grown.keys()):
        raise ModelError(f"the two models do not have the same parameters: {', '.join(unlike[:5])}")
    for name, tensor in large.items():
        if tensor.shape != grown[name].shape:
            raise ModelError(f"{name} has shapes {list(tensor.shape)} and {list(grown[name].shape)}")
    return {name: torch.lerp(_wide(x), _wide(grown[name]), alpha).to(x.dtype) for name, x in large.items()}


def _layer_map(
    large: tuple[tuple[str, str], ...], small: tuple[tuple[str, str], ...], pairing: Pairing
) -> tuple[int, ...]:
    """Return for every layer of the large model the layer of the small one."""
    layers, period = len(small), _period(small)
    if len(large) % layers:
        raise ConfigError(f"{len(large)} layers are no multiple of {layers}")
    ratio = len(large) // layers
    if pairing == "stacked" or ratio == 1:
        mapped = tuple(i % layers for i in range(len(large)))
    else:
        mapped = tuple(i // period // ratio * period + i % period for i in range(len(large)))
    for i, j in enumerate(mapped):
        if large[i] != small[j]:
            raise ConfigError(
                f"layer {i} ({' and '.join(large[i])}) cannot be merged into layer {j} ({' and '.join(small[j])}): "
                "depth is divided in whole blocks of the pattern of layers"
            )
    return mapped


def _period(kinds: tuple[tuple[str, str], ...]) -> int:
    lengths = (n for n in range(1, len(kinds) + 1) if len(kinds) % n == 0)
    return next(n for n in lengths if kinds == kinds[:n] * (len(kinds) // n))


def _layer_number(name: str) -> int | None:
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def _renumbered(name: str, layer: int) -> str:
    return re.sub(r"^model\.layers\.\d+\.", f"model.layers.{layer}.", name)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
