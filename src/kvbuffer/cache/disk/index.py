"""Which entries there are, which of them serves a prompt best, and which was not used for longest."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from kvbuffer.cache.disk.entry import TOKEN_BYTES, Geometry, Head
from kvbuffer.ops.attention import PAGE_SIZE

_PAGE_BYTES = PAGE_SIZE * TOKEN_BYTES


@dataclass(eq=False)
class Entry:
    """A file of the tier.

    Attributes:
        name: its name in the folder.
        num_bytes: its size.
        head: None when it is not to be matched: of another model, or damaged. It still takes room until it is evicted.
    """

    name: str
    num_bytes: int
    head: Head | None
    nodes: list[bytes] = field(default_factory=list, repr=False)


class DiskMatch(NamedTuple):
    """An entry that holds the memory of the first tokens of a prompt.

    Attributes:
        num_tokens: how many of them: geometry.start <= num_tokens <= geometry.end.
        geometry: what is in its data.
        num_bytes: size of the file that would be read.
        entry: for :meth:`DiskTier.load`.
        token_ids: of all that is in its data.
    """

    num_tokens: int
    geometry: Geometry
    num_bytes: int
    entry: Entry
    token_ids: list[int]


class DiskIndex:
    """Entries by what they hold and by when they were last used. Touches no files, and is not safe for threads.

    A chain of hashes names each prefix of whole pages. An entry that can serve start .. end tokens is listed under
    its prefixes from the last whole page in ``start`` to the last one in ``end``, so that a prompt finds it under the
    last page that both share; only the tokens after that page are compared one by one.

    Attributes:
        num_bytes: sizes of all entries.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._entries: dict[str, Entry] = {}
        self._nodes: dict[bytes, dict[Entry, Head]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def holds(self, name: str) -> bool:
        """Return whether there is an entry of this name that can be matched."""
        return name in self._entries and self._entries[name].head is not None

    def add(self, entry: Entry) -> None:
        """Add an entry as the one used last, in place of any other of its name."""
        if entry.name in self._entries:
            self.remove(self._entries[entry.name])
        self._entries[entry.name] = entry
        self.num_bytes += entry.num_bytes
        if entry.head is not None:
            geometry = entry.head.geometry
            entry.nodes = list(_chain(entry.head.salt, entry.head.tokens))[geometry.start // PAGE_SIZE :]
            for node in entry.nodes:
                self._nodes.setdefault(node, {})[entry] = entry.head

    def remove(self, entry: Entry) -> None:
        """Forget an entry; one that is already forgotten is no error."""
        if self._entries.get(entry.name) is entry:
            self.retire(entry)
            del self._entries[entry.name]
            self.num_bytes -= entry.num_bytes

    def retire(self, entry: Entry) -> None:
        """No longer match an entry, but keep count of its bytes."""
        for node in entry.nodes:
            del self._nodes[node][entry]
            if not self._nodes[node]:
                del self._nodes[node]
        entry.nodes, entry.head = [], None

    def touch(self, name: str) -> None:
        """Make an entry the one used last."""
        if name in self._entries:
            self._entries[name] = self._entries.pop(name)

    def evict(self, max_bytes: int) -> list[Entry]:
        """Forget entries, the ones not used for longest, until at most ``max_bytes`` are left; return them."""
        evicted = []
        while self.num_bytes > max_bytes and self._entries:
            entry = next(iter(self._entries.values()))
            self.remove(entry)
            evicted.append(entry)
        return evicted

    def match(self, token_ids: Sequence[int], salt: str, max_tokens: int) -> DiskMatch | None:
        """Return the entry that serves the most of the first ``max_tokens`` tokens; of equals, the smallest."""
        tokens = encode_tokens(token_ids[:max_tokens])
        chain = list(_chain(salt, tokens)) if self._nodes else []
        for page in reversed(range(len(chain))):
            best: DiskMatch | None = None
            offset = page * _PAGE_BYTES
            for entry, head in self._nodes.get(chain[page], {}).items():
                common = page * PAGE_SIZE + _agreeing(head.tokens, tokens, offset)
                match = DiskMatch(common, head.geometry, entry.num_bytes, entry, [])
                if common >= max(1, head.geometry.start) and (best is None or _rank(match) > _rank(best)):
                    best = match
            if best is not None and best.entry.head is not None:
                return best._replace(token_ids=decode_tokens(best.entry.head.tokens))
        return None


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """Return tokens as they are in a head: int32, little endian."""
    return array("i", token_ids).tobytes()


def decode_tokens(content: bytes) -> list[int]:
    """Undo :func:`encode_tokens`."""
    return array("i", content).tolist()


def _rank(match: DiskMatch) -> tuple[int, int]:
    return match.num_tokens, -match.num_bytes


def _chain(salt: str, tokens: bytes) -> Iterator[bytes]:
    """Yield the hashes of all prefixes of whole pages, the empty one first."""
    node = blake2b(salt.encode(), digest_size=16).digest()
    yield node
    for offset in range(_PAGE_BYTES, len(tokens) + 1, _PAGE_BYTES):
        node = blake2b(node + tokens[offset - _PAGE_BYTES : offset], digest_size=16).digest()
        yield node


def _agreeing(left: bytes, right: bytes, offset: int) -> int:
    """Return how many tokens agree from byte ``offset`` on, within a page."""
    for count in range(PAGE_SIZE):
        start = offset + count * TOKEN_BYTES
        token = left[start : start + TOKEN_BYTES]
        if not token or token != right[start : start + TOKEN_BYTES]:
            return count
    return PAGE_SIZE
