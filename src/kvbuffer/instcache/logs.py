"""Logs of conversations, reduced to what users ask first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from kvbuffer.errors import ConfigError
from kvbuffer.instcache.identity import normalise

# Where the formats keep a conversation: LMSys-Chat and WildChat, ShareGPT, OpenAI; and its messages' roles and texts.
_CONVERSATIONS = ("conversation", "conversations", "messages")
_ROLES, _TEXTS = ("role", "from"), ("content", "value")
_USER_ROLES = ("user", "human")
# Where they say who asked; without that, every conversation counts as somebody else's.
_USERS = ("user", "user_id", "hashed_ip", "safety_identifier")
_IDS = ("conversation_id", "conversation_hash", "custom_id", "id")


class Logged(NamedTuple):
    """The first thing that someone asked in a conversation.

    Attributes:
        instruction: the text in its normal form, never empty.
        user: whoever asked, as far as the log tells users apart.
    """

    instruction: str
    user: str


def read_log(path: Path) -> Iterator[Logged]:
    """Go through the first instructions of a log, conversation by conversation.

    The format is found out from each record: LMSys-Chat-1M, WildChat, ShareGPT, OpenAI (conversations with
    ``messages``, and batch files with these in ``body``), or just an ``instruction`` or ``prompt``. Records without a
    user's message are passed over.

    Args:
        path: a ``.jsonl`` file, a ``.json`` file with a list, or, where pyarrow is installed, a ``.parquet`` file.

    Raises:
        ConfigError: the file cannot be read, or is of another kind.
    """
    for number, record in enumerate(_records(path)):
        instruction = normalise(_first_instruction(record) or "")
        if instruction:
            yield Logged(instruction, _user(record) or f"conversation {number}")


def selected(log: Iterable[Logged], min_users: int = 1, unique: bool = False) -> Iterator[str]:
    """Go through the instructions of a log that enough different people asked.

    Nothing but hashes is kept of instructions and users until then, so what only a few people wrote stays nowhere.

    Args:
        log: what was asked.
        min_users: an instruction is passed on from this user's asking on; those that fewer asked never are.
        unique: pass each instruction on once; otherwise as often as it is asked, the times before it was known to be
            asked by enough people included, so that frequencies are right.
    """
    users: dict[bytes, set[bytes]] = {}
    earlier: dict[bytes, int] = {}
    for instruction, user in log:
        key = _hash(instruction)
        known = users.setdefault(key, set())
        if len(known) < min_users:
            known.add(_hash(user))
            earlier[key] = earlier.get(key, 0) + 1
            if len(known) == min_users:
                yield from [instruction] * (1 if unique else earlier[key])
        elif not unique:
            yield instruction


def _hash(text: str) -> bytes:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_records(path)
            return
        with path.open(encoding="utf-8") as lines:
            if path.suffix == ".json":
                records = json.load(lines)
            else:
                records = (json.loads(line) for line in lines if line.strip())
            for record in records:
                if not isinstance(record, dict):
                    raise ConfigError(f"{path} must hold objects, one per conversation; found {str(record)[:80]!r}")
                yield record
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read {path} as a log: {error}") from error


def _parquet_records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            f"{path} needs pyarrow: pip install 'kvbuffer[parquet]', or convert it to JSON lines"
        ) from None
    for batch in parquet.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


def _first_instruction(record: dict[str, Any]) -> str | None:
    body = record.get("body")
    if isinstance(body, dict):
        record = body
    for name in ("instruction", "prompt"):
        if isinstance(record.get(name), str):
            return str(record[name])
    messages: list[Any] = next((record[name] for name in _CONVERSATIONS if isinstance(record.get(name), list)), [])
    for message in messages:
        if isinstance(message, dict) and _first(message, _ROLES) in _USER_ROLES:
            return _text(_first(message, _TEXTS))
    return None


def _text(content: Any) -> str | None:
    if isinstance(content, list):  # OpenAI's parts; what is not text cannot be predicted
        parts = [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
        return "\n".join(parts) if len(parts) == len(content) else None
    return content if isinstance(content, str) else None


def _user(record: dict[str, Any]) -> str | None:
    metadata, body = record.get("metadata"), record.get("body")
    places = [place for place in (record, metadata, body) if isinstance(place, dict)]
    found = next((value for place in places if (value := _first(place, _USERS))), None)
    return found or _first(record, _IDS)


def _first(fields: dict[str, Any], names: Iterable[str]) -> str | None:
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    return value if value is None or isinstance(value, str | list) else str(value)  # type: ignore[return-value]
