"""Prefixes in a folder, bounded in bytes, in use by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from torch import Tensor

from kvbuffer.cache.disk.bandwidth import Bandwidth
from kvbuffer.cache.disk.entry import (
    SUFFIX,
    TEMPORARY_SUFFIX,
    BadEntryError,
    Geometry,
    Head,
    entry_name,
    map_payload,
    read_head,
    write_entry,
)
from kvbuffer.cache.disk.index import DiskIndex, DiskMatch, Entry, encode_tokens
from kvbuffer.cache.disk.writer import BackgroundWriter
from kvbuffer.errors import ConfigError

logger = logging.getLogger(__name__)

#: Bytes that may wait to be written.
QUEUE_BYTES = 256 << 20
SUBFOLDER = "prefixes"
_LOCK = "lock"
_OURS = re.compile(rf"[0-9a-f]{{32}}({re.escape(SUFFIX)}|{re.escape(TEMPORARY_SUFFIX)})")


@dataclass
class DiskStats:
    """What the tier did since it was opened, and what it holds.

    Attributes:
        entries: files held.
        bytes: their sizes.
        saving: whether saving is on; a disk error turns it off.
        saved: entries written.
        saved_bytes: their sizes.
        dropped: entries not written: the queue was full, or saving was off.
        refused: entries not written because they alone exceed the bound.
        evicted: entries deleted to make room.
        loaded: entries read.
        loaded_bytes: their sizes.
        damaged: entries that turned out unusable when they were to be loaded.
    """

    entries: int = 0
    bytes: int = 0
    saving: bool = True
    saved: int = 0
    saved_bytes: int = 0
    dropped: int = 0
    refused: int = 0
    evicted: int = 0
    loaded: int = 0
    loaded_bytes: int = 0
    damaged: int = 0


class DiskTier:
    """Saves prefixes to files and finds them again, also after a restart or a crash.

    All methods may be called from any thread. Saving happens on a thread of the tier; matching touches no file; loading
    reads a file in the caller's thread.

    Args:
        folder: the user's. The tier lives in a folder inside, which is readable by its owner only.
        max_bytes: bound on the files' sizes; what was not used for longest is deleted.
        fingerprint: of model and layout (see :func:`~kvbuffer.cache.disk.fingerprint`). Files of another one are not
            used, but count and are evicted like the rest.
        queue_bytes: data that may wait to be written; beyond it, saves are dropped.

    Raises:
        ConfigError: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, max_bytes: int, fingerprint: str, queue_bytes: int = QUEUE_BYTES) -> None:
        self._folder, self._max_bytes, self._fingerprint = folder / SUBFOLDER, max_bytes, fingerprint
        self._lock = threading.Lock()
        self._index = DiskIndex()
        self._pending: set[str] = set()
        self._stats = DiskStats()
        self._bandwidth = Bandwidth()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            self._folder_lock = _lock_folder(self._folder)
            try:
                self._scan()
            except BaseException:
                os.close(self._folder_lock)
                raise
        except OSError as error:
            raise ConfigError(
                f"--cache-dir: {self._folder} cannot be used ({error}): give a folder that this user may write to, or "
                "start without --cache-dir"
            ) from None
        self._writer = BackgroundWriter(self._write, queue_bytes)

    @property
    def stats(self) -> DiskStats:
        """Counters since the tier was opened, and what it holds now."""
        with self._lock:
            return replace(self._stats, entries=len(self._index), bytes=self._index.num_bytes)

    def save(self, token_ids: Sequence[int], salt: str | None, geometry: Geometry, data: Tensor) -> bool:
        """Queue a prefix to be written; never waits for the disk.

        Args:
            token_ids: the prefix, ``geometry.end`` tokens.
            salt: whoever gives the same one, or None, shares the prefix. Only its digest is stored.
            geometry: what the data is of.
            data: [bytes] uint8, what :func:`~kvbuffer.cache.transfer.extract` returned; not to be changed afterwards.

        Returns:
            Whether the prefix will be, or is already, on the disk (an error of the disk aside).

        Raises:
            RuntimeError: the arguments contradict each other.
        """
        if len(token_ids) != geometry.end or not geometry.is_sound() or not data.numel():
            raise RuntimeError(f"{len(token_ids)} tokens in {data.numel()} bytes cannot be saved as {geometry}")
        head = Head(self._fingerprint, _salt_digest(salt), geometry, data.numel(), encode_tokens(token_ids))
        name = head.name
        with self._lock:
            if self._index.holds(name):
                self._index.touch(name)
                return True
            if name in self._pending:
                return True
            if not self._stats.saving:
                self._stats.dropped += 1
                return False
            if head.num_bytes > self._max_bytes:
                self._stats.refused += 1
                return False
            self._pending.add(name)
        accepted = self._writer.submit((head, data), data.numel())
        if not accepted:
            with self._lock:
                self._pending.discard(name)
                self._stats.dropped += 1
        return accepted

    def holds(self, token_ids: Sequence[int], salt: str | None, start: int) -> bool:
        """Return whether the range from ``start`` to the end of this prefix is, or will be, on the disk."""
        name = entry_name(self._fingerprint, _salt_digest(salt), start, encode_tokens(token_ids))
        with self._lock:
            self._index.touch(name)
            return name in self._pending or self._index.holds(name)

    def match(self, token_ids: Sequence[int], salt: str | None, max_tokens: int) -> DiskMatch | None:
        """Return the entry that holds the longest part of the first ``max_tokens`` tokens, or None. Changes nothing.

        An entry holds the first t tokens if start <= t <= end and its own first t tokens are the same.
        """
        with self._lock:
            return self._index.match(token_ids, _salt_digest(salt), max_tokens)

    def load(self, match: DiskMatch) -> Tensor | None:
        """Return the data of a matched entry, checked, or None when it was evicted meanwhile or is damaged.

        Returns:
            [bytes] uint8, a private mapping of the file that outlives its eviction.
        """
        entry = match.entry
        with self._lock:
            head = entry.head
        if head is None:
            return None
        path, began = self._folder / entry.name, time.perf_counter()
        try:
            data = map_payload(path, head)
        except (BadEntryError, OSError) as error:
            self._discard(entry, error)
            return None
        seconds = time.perf_counter() - began
        with suppress(OSError):
            os.utime(path)  # the order of use, for after a restart
        with self._lock:
            self._index.touch(entry.name)
            self._bandwidth.observe_load(entry.num_bytes, seconds)
            self._stats.loaded += 1
            self._stats.loaded_bytes += entry.num_bytes
        return data

    def cheaper_to_load(self, num_bytes: int, tokens: int, prefill_rate: float) -> bool:
        """Return whether loading takes less time than computing, as far as has been measured.

        Args:
            num_bytes: of the match.
            tokens: that would not have to be computed.
            prefill_rate: tokens computed per second; 0 if unknown.
        """
        with self._lock:
            return self._bandwidth.cheaper_to_load(num_bytes, tokens, prefill_rate)

    def flush(self) -> None:
        """Wait until everything that was queued is on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is queued and leave the folder to others. Afterwards nothing is saved or found."""
        self._writer.close()
        with self._lock:
            self._index = DiskIndex()
            if self._folder_lock >= 0:
                os.close(self._folder_lock)
                self._folder_lock = -1

    def _scan(self) -> None:
        """Index the files of before by their heads, in the order of their last use."""
        found: list[tuple[int, Entry]] = []
        others = 0
        for file in sorted(os.scandir(self._folder), key=lambda file: file.name):
            ours = _OURS.fullmatch(file.name) and file.is_file(follow_symlinks=False)
            if not ours:
                if file.name != _LOCK:
                    logger.warning("--cache-dir: ignoring %s: not a file of the cache", file.path)
                continue
            if file.name.endswith(TEMPORARY_SUFFIX):
                os.unlink(file.path)
                continue
            head: Head | None = None
            try:
                head = read_head(Path(file.path))
                if head.fingerprint != self._fingerprint:
                    head, others = None, others + 1
                elif head.name != file.name:
                    raise BadEntryError("its content belongs to another name")
            except (BadEntryError, OSError) as error:
                head = None
                logger.warning("--cache-dir: ignoring %s: %s", file.path, error)
            status = file.stat(follow_symlinks=False)
            found.append((status.st_mtime_ns, Entry(file.name, status.st_size, head)))
        if others:
            logger.info("--cache-dir: %d files in %s are of another model or of other dtypes", others, self._folder)
        for _, entry in sorted(found, key=lambda item: item[0]):
            self._index.add(entry)
        self._evict(self._max_bytes)

    def _write(self, job: tuple[Head, Tensor]) -> None:
        """Write one entry, on the writer's thread."""
        head, data = job
        try:
            if self._stats.saving:
                self._save_now(head, data)
            else:
                with self._lock:
                    self._stats.dropped += 1
        except Exception as error:
            with self._lock:
                self._stats.saving = False
                self._stats.dropped += 1
            logger.error(
                "--cache-dir: %s cannot be written to (%s); nothing is saved any more until the server is restarted, "
                "what is there is still used.", self._folder, error, exc_info=not isinstance(error, OSError),
            )  # fmt: skip
        finally:
            with self._lock:
                self._pending.discard(head.name)

    def _save_now(self, head: Head, data: Tensor) -> None:
        size = head.num_bytes
        self._evict(self._max_bytes - size)
        began = time.perf_counter()
        write_entry(self._folder / head.name, head, data)
        seconds = time.perf_counter() - began
        with self._lock:
            self._index.add(Entry(head.name, size, head))
            self._bandwidth.observe_save(size, seconds)
            self._stats.saved += 1
            self._stats.saved_bytes += size

    def _evict(self, max_bytes: int) -> None:
        with self._lock:
            evicted = self._index.evict(max_bytes)
            self._stats.evicted += len(evicted)
        for entry in evicted:
            (self._folder / entry.name).unlink(missing_ok=True)

    def _discard(self, entry: Entry, error: Exception) -> None:
        """Stop using an entry that could not be loaded; delete it unless it may just have been out of reach."""
        with self._lock:
            if entry.head is None:
                return  # evicted or discarded meanwhile, by someone else
            self._stats.damaged += 1
            if isinstance(error, OSError) and error.errno != errno.ENOENT:
                self._index.retire(entry)
            else:
                self._index.remove(entry)
        logger.warning("--cache-dir: not using %s: %s", self._folder / entry.name, error)
        if isinstance(error, BadEntryError):
            with suppress(OSError):
                (self._folder / entry.name).unlink()


def _lock_folder(folder: Path) -> int:
    """Lock a folder until the descriptor returned is closed or the process ends, however it does."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"--cache-dir: {folder} is in use by another process: give each server a folder of its own"
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _salt_digest(salt: str | None) -> str:
    # Clients choose salts, and JSON allows them halves of surrogate pairs.
    text = b"none" if salt is None else b"some" + salt.encode(errors="surrogatepass")
    return blake2b(text, digest_size=16, person=b"kvbuffer salt").hexdigest()
