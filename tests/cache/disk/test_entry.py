"""A file is either exactly what was written or refused with a reason."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from kvbuffer.cache.disk import Geometry, entry
from kvbuffer.cache.disk.entry import BadEntryError, Head, map_payload, read_head, write_entry
from kvbuffer.cache.snapshot import Snapshot
from tests.cache.disk.saved import content, geometry

TOKENS = torch.arange(40, dtype=torch.int32).numpy().tobytes()
DATA = content(1, 100)
HEAD = Head("fingerprint", "salt", geometry(30, 40), 100, TOKENS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / HEAD.name
    write_entry(path, HEAD, DATA)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadEntryError) as caught:
        map_payload(path, read_head(path))
    return str(caught.value)


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, (1 << 20) + 1, 3 << 20])
def test_what_is_written_is_read(tmp_path: Path, num_bytes: int) -> None:
    head = Head("fingerprint", "salt", geometry(30, 40), num_bytes, TOKENS)
    path, data = tmp_path / head.name, content(num_bytes, num_bytes)
    write_entry(path, head, data)
    assert read_head(path) == head
    assert torch.equal(map_payload(path, head), data)
    assert path.stat().st_size == head.num_bytes


def test_every_changed_bit_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        assert refusal(path)


def test_every_truncation_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refusal(path) in ("truncated", "not a file of kvbuffer")
    path.write_bytes(whole + b"\0")
    assert refusal(path) == "longer than its head says"


@pytest.mark.parametrize(
    ("start", "changed", "reason"),
    [
        (0, b"KVBUFFER", "not a file of kvbuffer"),
        (8, b"\x63\0\0\0", "written in version 99 of the format, this is version 1"),
        (12, b"\xff\xff\xff\xff", "truncated"),
        (40, b"?", "checksum of the head does not match"),
        (-1, bytes([DATA[-1] ^ 1]), "checksum of the payload does not match"),
    ],
)
def test_the_reason_is_told(path: Path, start: int, changed: bytes, reason: str) -> None:
    whole = bytearray(path.read_bytes())
    start %= len(whole)
    whole[start : start + len(changed)] = changed
    path.write_bytes(whole)
    assert refusal(path) == reason


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"geometry": 3}',
        HEAD.encode().split(b"\n")[0].replace(b'"start": 30', b'"start": 50'),
        HEAD.encode().split(b"\n")[0].replace(b'"start": 30', b'"start": "a"'),
        HEAD.encode().split(b"\n")[0].replace(b'"end": 40', b'"end": 41'),
        HEAD.encode().split(b"\n")[0].replace(b'"payload_bytes": 100', b'"payload_bytes": "100"'),
        HEAD.encode().split(b"\n")[0].replace(b'"payload_bytes": 100', b'"payload_bytes": -100'),
        HEAD.encode().split(b"\n")[0].replace(b'"salt"', b'"pepper"'),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(line: bytes) -> None:
    with pytest.raises(BadEntryError, match="its head makes no sense"):
        Head.decode(line + b"\n" + TOKENS)


def test_another_entry_in_the_place_of_the_one_asked_for_is_refused(path: Path) -> None:
    other = Head("fingerprint", "another salt", geometry(30, 40), 100, TOKENS)
    write_entry(path, other, DATA)
    with pytest.raises(BadEntryError, match="another entry took its place"):
        map_payload(path, HEAD)


def test_links_are_not_followed(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic link"):
        read_head(link)


def test_the_data_outlives_the_file_and_may_be_written_to(path: Path) -> None:
    data = map_payload(path, HEAD)
    data[0] += 1
    assert torch.equal(map_payload(path, HEAD), DATA)
    path.unlink()
    assert torch.equal(data[1:], DATA[1:])


def test_only_the_owner_may_read(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(entry.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_entry(tmp_path / HEAD.name, HEAD, DATA)
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_of_one_range_of_one_text_under_one_salt_and_model() -> None:
    others = [
        Head("fingerprint", "salt", geometry(30, 40), 100, TOKENS[:-4] + b"\1\0\0\0"),
        Head("fingerprint", "salt", geometry(29, 40), 100, TOKENS),
        Head("fingerprint", "pepper", geometry(30, 40), 100, TOKENS),
        Head("another", "salt", geometry(30, 40), 100, TOKENS),
    ]
    assert len({HEAD.name, *(head.name for head in others)}) == 5


def test_the_geometry_is_that_of_the_blocks() -> None:
    without_state = Snapshot(start=0, end=20, checkpoint=0, slot=None, record_pages=(5, 6), ring=1)
    assert Geometry.of([3, 4], without_state) == Geometry(0, 20, 0, False, 2, 2)
    folded = Snapshot(start=18, end=20, checkpoint=16, slot=0, record_pages=(5,), ring=1)
    assert Geometry.of([], folded) == Geometry(18, 20, 16, True, 0, 1)
