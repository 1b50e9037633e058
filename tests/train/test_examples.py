"""Examples in sequences of their own: whole, each once per epoch, with nothing learned behind their ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kvbuffer.errors import ConfigError
from kvbuffer.train.data import IGNORED, Batch, read_info
from kvbuffer.train.examples import ExampleBatches, held_out_examples, write_examples
from kvbuffer.train.model import loss_of
from tests.support.training import config_of, model_of

EXAMPLES = [list(range(1, 2 + length)) for length in (1, 4, 2, 7, 3, 5, 1, 2, 6, 3)]


def write(folder: Path, held_out: list[list[int]]) -> None:
    write_examples(
        folder, vocab_size=9, separator=0, stop_tokens=[0], train=EXAMPLES, held_out=held_out, held_out_bytes=12
    )


def examples_of(batch: Batch) -> list[list[int]]:
    """The examples of a batch, put together from what is read and what is predicted."""
    found = []
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        end = targets.index(IGNORED) if IGNORED in targets else len(targets)
        assert set(targets[end:]) <= {IGNORED}
        assert tokens[1:end] == targets[: end - 1]
        found.append([tokens[0], *targets[:end]])
    assert batch.learned == sum(len(example) - 1 for example in found)
    return found


def test_an_epoch_shows_every_example_whole_and_once(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLES[:1])
    batches = ExampleBatches(tmp_path, seq_len=7, batch_size=5, seed=1)
    first, second = ([*examples_of(batches.batch(i)), *examples_of(batches.batch(i + 1))] for i in (0, 2))
    assert sorted(first) == sorted(second) == sorted(EXAMPLES)
    assert first != second
    again = ExampleBatches(tmp_path, 7, 5, seed=1)
    assert examples_of(again.batch(3)) == second[5:]
    parts = [again.batch(3, rank, 5) for rank in range(5)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), batches.batch(3).tokens)
    assert sum(part.learned for part in parts) == batches.batch(3).learned
    cut = ExampleBatches(tmp_path, seq_len=3, batch_size=10, seed=1)
    assert sorted(examples_of(cut.batch(0))) == sorted(example[:4] for example in EXAMPLES)


def test_held_out_examples_and_what_is_said_of_them(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLES[:7])
    batches = held_out_examples(tmp_path, seq_len=7, batch_size=3, count=5)
    assert [example for batch in batches for example in examples_of(batch)] == EXAMPLES[:5]
    info = json.loads((tmp_path / "data.json").read_text())
    assert read_info(tmp_path).packed is info["packed"] is False
    assert info["learned_tokens"] == sum(len(example) - 1 for example in EXAMPLES)
    with pytest.raises(ConfigError, match="no held-out examples"):
        write(tmp_path, [])


def test_what_fills_a_row_changes_no_loss(tmp_path: Path) -> None:
    write(tmp_path, EXAMPLES)
    model = model_of(config_of("qwen3_5", vocab_size=9, num_hidden_layers=4))
    [together] = held_out_examples(tmp_path, 7, 10, 10)
    alone = held_out_examples(tmp_path, 7, 1, 10)
    expected = sum(loss_of(model, one).cross_entropy * one.learned for one in alone) / together.learned
    torch.testing.assert_close(loss_of(model, together).cross_entropy, expected)
