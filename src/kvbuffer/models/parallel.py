"""One model on several processes: heads and MLPs split between them, or the layers of a group placed one on each.

Every rank has the whole residual stream. A layer that stands alone is split (tensor parallelism): each rank has a part
of its heads, with their states, buffers, keys and values, and a part of every MLP's and expert's intermediate columns;
two sums over the ranks per layer. So are groups whose number of layers the ranks do not divide. The layers of the other
groups are placed: layer number i of a group is whole on rank i mod R, and one sum per group is all that ranks exchange,
beside the mixers' outputs where there is a bypass. Either way each rank holds the same share of the memory, in the same
shape. Embedding and head are split by the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.errors import ConfigError
from kvbuffer.models.adapter import Adapter
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import LAYOUTS, Decoder, DecoderLayer, Unit, read_layer
from kvbuffer.models.group import LayerGroup, banded, read_group
from kvbuffer.models.layers import RotaryTable
from kvbuffer.models.weights import WeightReader
from kvbuffer.ops.batch import ModelInputs
from kvbuffer.ops.linear import Linear


class Ranks(Protocol):
    """The processes.

    Attributes:
        rank: this one's number, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of every rank's ``x``, which is overwritten."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Return every rank's ``x``, [size, *x.shape]."""
        ...

    def send(self, message: object) -> None:
        """Tell the other ranks something; for rank 0."""
        ...


def shard_config(config: ModelConfig, ranks: int) -> ModelConfig:
    """Return the configuration of one rank's part.

    Raises:
        ConfigError: something cannot be divided by the number of ranks.
    """
    linear, moe = config.linear, config.moe
    sizes = {
        "vocab_size": config.vocab_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
    }
    if moe is not None:
        sizes["moe_intermediate_size"] = moe.intermediate_size
        sizes["shared_expert_intermediate_size"] = moe.shared_intermediate_size
    if odd := {name: size for name, size in sizes.items() if size % ranks}:
        shown = ", ".join(f"{name} ({size})" for name, size in odd.items())
        raise ConfigError(f"--tensor-parallel-size {ranks} does not divide the model's {shown}: lower it")
    return replace(
        config,
        vocab_size=config.vocab_size // ranks,
        num_heads=config.num_heads // ranks,
        num_kv_heads=config.num_kv_heads // ranks,
        intermediate_size=config.intermediate_size // ranks,
        linear=replace(
            linear,
            num_key_heads=linear.num_key_heads // ranks,
            num_value_heads=linear.num_value_heads // ranks,
        ),
        moe=moe
        and replace(
            moe,
            intermediate_size=moe.intermediate_size // ranks,
            shared_intermediate_size=moe.shared_intermediate_size // ranks,
        ),
    )


class ShardedReader(WeightReader):
    """A checkpoint of which one rank's part is asked for: tensors are cut where they are larger than asked.

    Args:
        folder, dtype, ignored, show_progress, adapter: as for :class:`WeightReader`.
        config: of the whole model.
        ranks: the processes.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        ignored: Sequence[str],
        show_progress: bool,
        adapter: Adapter | None,
        config: ModelConfig,
        ranks: Ranks,
    ) -> None:
        super().__init__(folder, dtype, ignored, show_progress, adapter)
        self._config, self._ranks, self._cuts = config, ranks, True

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Cut nothing."""
        self._cuts = False
        try:
            yield
        finally:
            self._cuts = True

    def _read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size, rank, whole = self._ranks.size, self._ranks.rank, self.shape_of(name)
        cut = [d for d, (have, want) in enumerate(zip(whole, shape, strict=False)) if have == want * size != want]
        if not self._cuts or len(cut) != 1:
            tensor = super()._read(name, shape)
            # It is added to a sum over the ranks.
            return torch.zeros_like(tensor) if rank and self._cuts and name.endswith("o_proj.bias") else tensor
        dim, tensor = cut[0], super()._read(name, whole)
        parts: tuple[int, ...] = (whole[dim],)
        if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
            parts = self._config.linear.conv_parts
        elif name.endswith("gate_up_proj"):
            parts = (whole[dim] // 2, whole[dim] // 2)
        own = [part.chunk(size, dim)[rank] for part in tensor.split(parts, dim)]
        return torch.cat(own, dim)


class ShardedLayer:
    """A layer of which each rank has a part."""

    def __init__(self, layer: DecoderLayer, ranks: Ranks) -> None:
        self.layer, self.ranks = layer, ranks

    def forward(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache | AttentionCache
    ) -> Tensor:
        """As :meth:`DecoderLayer.forward`."""
        mixed = self.layer.mixer.forward(x, residual, inputs, cache)  # type: ignore[arg-type]  # its kind of cache
        return self.ranks.all_reduce(self.layer.mlp.forward(self.ranks.all_reduce(mixed), residual))


class ShardedGroup:
    """A group of layers of which each rank has a part."""

    def __init__(self, group: LayerGroup, ranks: Ranks) -> None:
        self.group, self.ranks = group, ranks

    def forward(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache | AttentionCache
    ) -> Tensor:
        """As :meth:`LayerGroup.forward`."""
        mixed = self.ranks.all_reduce(self.group.mix(x, residual, inputs, cache))
        return self.ranks.all_reduce(self.group.after(residual, self.group.sees, mixed)).add_(mixed.sum(0))


class PlacedGroup:
    """A group of layers of which each rank has some.

    Args:
        own: this rank's layers: those in the places rank, rank + R, … of the group.
        count: layers of the group, a multiple of R.
        bypass: D.
        ranks: the processes.
    """

    def __init__(self, own: LayerGroup, count: int, bypass: int, ranks: Ranks) -> None:
        self.own, self.ranks, self.bypass = own, ranks, bypass
        self.sees = banded(count, bypass)[ranks.rank :: ranks.size] if bypass else own.sees

    def forward(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache | AttentionCache
    ) -> Tensor:
        """As :meth:`LayerGroup.forward`."""
        mixed = self.own.mix(x, residual, inputs, cache)
        every = self.ranks.all_gather(mixed).transpose(0, 1).flatten(0, 1) if self.bypass else mixed
        return self.ranks.all_reduce(self.own.after(residual, self.sees, every).add_(mixed.sum(0)))


class PlacedLayer:
    """A group of as many layers as there are ranks: one on each, where nothing has to be gathered into a group's rows.

    Args:
        own: this rank's layer.
        bypass: D.
        ranks: the processes.
    """

    def __init__(self, own: DecoderLayer, bypass: int, ranks: Ranks) -> None:
        self.own, self.ranks, self.bypass = own, ranks, bypass
        self.first = max(0, ranks.rank - bypass)

    def forward(
        self, x: Tensor | None, residual: Tensor, inputs: ModelInputs, cache: LinearCache | AttentionCache
    ) -> Tensor:
        """As :meth:`LayerGroup.forward`."""
        seen = mixed = self.own.mixer.forward(x, residual, inputs, cache)  # type: ignore[arg-type]  # its kind of cache
        if self.bypass:
            seen = self.ranks.all_gather(mixed)[self.first : self.ranks.rank + 1].sum(0)
        return self.ranks.all_reduce(self.own.mlp.forward(seen, residual.clone()).add_(mixed))


class GatheredHead(Linear):
    """The output layer, of which each rank has a part of the vocabulary; every rank gets all logits."""

    def __init__(self, weight: Tensor, ranks: Ranks) -> None:
        super().__init__(weight)
        self._ranks = ranks

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """As of all of it."""
        return self._gather(super().__call__(x, out))

    def of_add_rms_norm(self, x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As of all of it."""
        return self._gather(super().of_add_rms_norm(x, residual, weight, eps))

    def _gather(self, logits: Tensor) -> Tensor:
        return self._ranks.all_gather(logits).transpose(0, 1).flatten(1)


class ParallelDecoder(Decoder):
    """One rank's part of a decoder. What rank 0 is asked to compute, it has the others compute with it.

    Args:
        folder, dtype, max_model_len, show_progress, groups, bypass, adapter: as for :class:`Decoder`.
        config: of the whole model.
        ranks: the processes.

    Raises:
        ConfigError: the model cannot be split into as many parts.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        max_model_len: int,
        show_progress: bool,
        groups: Sequence[tuple[int, ...]],
        bypass: int,
        adapter: Adapter | None,
        ranks: Ranks,
    ) -> None:
        self.ranks, self.whole_config = ranks, config
        own = shard_config(config, ranks.size)
        super().__init__(folder, own, dtype, max_model_len, show_progress, groups, bypass, adapter)

    def _open(self, folder: Path, ignored: Sequence[str], show_progress: bool) -> WeightReader:
        adapter, config = self._adapter, self.whole_config
        return ShardedReader(folder, self.dtype, ignored, show_progress, adapter, config, self.ranks)

    def _head(self, weight: Tensor) -> Linear:
        return GatheredHead(weight, self.ranks)

    def _unit(
        self, reader: WeightReader, layers: str, indices: tuple[int, ...], rotary: RotaryTable, bypass: int
    ) -> Unit:
        ranks, config = self.ranks, self.whole_config
        if len(indices) == 1 or len(indices) % ranks.size:
            unit = super()._unit(reader, layers, indices, rotary, bypass)
            return ShardedGroup(unit, ranks) if isinstance(unit, LayerGroup) else ShardedLayer(unit, ranks)  # type: ignore[arg-type]  # by the base class
        assert isinstance(reader, ShardedReader)
        own = indices[ranks.rank :: ranks.size]
        for index in set(indices).difference(own):
            reader.skip(f"{layers}{index}.")
        with reader.whole():
            if len(own) == 1:
                return PlacedLayer(read_layer(reader, layers, own[0], config, rotary), bypass, ranks)
            group = read_group(reader, layers, own, config, LAYOUTS[config.layout].in_proj, rotary, 0)
        return PlacedGroup(group, len(indices), bypass, ranks)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the embeddings of tokens [N], [N, hidden] float32."""
        own = token_ids - self.ranks.rank * len(self.embedding)
        elsewhere = (own < 0) | (own >= len(self.embedding))
        rows = F.embedding(own.masked_fill(elsewhere, 0), self.embedding).float()
        return self.ranks.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(1), 0.0))

    def forward(self, inputs: ModelInputs, caches: Sequence[LinearCache | AttentionCache]) -> Tensor:
        """As :meth:`Decoder.forward`, on all ranks."""
        if self.ranks.rank == 0:
            self.ranks.send(inputs)
        return super().forward(inputs, caches)
