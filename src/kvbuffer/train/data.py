"""Texts to tokens on disk, and tokens to batches.

Documents are packed end to end with an end-of-text token after each, and cut into sequences of equal length; the model
sees across the joints, as is usual in pre-training. Which sequences make up batch i depends on the seed and i alone, so
a run can go on anywhere, on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from kvbuffer.errors import ConfigError
from kvbuffer.train.checkpoints import copy_companions, new_folder
from kvbuffer.train.defaults import PATTERNS
from kvbuffer.train.tokenizer import END_OF_TURN, train_tokenizer

_ENCODE_AT_ONCE = 256


@dataclass(frozen=True)
class DataInfo:
    """What ``data.json`` says.

    Attributes:
        vocab_size: token ids are below this.
        separator: the token after each document.
        stop_tokens: tokens that end generation.
        train_tokens, held_out_tokens: their numbers, separators included.
        held_out_bytes: UTF-8 bytes of the held-out documents.
    """

    vocab_size: int
    separator: int
    stop_tokens: list[int]
    train_tokens: int
    held_out_tokens: int
    held_out_bytes: int


def documents(folder: Path, patterns: tuple[str, ...] = PATTERNS, template: Any = None) -> Iterator[str]:
    """Yield the texts of a folder, or of one file, in the order of their paths.

    A line of a ``.jsonl`` file holds one document: ``{"text": ...}``, or ``{"messages": [...]}`` for ``template``, a
    function that makes a text of a conversation.

    Raises:
        ConfigError: nothing matches, or a file is not UTF-8 or not what its name says.
    """
    files = [folder] if folder.is_file() else sorted({f for p in patterns for f in folder.rglob(p) if f.is_file()})
    if not files:
        raise ConfigError(f"no files in {folder} match {', '.join(patterns)}")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 text ({error}); leave it out with --patterns") from None
        if file.suffix == ".jsonl":
            for number, line in enumerate(text.splitlines(), 1):
                if line.strip():
                    yield _json_document(line, f"{file}:{number}", template)
        elif text.strip():
            yield text


def _json_document(line: str, where: str, template: Any) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record, dict) and isinstance(record.get("messages"), list) and template is not None:
        return str(template(record["messages"]))
    raise ConfigError(f'{where} must be an object with "text", or with "messages"')


def prepare(
    source: Path,
    out: Path,
    *,
    vocab_size: int,
    tokenizer: Path | None = None,
    held_out: float,
    patterns: tuple[str, ...] = PATTERNS,
) -> DataInfo:
    """Write the tokens of all texts in ``source`` to ``out``, with the tokenizer beside them.

    Args:
        source: folder of texts, or one file; see :func:`documents`.
        out: folder to write.
        vocab_size: of the tokenizer that is trained on these texts, unless
        tokenizer: is a folder that holds one.
        held_out: share of the documents to keep for evaluation, chosen by their content.
        patterns: names of files to take.

    Raises:
        ConfigError: there is no text, none is held out, or ``out`` exists.
    """
    with new_folder(out) as folder:
        if tokenizer is None:
            train_tokenizer(documents(source, patterns, _plain_conversation), vocab_size, folder)
        else:
            copy_companions(tokenizer, folder)
        encoder = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        separator = encoder.eos_token_id
        if separator is None:
            raise ConfigError(f"the tokenizer in {tokenizer} has no end-of-text token")

        def conversation(messages: list[dict[str, str]]) -> str:
            return str(encoder.apply_chat_template(messages, tokenize=False))

        parts: dict[bool, list[np.ndarray[Any, Any]]] = {True: [], False: []}
        dtype = np.uint16 if len(encoder) <= 2**16 else np.uint32
        bytes_held_out, batch = 0, list[str]()

        def encode() -> None:
            for text, ids in zip(batch, encoder(batch, add_special_tokens=False)["input_ids"], strict=True):
                parts[_is_held_out(text, held_out)].append(np.array([*ids, separator], dtype))
            batch.clear()

        for text in documents(source, patterns, conversation):
            bytes_held_out += len(text.encode()) * _is_held_out(text, held_out)
            batch.append(text)
            if len(batch) == _ENCODE_AT_ONCE:
                encode()
        if batch:
            encode()
        for name, chosen in (("train", False), ("held_out", True)):
            if not parts[chosen]:
                raise ConfigError(f"no {name} documents among {sum(map(len, parts.values()))}; change --held-out")
            np.save(folder / f"{name}.npy", np.concatenate(parts[chosen]))
        end_of_turn = encoder.convert_tokens_to_ids(END_OF_TURN)
        stop = [separator] if end_of_turn in (None, encoder.unk_token_id) else [separator, end_of_turn]
        train, kept = (sum(map(len, parts[chosen])) for chosen in (False, True))
        info = DataInfo(len(encoder), separator, stop, train, kept, bytes_held_out)
        (folder / "data.json").write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    return info


def _plain_conversation(messages: list[dict[str, str]]) -> str:
    return "\n".join(str(message.get("content", "")) for message in messages)


def _is_held_out(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def read_info(folder: Path) -> DataInfo:
    """Read what ``prepare`` wrote about its data.

    Raises:
        ConfigError: the folder was not made by it.
    """
    try:
        return DataInfo(**json.loads((folder / "data.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{folder} holds no prepared data ({error}); make it with kvbuffer train prepare") from None


class Batches:
    """The training batches of one seed.

    Args:
        folder: prepared data.
        seq_len: tokens that a sequence predicts.
        batch_size: sequences per batch.
        seed: every epoch has an order of its own, and cuts the text in other places.

    Raises:
        ConfigError: the text is shorter than two sequences.
    """

    def __init__(self, folder: Path, seq_len: int, batch_size: int, seed: int) -> None:
        self._tokens = np.load(folder / "train.npy", mmap_mode="r")
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self._per_epoch = len(self._tokens) // seq_len - 1
        if self._per_epoch < 1:
            raise ConfigError(f"{len(self._tokens)} training tokens are too few for sequences of {seq_len}")
        self._epoch, self._order, self._offset = -1, torch.empty(0), 0

    def batch(self, index: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """Return this rank's rows of batch ``index``: token ids [rows, seq_len + 1], int64."""
        first = index * self._batch_size
        rows = [self._sequence(i) for i in range(first + rank, first + self._batch_size, world_size)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _sequence(self, index: int) -> np.ndarray[Any, Any]:
        epoch, i = divmod(index, self._per_epoch)
        if epoch != self._epoch:
            rng = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
            self._order = torch.randperm(self._per_epoch, generator=rng)
            self._offset = int(torch.randint(self._seq_len, (), generator=rng))
            self._epoch = epoch
        start = self._offset + int(self._order[i]) * self._seq_len
        return np.asarray(self._tokens[start : start + self._seq_len + 1])


def held_out_batches(folder: Path, seq_len: int, batch_size: int, sequences: int) -> list[Tensor]:
    """Return the first held-out ``sequences`` (or all there are) as batches [rows, seq_len + 1], int64.

    Raises:
        ConfigError: the held-out text is shorter than one sequence.
    """
    tokens = np.load(folder / "held_out.npy", mmap_mode="r")
    count = min(sequences, (len(tokens) - 1) // seq_len)
    if count < 1:
        raise ConfigError(f"{len(tokens)} held-out tokens are fewer than a sequence of {seq_len}; hold out more")
    rows = torch.from_numpy(np.stack([tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)]).astype(int))
    return list(rows.split(batch_size))
