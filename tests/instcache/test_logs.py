"""Logs of every known format give what users asked first; what too few asked is never passed on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from kvbuffer.errors import ConfigError
from kvbuffer.instcache.fit import prepare
from kvbuffer.instcache.logs import Logged, read_log, selected

RECORDS: dict[str, tuple[dict[str, Any], tuple[str, str] | None]] = {
    "LMSys-Chat": (
        {
            "conversation_id": "c1", "model": "m", "turn": 1, "language": "English", "redacted": False,
            "conversation": [{"role": "user", "content": " hi \r\n"}, {"role": "assistant", "content": "hello"}],
        },
        ("hi", "c1"),
    ),
    "WildChat": (
        {
            "conversation_hash": "h", "hashed_ip": "ip", "toxic": False,
            "conversation": [{"role": "user", "content": "a", "hashed_ip": "ip"}, {"role": "user", "content": "b"}],
        },
        ("a", "ip"),
    ),
    "ShareGPT": (
        {"id": "s", "conversations": [{"from": "system", "value": "x"}, {"from": "human", "value": "q"}]},
        ("q", "s"),
    ),
    "OpenAI": (
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "q"}], "user": "u"},
        ("q", "u"),
    ),
    "OpenAI parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
        ("q", "conversation 0"),
    ),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
    "OpenAI batch": (
        {"custom_id": "7", "body": {"messages": [{"role": "user", "content": "q"}], "user": "u"}},
        ("q", "u"),
    ),
    "instruction": ({"instruction": "q", "metadata": {"user_id": 12}}, ("q", "12")),
    "no user": ({"messages": [{"role": "assistant", "content": "q"}]}, None),
    "empty": ({"messages": [{"role": "user", "content": " \n"}]}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_formats(tmp_path: Path, name: str) -> None:
    record, expected = RECORDS[name]
    (tmp_path / "log.jsonl").write_text(json.dumps(record) + "\n\n", encoding="utf-8")
    (tmp_path / "log.json").write_text(json.dumps([record]), encoding="utf-8")
    parquet.write_table(Table.from_pylist([record]), tmp_path / "log.parquet")
    for file in ("log.jsonl", "log.json", "log.parquet"):
        assert list(read_log(tmp_path / file)) == ([] if expected is None else [Logged(*expected)])


def test_parquet_of_many_row_groups(tmp_path: Path) -> None:
    """Fields that a record lacks are there, and null; conversations differ in length."""
    records = [record for record, _ in RECORDS.values()] * 50
    table = Table.from_pylist([{"conversation": record.get("conversation"), "user": "u"} for record in records])
    parquet.write_table(table, tmp_path / "log.parquet", row_group_size=7)
    assert [one.instruction for one in read_log(tmp_path / "log.parquet")] == ["hi", "a"] * 50


def test_parquet_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ConfigError, match=r"cannot read .*log\.parquet as a log"):
        list(read_log(tmp_path / "log.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install 'kvbuffer\[parquet\]'"):
        list(read_log(tmp_path / "log.parquet"))


@pytest.mark.parametrize("text", ["not json\n", "[1, 2]\n", '"text"\n', "\x00\xff"])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"log\.jsonl"):
        list(read_log(tmp_path / "log.jsonl"))


def test_what_too_few_people_asked_is_not_passed_on() -> None:
    log = [
        Logged(*pair) for pair in [("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("c", "2"), ("a", "3"), ("b", "1")]
    ]
    assert list(selected(log)) == ["a", "b", "a", "a", "c", "a", "b"]
    assert list(selected(log, min_users=2)) == ["a", "a", "a", "a"]
    assert list(selected(log, min_users=2, unique=True)) == ["a"]
    assert sorted(selected(log, unique=True)) == ["a", "b", "c"]
    assert list(selected(log, min_users=4)) == []


def test_the_end_of_a_log_is_held_out(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": f"q{i % 7}", "user": str(i)}) for i in range(40)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert prepare(tmp_path / "log.jsonl", tmp_path / "out", held_out=0.25, min_users=5) == (40, 10, 10)
    train = [logged.instruction for logged in read_log(tmp_path / "out" / "train.jsonl")]
    assert sorted(train) == ["q0"] * 5 + ["q1"] * 5
    assert [one.instruction for one in read_log(tmp_path / "out" / "held-out.jsonl")] == [
        f"q{i % 7}" for i in range(30, 40)
    ]
    with pytest.raises(ConfigError, match="lower --min-users"):
        prepare(tmp_path / "log.jsonl", tmp_path / "out", min_users=20)
