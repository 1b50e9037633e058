"""Short examples, each a sequence of its own: what the model sees of one never comes after another.

Packed documents (:mod:`~kvbuffer.train.data`) suit texts that are longer than a sequence; a model of something short,
such as what users ask, has to learn how it begins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kvbuffer.errors import ConfigError
from kvbuffer.train.data import IGNORED, Batch, DataInfo


def write_examples(
    folder: Path,
    *,
    vocab_size: int,
    separator: int,
    stop_tokens: list[int],
    train: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    held_out_bytes: int,
) -> None:
    """Write examples to a folder with their tokenizer, where ``kvbuffer train run`` finds them.

    Args:
        folder: holds the tokenizer.
        vocab_size, separator, stop_tokens, held_out_bytes: as in :class:`~kvbuffer.train.data.DataInfo`.
        train: token ids of each example, at least two.
        held_out: the same, for evaluation.

    Raises:
        ConfigError: there are no examples to train on or to evaluate.
    """
    learned = {}
    for name, examples in (("train", train), ("held_out", held_out)):
        if not examples:
            raise ConfigError(f"there are no {name.replace('_', '-')} examples")
        rows = np.full((len(examples), max(map(len, examples))), IGNORED, np.int32)
        for row, example in zip(rows, examples, strict=True):
            row[: len(example)] = example
        np.save(folder / f"{name}.npy", rows)
        learned[name] = sum(len(example) - 1 for example in examples)
    info = DataInfo(
        vocab_size=vocab_size,
        separator=separator,
        stop_tokens=stop_tokens,
        train_tokens=learned["train"] + len(train),
        learned_tokens=learned["train"],
        held_out_tokens=learned["held_out"],
        held_out_bytes=held_out_bytes,
        packed=False,
    )
    (folder / "data.json").write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


class ExampleBatches:
    """The training batches of one seed, as :class:`~kvbuffer.train.data.Batches`, but of whole examples.

    Args:
        folder: what :func:`write_examples` wrote.
        seq_len: tokens that a row predicts at most; longer examples are cut.
        batch_size: examples per batch.
        seed: every epoch has an order of its own.
    """

    def __init__(self, folder: Path, seq_len: int, batch_size: int, seed: int) -> None:
        self._rows = np.load(folder / "train.npy", mmap_mode="r")[:, : seq_len + 1]
        self._batch_size, self._seed = batch_size, seed
        self._epoch, self._order = -1, torch.empty(0)

    def batch(self, index: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return this rank's rows of batch ``index``, filled up behind their ends with what is not learned."""
        first = index * self._batch_size
        whole = _batch(self._rows[[self._example(i) for i in range(first, first + self._batch_size)]])
        return Batch(whole.tokens[rank::world_size], whole.targets[rank::world_size], whole.learned / world_size)

    def _example(self, index: int) -> int:
        epoch, i = divmod(index, len(self._rows))
        if epoch != self._epoch:
            rng = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._rows), generator=rng)
        return int(self._order[i])


def held_out_examples(folder: Path, seq_len: int, batch_size: int, count: int) -> list[Batch]:
    """Return the first held-out ``count`` examples, or all there are."""
    rows = np.load(folder / "held_out.npy", mmap_mode="r")[:count, : seq_len + 1]
    return [_batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def _batch(rows: npt.NDArray[np.int32]) -> Batch:
    lengths = (rows != IGNORED).sum(1)
    ids = torch.from_numpy(rows[:, : int(lengths.max())].astype(np.int64))
    return Batch(ids[:, :-1].clamp(min=0), ids[:, 1:], float(lengths.sum() - len(rows)))
