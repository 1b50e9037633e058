"""The store: what was written is found, and only that; whatever is not a whole store of ours is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import lmdb
import pytest

from kvbuffer.errors import StoreError
from kvbuffer.instcache import store as store_module
from kvbuffer.instcache.entry import Answer, Codec, decode, encode, train_dictionary
from kvbuffer.instcache.identity import Identity, Keys, normalise
from kvbuffer.instcache.store import Store, write_store

IDENTITY = Identity(model="m1", template="t1", system_prompt=None)


def answer(number: int) -> Answer:
    return Answer([7, 300, number % 900, 2], ended=number % 2 == 0, num_prompt_tokens=9 + number)


def make(path: Path, texts: Iterable[str], identity: Identity = IDENTITY, codec: Codec | None = None) -> Path:
    key = Keys(identity)
    entries = sorted((key(text.encode()), encode(text.encode(), answer(i))) for i, text in enumerate(texts))
    write_store(path, identity, "model", entries, codec or Codec())
    return path


def test_an_answer_is_found_under_its_instruction_and_no_other(tmp_path: Path) -> None:
    texts = [f"instruction {i}" for i in range(3000)]
    store = Store(make(tmp_path / "s", texts))
    assert store.header.num_entries == 3000
    assert all(store.get(text) == answer(i) for i, text in enumerate(texts))
    assert store.get("instruction 3000") is None
    assert store.get("Instruction 1") is None
    assert dict(store.answers()) == {text: answer(i) for i, text in enumerate(texts)}


def test_an_instruction_is_found_in_any_form_that_means_the_same(tmp_path: Path) -> None:
    store = Store(make(tmp_path / "s", ["où\nest  le chat"]))
    for text in ("où\nest  le chat", "  ou\u0300\r\nest  le chat\n", "où\rest  le chat "):
        assert store.get(text) == answer(0)
    for text in ("où\nest le chat", "OÙ\nest  le chat", "où\n\nest  le chat"):
        assert store.get(text) is None
    assert normalise(normalise(" a\u0301 \r")) == "\u00e1"


def test_equal_hashes_are_no_hit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.Keys, "__call__", lambda self, text: b"0123456789abcdef")
    store = Store(make(tmp_path / "s", ["the one"]))
    assert store.get("the one") is not None
    assert store.get("the other") is None


def test_the_key_depends_on_everything_that_the_answer_does() -> None:
    others = [replace(IDENTITY, **{name: "x"}) for name in ("model", "template", "system_prompt", "plan", "sampling")]
    keys = {Keys(identity)(b"text") for identity in (IDENTITY, *others)}
    assert len(keys) == 6
    assert all(len(key) == 16 for key in keys)


def test_a_dictionary_makes_entries_smaller_and_is_stored_with_them(tmp_path: Path) -> None:
    texts = [f"please explain the word number {i} in the usual way" for i in range(2000)]
    entries = [encode(text.encode(), answer(i)) for i, text in enumerate(texts)]
    codec = Codec(train_dictionary(entries[:1000]))
    sizes, without = (sum(len(c.compress(entry)) for entry in entries[1000:]) for c in (codec, Codec()))
    assert sizes < 0.5 * without
    store = Store(make(tmp_path / "s", texts, codec=codec))
    assert all(store.get(text) == answer(i) for i, text in enumerate(texts))


def test_token_ids_of_large_vocabularies() -> None:
    wide = Answer([1, 151_643], True, 3)
    assert decode(encode("é".encode(), wide)) == ("é".encode(), wide)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_a_torn_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = make(tmp_path / "s", [f"text {i}" for i in range(2000)])
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(StoreError, match=r"torn|not an InstCache store"):
        Store(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store"):
        Store(tmp_path / "missing")
    (tmp_path / "text").write_bytes(b"not a database " * 10_000)
    with pytest.raises(StoreError, match="not an InstCache store"):
        Store(tmp_path / "text")
    with lmdb.open(str(tmp_path / "other"), subdir=False) as env, env.begin(write=True) as transaction:
        transaction.put(b"header", json.dumps({"kind": "something else"}).encode())
    with pytest.raises(StoreError, match="not an InstCache store"):
        Store(tmp_path / "other")


def test_other_versions_and_other_identities_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(make(tmp_path / "s", ["a"]))
    store.check_identity(IDENTITY)
    with pytest.raises(StoreError, match="outdated: it was filled under another model, another system prompt"):
        store.check_identity(replace(IDENTITY, model="m2", system_prompt="be brief"))
    store.close()
    monkeypatch.setattr(store_module, "FORMAT", 2)
    with pytest.raises(StoreError, match="has format 1, this version of kvbuffer reads format 2"):
        Store(tmp_path / "s")


def test_a_damaged_entry_is_no_answer(tmp_path: Path) -> None:
    path = make(tmp_path / "s", ["an instruction"])
    data = bytearray(path.read_bytes())
    for frame in [*re.finditer(re.escape(b"\x28\xb5\x2f\xfd"), data)]:  # what compressed data begins with
        data[frame.start() + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="an entry is damaged"):
        Store(path).get("an instruction")


def test_a_replaced_store_stays_readable_for_who_has_it_open(tmp_path: Path) -> None:
    path = make(tmp_path / "s", ["old"])
    before = Store(path)
    make(path, ["new"])
    after = Store(path)
    assert (before.get("old"), before.get("new")) == (answer(0), None)
    assert (after.get("old"), after.get("new")) == (None, answer(0))
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def _count_hits(path: Path, texts: list[str]) -> int:
    store = Store(path)
    return sum(store.get(text) is not None for text in texts)


def test_many_processes_read_at_once(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(500)]
    path = make(tmp_path / "s", texts[::2])
    path.chmod(0o444)
    with get_context("fork").Pool(2) as pool:
        assert pool.starmap(_count_hits, [(path, texts)] * 4) == [250] * 4
