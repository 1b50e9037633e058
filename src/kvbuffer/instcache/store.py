"""The table of answers: one LMDB file, memory-mapped, that any number of processes read.

A store is written once and then only replaced as a whole, so its readers take no locks. Its keys are the hashes of
:class:`~kvbuffer.instcache.identity.Keys`; two more records, under names that are no hashes, hold the header (JSON) and
the dictionary that entries are compressed with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import lmdb

from kvbuffer.errors import StoreError
from kvbuffer.instcache.entry import Answer, Codec, decode
from kvbuffer.instcache.identity import Identity, Keys, normalise

#: Raised whenever the format changes; other versions are refused.
FORMAT = 1
_KIND = "kvbuffer instcache answers"
_HEADER, _DICTIONARY = b"header", b"dictionary"


class Header(NamedTuple):
    """What a store says about itself.

    Attributes:
        identity: what its answers depend on besides the instructions.
        model: the name of the model, for people.
        num_entries: answers in it.
    """

    identity: Identity
    model: str
    num_entries: int


class Store:
    """An open store. Not thread-safe: one thread looks up.

    Args:
        path: the file.

    Attributes:
        path: the file.
        header: what it says about itself.
        num_bytes: its size.

    Raises:
        StoreError: it is missing, torn, foreign or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._env = _open(path)
        try:
            self._reader = self._env.begin(buffers=True)
            self.header = _parse_header(path, self._reader.get(_HEADER))
            self._codec = Codec(bytes(self._reader.get(_DICTIONARY, b"")))
        except BaseException:
            self.close()
            raise
        self.num_bytes = path.stat().st_size
        self._key = Keys(self.header.identity)

    def close(self) -> None:
        """Unmap the file; the store cannot be used afterwards."""
        self._env.close()

    def get(self, instruction: str) -> Answer | None:
        """Return the answer to an instruction, if there is one for just this text in its normal form.

        Raises:
            StoreError: the entry is damaged.
        """
        text = normalise(instruction).encode()
        entry = self.entry(self._key(text))
        if entry is None:
            return None
        found, answer = decode(entry)
        return answer if found == text else None

    def entry(self, key: bytes) -> bytes | None:
        """Return the entry of a key, not compressed.

        Raises:
            StoreError: the entry is damaged.
        """
        data = self._reader.get(key)
        return None if data is None else self._codec.decompress(data)

    def check_identity(self, expected: Identity) -> None:
        """Check that the answers are those of a server.

        Raises:
            StoreError: they are another model's, or were made under another template or system prompt.
        """
        if differing := self.header.identity.differences(expected):
            raise StoreError(
                f"{self.path} is outdated: it was filled under another {', another '.join(differing)}; "
                "fill it again with kvbuffer instcache fill"
            )

    def answers(self) -> Iterator[tuple[str, Answer]]:
        """Go through all instructions and their answers.

        Raises:
            StoreError: an entry is damaged.
        """
        for key, data in self._reader.cursor():
            if bytes(key) not in (_HEADER, _DICTIONARY):
                text, answer = decode(self._codec.decompress(data))
                yield text.decode(), answer


def write_store(
    path: Path, identity: Identity, model: str, entries: Iterable[tuple[bytes, bytes]], codec: Codec
) -> int:
    """Write a store and put it in the place of ``path`` when it is complete.

    Args:
        path: the file; readers of the one it replaces go on with that.
        identity: what the answers depend on.
        model: name of the model, for people.
        entries: keys and entries, in the order of the keys.
        codec: compresses the entries.

    Returns:
        The number of entries.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    count = 0
    with lmdb.open(str(partial), subdir=False, lock=False, map_size=_INITIAL_MAP, sync=False, metasync=False) as env:
        for batch in _batches((key, codec.compress(entry)) for key, entry in entries):
            write_batch(env, batch, append=True)
            count += len(batch)
        header = {"kind": _KIND, "format": FORMAT, "model": model, "num_entries": count, "identity": asdict(identity)}
        write_batch(env, [(_HEADER, json.dumps(header).encode()), (_DICTIONARY, codec.dictionary)])
        env.sync(True)
    replace_file(partial, path)
    return count


def replace_file(source: Path, target: Path) -> None:
    """Rename a file that has been written out, so that it survives a crash of the machine."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


_INITIAL_MAP = 1 << 26


def write_batch(env: lmdb.Environment, items: list[tuple[bytes, bytes]], append: bool = False) -> None:
    """Write records in one transaction, letting the file grow if need be.

    Args:
        env: the LMDB environment.
        items: keys and values; an empty value deletes nothing and stores nothing.
        append: the keys come in order and after all that are there, which fills pages to the full.
    """
    while True:
        try:
            with env.begin(write=True) as transaction:
                for key, value in items:
                    if value:
                        transaction.put(key, value, append=append)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


def _batches(items: Iterable[tuple[bytes, bytes]], size: int = 10_000) -> Iterator[list[tuple[bytes, bytes]]]:
    batch: list[tuple[bytes, bytes]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _open(path: Path) -> lmdb.Environment:
    if not path.is_file():
        raise StoreError(f"there is no store {path}; kvbuffer instcache fill makes one")
    try:
        env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise StoreError(f"{path} is not an InstCache store, or is torn: {error}") from None
    try:
        check_whole(env, path)
    except StoreError:
        env.close()
        raise
    return env


def check_whole(env: lmdb.Environment, path: Path) -> None:
    """Check that a file is as long as it says: past its end, a mapped page is not an error but the end of the process.

    Raises:
        StoreError: it was cut short.
    """
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    if (size := path.stat().st_size) < needed:
        raise StoreError(f"{path} is torn: {size} of {needed} bytes are there; copy it again, or make it again")


def _parse_header(path: Path, data: Any) -> Header:
    try:
        fields = json.loads(bytes(data or b"null"))
        if fields["kind"] != _KIND:
            raise KeyError("kind")
        if fields["format"] != FORMAT:
            raise StoreError(
                f"{path} has format {fields['format']}, this version of kvbuffer reads format {FORMAT}: "
                "remove it, and fill it again"
            )
        return Header(Identity(**fields["identity"]), fields["model"], fields["num_entries"])
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{path} is not an InstCache store: it has no header of one") from None
