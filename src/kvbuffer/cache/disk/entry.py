"""The format of a file: one prefix, checked in full before any of it is used.

    prologue   magic, version, bytes of the head, BLAKE2b of the head, CRC-32 of the payload
    head       one line of JSON (Head without its tokens), then the tokens, int32
    payload    the blocks' bytes

The checks are against accidents, not against whoever may write to the folder. Integers are in the machine's byte order.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvbuffer.cache.snapshot import Snapshot

MAGIC = b"kvbuffer"
#: To be raised whenever files of before would be misread.
VERSION = 1
SUFFIX = ".kvprefix"
#: Of files that are being written, and of those that a crash left half written.
TEMPORARY_SUFFIX = ".writing"
#: Bytes of a token in a head.
TOKEN_BYTES = 4
_PROLOGUE = struct.Struct("=8sII16sI")
_CHECK_BYTES = 1 << 20


class BadEntryError(Exception):
    """A file that is not an entry, or not a whole one; the message is the reason."""


class Geometry(NamedTuple):
    """What was saved of a prefix: the range in which it ends, and how many blocks of each kind.

    Attributes:
        start: shortest prefix that the blocks hold the memory of.
        end: longest.
        checkpoint: tokens that are folded into the state; 0 without a state.
        has_state: whether there is a state.
        attention_pages: number of attention pages.
        record_pages: number of record pages.
    """

    start: int
    end: int
    checkpoint: int
    has_state: bool
    attention_pages: int
    record_pages: int

    @classmethod
    def of(cls, attention_pages: Sequence[int], snapshot: Snapshot) -> Geometry:
        """Return the geometry of blocks that are about to be saved."""
        return cls(
            snapshot.start,
            snapshot.end,
            snapshot.checkpoint,
            snapshot.slot is not None,
            len(attention_pages),
            len(snapshot.record_pages),
        )

    def is_sound(self) -> bool:
        """Return whether the numbers can be those of a prefix."""
        return (
            0 <= self.checkpoint <= self.start <= self.end
            and self.end > 0
            and self.attention_pages >= 0
            and self.record_pages >= 0
            and (self.has_state or self.checkpoint == 0)
        )


@dataclass(frozen=True)
class Head:
    """All that is known of an entry without its payload.

    Attributes:
        fingerprint: of the model and the blocks' layout.
        salt: digest of the salt that the prefix may be shared under.
        geometry: what the payload holds.
        payload_bytes: its size.
        tokens: the prefix, int32 each.
    """

    fingerprint: str
    salt: str
    geometry: Geometry
    payload_bytes: int
    tokens: bytes

    def encode(self) -> bytes:
        """Return the head as it is in the file."""
        fields = {
            "fingerprint": self.fingerprint,
            "salt": self.salt,
            "geometry": self.geometry._asdict(),
            "payload_bytes": self.payload_bytes,
        }
        return json.dumps(fields).encode() + b"\n" + self.tokens

    @classmethod
    def decode(cls, content: bytes) -> Head:
        """Return the head that was encoded.

        Raises:
            BadEntryError: it is none.
        """
        line, _, tokens = content.partition(b"\n")
        try:
            fields = json.loads(line)
            head = cls(**{**fields, "geometry": Geometry(**fields["geometry"])}, tokens=tokens)
            if head.geometry.is_sound() and len(tokens) == TOKEN_BYTES * head.geometry.end and head.payload_bytes > 0:
                return head
        except (ValueError, TypeError, KeyError):
            pass
        raise BadEntryError("its head makes no sense")

    @property
    def name(self) -> str:
        """Name of the entry's file."""
        return entry_name(self.fingerprint, self.salt, self.geometry.start, self.tokens)

    @property
    def num_bytes(self) -> int:
        """Size of the entry's file."""
        return _PROLOGUE.size + len(self.encode()) + self.payload_bytes


def entry_name(fingerprint: str, salt: str, start: int, tokens: bytes) -> str:
    """Return the name of a file: the same whenever and by whom the same range of the same prefix is saved."""
    return _digest(json.dumps([fingerprint, salt, start]).encode() + tokens).hex() + SUFFIX


def write_entry(path: Path, head: Head, data: Tensor) -> None:
    """Write an entry, under its final name only when all of it is on the disk.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    temporary, content, payload = path.with_suffix(TEMPORARY_SUFFIX), head.encode(), data.numpy().data
    prologue = _PROLOGUE.pack(MAGIC, VERSION, len(content), _digest(content), zlib.crc32(payload))
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(prologue + content)
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_head(path: Path) -> Head:
    """Read all but the payload.

    Raises:
        BadEntryError: the file is not a whole entry of this version.
        OSError: it could not be read.
    """
    with _open(path) as file:
        return _read_head(file).head


def map_payload(path: Path, head: Head) -> Tensor:
    """Return an entry's payload, [bytes] uint8, as a private mapping of the file.

    It is read and checked beforehand the ordinary way: an error of the disk is then an exception, where in a mapping it
    would end the process. The mapping finds the pages in memory.

    Raises:
        BadEntryError: the file is no longer the entry that ``head`` was read from, or its bytes are not those written.
        OSError: it could not be read.
    """
    with _open(path) as file:
        found = _read_head(file)
        if found.head != head:
            raise BadEntryError("another entry took its place")
        piece, crc = memoryview(bytearray(_CHECK_BYTES)), 0
        while count := file.readinto(piece):
            crc = zlib.crc32(piece[:count], crc)
        if crc != found.crc:
            raise BadEntryError("checksum of the payload does not match")
        mapping = mmap.mmap(file.fileno(), found.offset + head.payload_bytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapping, dtype=torch.uint8, offset=found.offset)


def _open(path: Path) -> FileIO:
    return FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW))


class _Found(NamedTuple):
    head: Head
    offset: int
    crc: int


def _read_head(file: FileIO) -> _Found:
    """Read up to the payload, and leave the file there."""
    size = os.fstat(file.fileno()).st_size
    prologue = file.read(_PROLOGUE.size)
    if prologue[: len(MAGIC)] != MAGIC:
        raise BadEntryError("not a file of kvbuffer")
    if len(prologue) < _PROLOGUE.size:
        raise BadEntryError("truncated")
    _, version, length, digest, crc = _PROLOGUE.unpack(prologue)
    if version != VERSION:
        raise BadEntryError(f"written in version {version} of the format, this is version {VERSION}")
    offset = _PROLOGUE.size + length
    if offset > size:
        raise BadEntryError("truncated")
    content = file.read(length)
    if _digest(content) != digest:
        raise BadEntryError("checksum of the head does not match")
    head = Head.decode(content)
    if offset + head.payload_bytes != size:
        raise BadEntryError("truncated" if offset + head.payload_bytes > size else "longer than its head says")
    return _Found(head, offset, crc)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()
