"""Texts to tokens to batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from kvbuffer.errors import ConfigError
from kvbuffer.train.data import IGNORED, Batches, documents, held_out_batches, prepare, read_info
from tests.support.training import write_texts


def write_tokens(folder: Path, name: str, count: int, learned: Callable[[int], bool] = lambda token: True) -> None:
    """Write tokens 0, 1, 2, ... as prepare would."""
    np.save(folder / f"{name}.npy", np.arange(count, dtype=np.uint16))
    np.save(folder / f"{name}.learned.npy", np.array([learned(token) for token in range(count)]))


def test_every_document_is_in_one_half_and_ends_with_the_separator(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    info = prepare(texts, tmp_path / "data", vocab_size=300, held_out=0.3)
    assert read_info(tmp_path / "data") == info
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    assert info.learned_tokens == info.train_tokens
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
    assert sorted(found) == sorted(part.text for document in documents(texts) for part in document)
    again = prepare(texts, tmp_path / "again", vocab_size=300, held_out=0.3, tokenizer=tmp_path / "data")
    assert again == info


def test_jsonl_holds_texts_and_conversations_of_which_the_answers_are_learned(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"text": f"plain {i}"} for i in range(30)]
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yes"), ("user", "ho"), ("assistant", "no")]
    lines += [{"messages": [{"role": role, "content": f"{text}{i}"} for role, text in turns]} for i in range(9)]
    lines += [{"messages": [{"role": "user", "content": "nobody answers"}]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    info = prepare(tmp_path / "chats.jsonl", tmp_path / "data", vocab_size=300, held_out=0.3)
    assert info.stop_tokens == [0, 2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    texts = {True: "", False: ""}
    for name in ("train", "held_out"):
        tokens = np.load(tmp_path / "data" / f"{name}.npy")
        learned = np.load(tmp_path / "data" / f"{name}.learned.npy")
        assert len(tokens) == len(learned)
        texts[False] += tokenizer.decode(tokens)
        texts[True] += tokenizer.decode(tokens[learned])
    chat = (
        "<|im_start|>system\nbe brief3<|im_end|>\n<|im_start|>user\nhi3<|im_end|>\n"
        "<|im_start|>assistant\nyes3<|im_end|>\n<|im_start|>user\nho3<|im_end|>\n<|im_start|>assistant\nno3<|im_end|>\n"
    )
    assert f"{chat}<|endoftext|>" in texts[False]
    assert "yes3<|im_end|>\nno3<|im_end|>\n<|endoftext|>" in texts[True]
    assert "plain 7<|endoftext|>" in texts[True]
    assert not any(word in texts[True] for word in ("<|im_start|>", "brief", "hi", "ho", "nobody"))
    kept = texts[True].count("<|endoftext|>")
    assert info.learned_tokens + info.held_out_tokens == sum(
        int(np.load(tmp_path / "data" / f"{name}.learned.npy").sum()) for name in ("train", "held_out")
    )
    assert kept == 39


def test_held_out_bytes_are_those_of_what_is_learned(tmp_path: Path) -> None:
    """So bits per byte are comparable with a compressor's."""
    (tmp_path / "chats.jsonl").write_text(
        "\n".join(
            json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}], "i": i})
            for i in range(2)
        )
        + '\n{"text": "nothing else"}'
    )
    (tmp_path / "plain.txt").write_text("plain")
    info = prepare(tmp_path, tmp_path / "data", vocab_size=300, held_out=0.5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data")
    tokens = np.load(tmp_path / "data" / "held_out.npy")
    text = tokenizer.decode(tokens[np.load(tmp_path / "data" / "held_out.learned.npy")])
    assert info.held_out_bytes == len(text.replace("<|endoftext|>", "").encode())


def test_an_epoch_shows_every_sequence_once_and_the_next_one_cuts_elsewhere(tmp_path: Path) -> None:
    write_tokens(tmp_path, "train", 1000)
    batches = Batches(tmp_path, seq_len=9, batch_size=11, seed=1)
    per_epoch = 110
    rows = torch.cat([batches.batch(i).tokens for i in range(2 * per_epoch // 11)])
    assert rows.shape == (2 * per_epoch, 9)
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)  # a row is a stretch of the text
    starts = rows[:, 0].view(2, per_epoch).sort().values
    assert (starts.diff() == 9).all()
    assert starts[0, 0] != starts[1, 0]
    assert not torch.equal(rows[:per_epoch, 0].sort().values, rows[:per_epoch, 0])
    # The same batch, whenever it is asked for, by however many.
    again = Batches(tmp_path, seq_len=9, batch_size=11, seed=1)
    assert torch.equal(again.batch(13).tokens, rows[143:154])
    assert torch.equal(torch.cat([again.batch(13, rank, 11).tokens for rank in range(11)]), rows[143:154])
    assert not torch.equal(Batches(tmp_path, 9, 11, seed=2).batch(13).tokens, rows[143:154])


def test_targets_are_the_next_tokens_where_these_are_learned(tmp_path: Path) -> None:
    write_tokens(tmp_path, "train", 100, learned=lambda token: token % 3 == 0)
    batches = Batches(tmp_path, seq_len=9, batch_size=4, seed=0)
    tokens, targets, learned = batches.batch(0)
    following = tokens + 1
    assert torch.equal(targets, torch.where(following % 3 == 0, following, IGNORED))
    assert learned == (targets != IGNORED).sum()
    parts = [batches.batch(0, rank, 2) for rank in range(2)]
    assert [part.learned for part in parts] == [learned / 2] * 2


def test_held_out_sequences_are_the_first_ones(tmp_path: Path) -> None:
    write_tokens(tmp_path, "held_out", 50)
    first, second = held_out_batches(tmp_path, seq_len=9, batch_size=3, sequences=100)
    assert torch.cat((first.tokens, second.tokens))[:, 0].tolist() == [0, 9, 18, 27, 36]
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
    with pytest.raises(ConfigError, match="no held_out documents to learn from among 40"):
        prepare(write_texts(tmp_path / "texts"), tmp_path / "data", vocab_size=300, held_out=0.0)
    assert not (tmp_path / "data").exists()
    with pytest.raises(ConfigError, match="holds no prepared data"):
        read_info(tmp_path)
    with pytest.raises(ConfigError, match="lacks prepared data"):
        Batches(tmp_path, seq_len=9, batch_size=1, seed=0)
    write_tokens(tmp_path, "train", 10)
    with pytest.raises(ConfigError, match="10 training tokens are too few"):
        Batches(tmp_path, seq_len=9, batch_size=1, seed=0)
