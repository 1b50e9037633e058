"""One instruction with its answer, as bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import zstandard

from kvbuffer.errors import StoreError

#: Bytes of a trained dictionary: what most answers have in common. Larger ones gained nothing.
DICTIONARY_BYTES = 64 * 1024
#: Fewer entries than this have too little in common to learn from.
_FEWEST_SAMPLES = 256
_LEVEL = 12
# An instruction and an answer of a million tokens is less than this; a damaged length is not believed.
_LARGEST_ENTRY = 1 << 23
# Whether the answer ended by itself, bytes per token id, prompt tokens, bytes of the instruction; then the instruction
# in UTF-8 and the token ids, all little-endian.
_HEAD = struct.Struct("<?BII")


class Answer(NamedTuple):
    """What the model answers to an instruction.

    Attributes:
        token_ids: output tokens, with the end of sequence where it came to that.
        ended: whether the model ended the answer; otherwise it was cut off and would go on.
        num_prompt_tokens: length of the prompt.
    """

    token_ids: list[int]
    ended: bool
    num_prompt_tokens: int


def encode(instruction: bytes, answer: Answer) -> bytes:
    """Return an entry, not compressed."""
    width = 2 if max(answer.token_ids, default=0) < 1 << 16 else 4
    head = _HEAD.pack(answer.ended, width, answer.num_prompt_tokens, len(instruction))
    return head + instruction + np.array(answer.token_ids, f"<u{width}").tobytes()


def decode(entry: bytes) -> tuple[bytes, Answer]:
    """Return an entry's instruction and answer.

    Raises:
        StoreError: the entry is damaged.
    """
    try:
        ended, width, num_prompt_tokens, length = _HEAD.unpack_from(entry)
        end = _HEAD.size + length
        ids = np.frombuffer(entry, f"<u{width}", offset=end).tolist()
    except (struct.error, ValueError, TypeError) as error:
        raise StoreError(f"an entry is damaged: {error}") from None
    return entry[_HEAD.size : end], Answer(ids, ended, num_prompt_tokens)


class Codec:
    """Compresses entries, each by itself, with a dictionary of what they have in common.

    Args:
        dictionary: a dictionary trained by :func:`train_dictionary`; empty for none.
    """

    def __init__(self, dictionary: bytes = b"") -> None:
        self.dictionary = dictionary
        trained = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
        self._compressor = zstandard.ZstdCompressor(_LEVEL, dict_data=trained, write_checksum=True)
        self._decompressor = zstandard.ZstdDecompressor(dict_data=trained)

    def compress(self, entry: bytes) -> bytes:
        """Return the entry with a checksum in fewer bytes."""
        return self._compressor.compress(entry)

    def decompress(self, data: bytes | memoryview) -> bytes:
        """Return the entry behind ``data``.

        Raises:
            StoreError: it is damaged.
        """
        try:
            if zstandard.frame_content_size(data) > _LARGEST_ENTRY:
                raise StoreError("an entry is damaged: its length cannot be true")
            return self._decompressor.decompress(data)
        except zstandard.ZstdError as error:
            raise StoreError(f"an entry is damaged: {error}") from None


def train_dictionary(entries: Sequence[bytes]) -> bytes:
    """Return a dictionary for entries like these; empty if they are too few or have nothing in common."""
    if len(entries) < _FEWEST_SAMPLES:
        return b""
    try:
        return zstandard.train_dictionary(DICTIONARY_BYTES, list(entries)).as_bytes()
    except zstandard.ZstdError:
        return b""
