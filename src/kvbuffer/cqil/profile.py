"""How alike the inputs of a model's layers are, over a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kvbuffer.cqil.planner import Group
from kvbuffer.cqil.text import Quality, TextModel
from kvbuffer.errors import ConfigError


class LayerProfile(NamedTuple):
    """What a layer does to the residual stream, as means over the tokens.

    Attributes:
        layer: its index.
        kind: ``linear_attention`` or ``full_attention``.
        cosine: between its input and what leaves it, the next layer's input.
        delta: norm of what it adds, relative to that of its input.
    """

    layer: int
    kind: str
    cosine: float
    delta: float


def profile_layers(text: TextModel) -> list[LayerProfile]:
    """Return the profile of every layer."""
    kinds, streams, profiles = text.model.config.layer_types, [], []

    def observe(index: int, x: Tensor) -> None:
        streams.append(x.clone())
        if index:
            before, after = streams
            cosine = F.cosine_similarity(before, after, dim=1).mean()
            delta = ((after - before).norm(dim=1) / before.norm(dim=1)).mean()
            profiles.append(LayerProfile(index - 1, kinds[index - 1], float(cosine), float(delta)))
            del streams[0]

    text.hidden(observe=observe)
    return profiles


def as_json(layers: list[LayerProfile], groups: dict[Group, Quality], bypass: int) -> dict[str, Any]:
    """Return profile and sensitivities as plain data."""
    return {
        "layers": [layer._asdict() for layer in layers],
        "bypass": bypass,
        "groups": [{"layers": group, **quality._asdict()} for group, quality in groups.items()],
    }


def plot(path: Path, layers: list[LayerProfile], groups: dict[Group, Quality]) -> None:
    """Draw profile and sensitivities.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: install it with 'pip install kvbuffer[plot]'") from None
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for kind, marker in (("linear_attention", "o"), ("full_attention", "s")):
        own = [layer for layer in layers if layer.kind == kind]
        numbers = [layer.layer for layer in own]
        name = kind.replace("_", " ")
        above.plot(numbers, [layer.cosine for layer in own], marker, label=f"cosine of input and output, {name}")
        above.plot(numbers, [layer.delta for layer in own], marker, mfc="none", label=f"relative norm added, {name}")
    for size in sorted({len(group) for group in groups}):
        own_groups = [group for group in groups if len(group) == size]
        middles = [sum(group) / size for group in own_groups]
        below.semilogy(middles, [groups[group].kl for group in own_groups], ".", label=f"groups of {size}")
    above.legend()
    below.legend()
    below.set_xlabel("layer")
    below.set_ylabel("KL from the model (nats)")
    figure.savefig(path)
