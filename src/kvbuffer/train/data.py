"""Texts to tokens on disk, and tokens to batches.

Documents are packed end to end with an end-of-text token after each, and cut into sequences of equal length; the model
sees across the joints, as is usual in pre-training. Of conversations only the answers are learned. Which sequences make
up batch i depends on the seed and i alone, so a run can go on anywhere, on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from kvbuffer.errors import ConfigError
from kvbuffer.train.checkpoints import copy_companions, new_folder
from kvbuffer.train.defaults import PATTERNS
from kvbuffer.train.tokenizer import END_OF_TEXT, END_OF_TURN, train_tokenizer

#: Target of a token that is not to be predicted, as in ``torch.nn.functional.cross_entropy``.
IGNORED = -100
_ENCODE_AT_ONCE = 256


class Part(NamedTuple):
    """A piece of a document, and whether it is learned or only read."""

    text: str
    learned: bool = True


Document = tuple[Part, ...]
Array = np.ndarray[Any, Any]


class Batch(NamedTuple):
    """Token ids and, one place ahead, what is to be predicted from them: both [rows, seq_len], int64.

    Targets are ``IGNORED`` where nothing is learned. ``learned`` is how many are not: where processes share a batch,
    the mean over them, so that the mean of their losses is the loss of the whole batch.
    """

    tokens: Tensor
    targets: Tensor
    learned: float


@dataclass(frozen=True)
class DataInfo:
    """What ``data.json`` says.

    Attributes:
        vocab_size: token ids are below this.
        separator: the token after each document.
        stop_tokens: tokens that end generation.
        train_tokens: their number, separators included.
        learned_tokens: those of them that are predicted.
        held_out_tokens: predicted tokens of the held-out documents.
        held_out_bytes: UTF-8 bytes of what these say.
        packed: whether documents stand end to end in the sequences; otherwise each is one of its own.
    """

    vocab_size: int
    separator: int
    stop_tokens: list[int]
    train_tokens: int
    learned_tokens: int
    held_out_tokens: int
    held_out_bytes: int
    packed: bool = True


def documents(folder: Path, patterns: tuple[str, ...] = PATTERNS, template: Any = None) -> Iterator[Document]:
    """Yield the documents of a folder, or of one file, in the order of their paths.

    A line of a ``.jsonl`` file holds one document: ``{"text": ...}``, or ``{"messages": [...]}`` for ``template``, a
    function that makes a document of a conversation.

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
            yield (Part(text),)


def _json_document(line: str, where: str, template: Any) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from None
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return (Part(record["text"]),)
    if isinstance(record, dict) and isinstance(record.get("messages"), list) and template is not None:
        return tuple(template(record["messages"]))
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
            plain = (part.text for document in documents(source, patterns, _messages) for part in document)
            train_tokenizer(plain, vocab_size, folder)
        else:
            copy_companions(tokenizer, folder)
        encoder = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        end_of_text, end_of_turn = (_token_id(encoder, token) for token in (END_OF_TEXT, END_OF_TURN))
        separator = encoder.eos_token_id if end_of_text is None else end_of_text
        if separator is None:
            raise ConfigError(f"the tokenizer in {tokenizer} has no end-of-text token")
        writers = {False: _Writer(separator), True: _Writer(separator)}
        chosen = documents(source, patterns, lambda messages: _conversation(encoder, messages))
        while batch := list(islice(chosen, _ENCODE_AT_ONCE)):
            ids = encoder([part.text for document in batch for part in document], add_special_tokens=False)["input_ids"]
            encoded = iter(ids)
            for document in batch:
                writers[_is_held_out(document, held_out)].add(document, [next(encoded) for _ in document])
        dtype = np.uint16 if len(encoder) <= 2**16 else np.uint32
        for name, is_held_out in (("train", False), ("held_out", True)):
            if not any(writers[is_held_out].learned):
                count = sum(writer.documents for writer in writers.values())
                raise ConfigError(f"no {name} documents to learn from among {count}; change --held-out")
            writers[is_held_out].write(folder, name, dtype)
        train, kept = writers[False], writers[True]
        stop_tokens = [separator]
        if end_of_turn is not None and end_of_turn != separator:
            stop_tokens.append(end_of_turn)
        info = DataInfo(
            vocab_size=len(encoder),
            separator=separator,
            stop_tokens=stop_tokens,
            train_tokens=len(train.tokens),
            learned_tokens=sum(train.learned),
            held_out_tokens=sum(kept.learned),
            held_out_bytes=kept.learned_bytes,
        )
        (folder / "data.json").write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")
    return info


class _Writer:
    """Collects documents' tokens, and which of them are learned."""

    def __init__(self, separator: int) -> None:
        self.tokens, self.learned = array("I"), array("B")
        self.documents = self.learned_bytes = 0
        self._separator = separator

    def add(self, document: Document, encoded: list[list[int]]) -> None:
        """Append a document's parts and a separator, which is learned if the last part is."""
        self.documents += 1
        for part, ids in zip(document, encoded, strict=True):
            self.tokens.extend(ids)
            self.learned.extend([part.learned] * len(ids))
            self.learned_bytes += part.learned * len(part.text.encode())
        self.tokens.append(self._separator)
        self.learned.append(document[-1].learned)

    def write(self, folder: Path, name: str, dtype: Any) -> None:
        """Write ``NAME.npy`` and ``NAME.learned.npy``."""
        np.save(folder / f"{name}.npy", np.array(self.tokens, dtype))
        np.save(folder / f"{name}.learned.npy", np.array(self.learned, bool))


def _conversation(encoder: Any, messages: list[dict[str, str]]) -> Iterator[Part]:
    """Yield a conversation in the tokenizer's chat template; answers are learned, all else is read."""
    done = 0
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            prompt = encoder.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            text = encoder.apply_chat_template(messages[: i + 1], tokenize=False)
            if not text.startswith(prompt):
                raise ConfigError("the chat template changes what came before when an answer is added; use another one")
            yield Part(prompt[done:], learned=False)
            yield Part(text[len(prompt) :])
            done = len(text)
    if rest := encoder.apply_chat_template(messages, tokenize=False)[done:]:
        yield Part(rest, learned=False)


def _messages(messages: list[dict[str, str]]) -> Document:
    return tuple(Part(str(message.get("content", ""))) for message in messages)


def _token_id(encoder: Any, token: str) -> int | None:
    found = encoder.convert_tokens_to_ids(token)
    return None if found == encoder.unk_token_id else found


def _is_held_out(document: Document, share: float) -> bool:
    digest = hashlib.sha256("".join(part.text for part in document).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


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
        self._tokens, self._learned = _load(folder, "train")
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self._per_epoch = len(self._tokens) // seq_len - 1
        if self._per_epoch < 1:
            raise ConfigError(f"{len(self._tokens)} training tokens are too few for sequences of {seq_len}")
        self._epoch, self._order, self._offset = -1, torch.empty(0), 0

    def batch(self, index: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return this rank's rows of batch ``index``."""
        first = index * self._batch_size
        starts = [self._start(i) for i in range(first, first + self._batch_size)]
        whole = _batch(self._tokens, self._learned, starts, self._seq_len)
        return Batch(whole.tokens[rank::world_size], whole.targets[rank::world_size], whole.learned / world_size)

    def _start(self, index: int) -> int:
        epoch, i = divmod(index, self._per_epoch)
        if epoch != self._epoch:
            rng = torch.Generator().manual_seed(1_000_003 * self._seed + epoch)
            self._order = torch.randperm(self._per_epoch, generator=rng)
            self._offset = int(torch.randint(self._seq_len, (), generator=rng))
            self._epoch = epoch
        return self._offset + int(self._order[i]) * self._seq_len


def held_out_batches(folder: Path, seq_len: int, batch_size: int, sequences: int) -> list[Batch]:
    """Return the first held-out ``sequences`` (or all there are).

    Raises:
        ConfigError: the held-out text is shorter than one sequence.
    """
    tokens, learned = _load(folder, "held_out")
    count = min(sequences, (len(tokens) - 1) // seq_len)
    if count < 1:
        raise ConfigError(f"{len(tokens)} held-out tokens are fewer than a sequence of {seq_len}; hold out more")
    starts = [i * seq_len for i in range(count)]
    return [_batch(tokens, learned, starts[i : i + batch_size], seq_len) for i in range(0, count, batch_size)]


def _load(folder: Path, name: str) -> tuple[Array, Array]:
    try:
        tokens, learned = (np.load(folder / f"{name}{kind}.npy", mmap_mode="r") for kind in ("", ".learned"))
    except OSError as error:
        raise ConfigError(f"{folder} lacks prepared data ({error}); make it with kvbuffer train prepare") from None
    return tokens, learned


def _batch(tokens: Array, learned: Array, starts: list[int], seq_len: int) -> Batch:
    rows = np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64)
    keep = np.stack([learned[start + 1 : start + seq_len + 1] for start in starts])
    targets = np.where(keep, rows[:, 1:], IGNORED)
    return Batch(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(targets), float(keep.sum()))
