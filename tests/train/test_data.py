"""Texts to tokens to batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kvbuffer.errors import ConfigError
from kvbuffer.train.data import Batches, documents, held_out_batches, prepare, read_info
from tests.support.training import write_texts


def test_every_document_is_in_one_half_and_ends_with_the_separator(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    info = prepare(texts, tmp_path / "data", vocab_size=300, held_out=0.3)
    assert read_info(tmp_path / "data") == info
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    found = []
    for name, count in (("train", info.train_tokens), ("held_out", info.held_out_tokens)):
        tokens = np.load(tmp_path / "data" / f"{name}.npy")
        assert tokens.dtype == np.uint16
        assert len(tokens) == count
        assert tokens.max() < info.vocab_size
        *parts, rest = tokenizer.decode(tokens).split("<|endoftext|>")
        assert not rest
        assert parts
        found += parts
    assert sorted(found) == sorted(documents(texts))
    again = prepare(texts, tmp_path / "again", vocab_size=300, held_out=0.3, tokenizer=tmp_path / "data")
    assert again == info


def test_jsonl_holds_texts_and_conversations(tmp_path: Path) -> None:
    lines = [{"text": f"plain {i}"} for i in range(30)]
    lines += [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(i)}]} for i in range(9)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare(tmp_path / "chats.jsonl", tmp_path / "data", vocab_size=300, held_out=0.3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    text = "".join(tokenizer.decode(np.load(tmp_path / "data" / f"{name}.npy")) for name in ("train", "held_out"))
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n<|endoftext|>" in text
    assert read_info(tmp_path / "data").stop_tokens == [0, 2]


def test_an_epoch_shows_every_sequence_once_and_the_next_one_cuts_elsewhere(tmp_path: Path) -> None:
    np.save(tmp_path / "train.npy", np.arange(1000, dtype=np.uint16))
    batches = Batches(tmp_path, seq_len=9, batch_size=11, seed=1)
    per_epoch = 110
    rows = torch.cat([batches.batch(i) for i in range(2 * per_epoch // 11)])
    assert rows.shape == (2 * per_epoch, 10)
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)  # a row is a stretch of the text
    starts = rows[:, 0].view(2, per_epoch).sort().values
    assert (starts.diff() == 9).all()
    assert starts[0, 0] != starts[1, 0]
    assert not torch.equal(rows[:per_epoch, 0].sort().values, rows[:per_epoch, 0])
    # The same batch, whenever it is asked for, by however many.
    again = Batches(tmp_path, seq_len=9, batch_size=11, seed=1)
    assert torch.equal(again.batch(13), rows[143:154])
    assert torch.equal(torch.cat([again.batch(13, rank, 11) for rank in range(11)]), rows[143:154])
    assert not torch.equal(Batches(tmp_path, 9, 11, seed=2).batch(13), rows[143:154])


def test_held_out_sequences_are_the_first_ones(tmp_path: Path) -> None:
    np.save(tmp_path / "held_out.npy", np.arange(50, dtype=np.uint16))
    first, second = held_out_batches(tmp_path, seq_len=9, batch_size=3, sequences=100)
    assert torch.cat((first, second))[:, 0].tolist() == [0, 9, 18, 27, 36]
    assert len(held_out_batches(tmp_path, 9, 3, sequences=2)) == 1


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no files in"):
        list(documents(tmp_path))
    (tmp_path / "odd.jsonl").write_text('{"text": "a"}\n{"texts": 1}\n')
    with pytest.raises(ConfigError, match=r"odd\.jsonl:2 must be an object"):
        list(documents(tmp_path))
    (tmp_path / "odd.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"odd\.jsonl:1 is not JSON"):
        list(documents(tmp_path))
    (tmp_path / "odd.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"odd\.txt is not UTF-8"):
        list(documents(tmp_path, ("*.txt",)))
    with pytest.raises(ConfigError, match="no held_out documents among 40"):
        prepare(write_texts(tmp_path / "texts"), tmp_path / "data", vocab_size=300, held_out=0.0)
    assert not (tmp_path / "data").exists()
    with pytest.raises(ConfigError, match="holds no prepared data"):
        read_info(tmp_path)
    np.save(tmp_path / "train.npy", np.arange(10, dtype=np.uint16))
    with pytest.raises(ConfigError, match="10 training tokens are too few"):
        Batches(tmp_path, seq_len=9, batch_size=1, seed=0)
