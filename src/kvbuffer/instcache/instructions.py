"""The file of predicted instructions: what a search has found so far, and where it is, always written together."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from kvbuffer.errors import StoreError
from kvbuffer.instcache.search import Waiting
from kvbuffer.instcache.store import check_whole, write_batch

#: Raised whenever the format changes; other versions are refused.
FORMAT = 1
_KIND = "kvbuffer instcache instructions"
_HEADER, _FRONTIER = b"header", b"frontier"
_COST = struct.Struct("<d")


@dataclass(frozen=True)
class SearchState:
    """What is searched, and how far the search has come.

    Attributes:
        predictor: fingerprint of the checkpoint and its template.
        sigma: most that an instruction may cost, in nats.
        max_tokens: longest instruction.
        num_found: instructions so far.
        num_evaluated: nodes computed so far.
        complete: whether these are all.
    """

    predictor: str
    sigma: float
    max_tokens: int
    num_found: int = 0
    num_evaluated: int = 0
    complete: bool = False


class InstructionFile:
    """Instructions with what they cost, in one LMDB file.

    A transaction holds what was found and the frontier that it leaves, so a search that is killed at any moment goes on
    from the last one, and finds everything once.

    Args:
        path: the file; made if it is not there.
        state: the search that the file is for; None to read whatever there is.

    Attributes:
        state: how far the search has come.

    Raises:
        StoreError: the file is torn or something else, or another search's.
    """

    def __init__(self, path: Path, state: SearchState | None = None) -> None:
        self.path = path
        exists = path.is_file() and path.stat().st_size > 0
        if not exists and state is None:
            raise StoreError(f"there are no instructions in {path}; kvbuffer instcache build finds some")
        try:
            self._env = lmdb.open(str(path), subdir=False, readonly=state is None, lock=state is not None)
        except lmdb.Error as error:
            raise StoreError(f"{path} is not a file of instructions, or is torn: {error}") from None
        try:
            check_whole(self._env, path)
            self.state = self._read_state(state)
        except BaseException:
            self._env.close()
            raise

    def _read_state(self, wanted: SearchState | None) -> SearchState:
        with self._env.begin() as transaction:
            data = transaction.get(_HEADER)
        if data is None and wanted is not None and not self._env.stat()["entries"]:
            return wanted
        try:
            fields = json.loads(data or b"null")
            if fields.pop("kind") != _KIND or fields.pop("format") != FORMAT:
                raise KeyError("kind")
            found = SearchState(**fields)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StoreError(f"{self.path} is not a file of instructions of this version of kvbuffer") from None
        if wanted is not None:
            for name in ("predictor", "sigma", "max_tokens"):
                if getattr(found, name) != getattr(wanted, name):
                    raise StoreError(
                        f"{self.path} is of a search with {name} {getattr(found, name)}, not {getattr(wanted, name)}: "
                        "give another file, or remove it"
                    )
        return found

    def close(self) -> None:
        """Close the file."""
        self._env.close()

    def save(self, found: Iterable[tuple[str, float]], frontier: Sequence[Waiting], num_evaluated: int) -> None:
        """Add instructions and their costs, and replace the frontier, all or nothing."""
        items = {_key(text): _COST.pack(cost) + text.encode() for text, cost in found}
        state = replace(
            self.state,
            num_found=self.state.num_found + len(items),
            num_evaluated=num_evaluated,
            complete=not frontier,
        )
        header = json.dumps({"kind": _KIND, "format": FORMAT, **asdict(state)}).encode()
        write_batch(self._env, [*items.items(), (_HEADER, header), (_FRONTIER, _pack(frontier))])
        self.state = state

    def frontier(self) -> list[Waiting] | None:
        """Return where the search is; None before its first :meth:`save`."""
        with self._env.begin() as transaction:
            data = transaction.get(_FRONTIER)
        return None if data is None else _unpack(data)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """Go through the instructions and their costs."""
        with self._env.begin() as transaction:
            for key, data in transaction.cursor():
                if key not in (_HEADER, _FRONTIER):
                    yield data[_COST.size :].decode(), _COST.unpack_from(data)[0]


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _pack(frontier: Sequence[Waiting]) -> bytes:
    arrays: dict[str, npt.NDArray[Any]] = {}
    for i, layer in enumerate(frontier):
        arrays[f"lengths{i}"] = np.array([len(text) for text in layer.texts], np.int32)
        arrays[f"texts{i}"] = np.array([token for text in layer.texts for token in text], np.int32)
        arrays[f"behind{i}"], arrays[f"tokens{i}"], arrays[f"costs{i}"] = layer.behind, layer.tokens, layer.costs
    file = io.BytesIO()
    np.savez_compressed(file, num_layers=len(frontier), **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _unpack(data: bytes) -> list[Waiting]:
    arrays = np.load(io.BytesIO(data))
    frontier = []
    for i in range(int(arrays["num_layers"])):
        tokens, borders = arrays[f"texts{i}"].tolist(), np.cumsum(arrays[f"lengths{i}"]).tolist()
        texts = [tokens[begin:end] for begin, end in zip([0, *borders], borders, strict=False)]
        frontier.append(Waiting(texts, arrays[f"behind{i}"], arrays[f"tokens{i}"], arrays[f"costs{i}"]))
    return frontier
