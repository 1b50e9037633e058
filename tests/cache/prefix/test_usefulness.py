"""What is least worth keeping is learned from what was used."""

from __future__ import annotations

from kvbuffer.cache.prefix.tree import Node, Origin, StoredSnapshot, attach
from kvbuffer.cache.prefix.usefulness import Usefulness
from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.ops.attention import PAGE_SIZE
from tests.support.prefixes import make_pools


class Stored:
    """Snapshots of texts of 160 tokens that have nothing in common."""

    def __init__(self) -> None:
        self.usefulness = Usefulness(make_pools())

    def store(self, origin: Origin, end: int = 160, slot: int | None = 0) -> StoredSnapshot:
        node = Node.root(None)
        for start in range(0, end, PAGE_SIZE):
            node = node.add(tuple(range(start, min(end, start + PAGE_SIZE))), 0)
        stored = StoredSnapshot(Snapshot(end, end, end, slot, (), 0), node, origin, self.usefulness.now)
        attach(stored)
        self.usefulness.note_stored(origin)
        return stored

    def use(self, stored: StoredSnapshot) -> None:
        self.usefulness.now += 1
        stored.recency = self.usefulness.now
        self.usefulness.note_used(stored)

    def order(self, *stored: StoredSnapshot) -> list[StoredSnapshot]:
        return sorted(stored, key=self.usefulness.of_snapshot)


def test_what_saves_more_tokens_or_takes_fewer_bytes_is_worth_more() -> None:
    texts = Stored()
    short, long, light = texts.store("output", 100), texts.store("output", 160), texts.store("output", 100, slot=None)
    assert texts.order(short, long, light) == [short, long, light]


def test_what_was_used_lately_is_worth_more() -> None:
    texts = Stored()
    first, second = texts.store("output"), texts.store("output")
    texts.use(second)
    texts.use(first)
    assert texts.order(first, second) == [second, first]


def test_worth_that_is_not_called_on_fades() -> None:
    texts = Stored()
    long, short = texts.store("output", 160), texts.store("output", 32)
    assert texts.order(long, short) == [short, long]
    texts.usefulness.now += 20
    assert texts.order(long, texts.store("output", 32))[0] is long


def test_which_kind_of_snapshot_is_used_is_learned() -> None:
    texts = Stored()
    for _ in range(10):
        texts.use(texts.store("prompt"))
        texts.store("output")
    prompt, output = texts.store("prompt"), texts.store("output")
    assert texts.order(prompt, output) == [output, prompt]


def test_what_is_never_used_twice_is_worth_little_after_its_use() -> None:
    texts = Stored()
    for _ in range(10):
        used = texts.store("output")
        texts.use(used)
    fresh = texts.store("output")
    assert texts.order(used, fresh) == [used, fresh]


def test_a_change_of_habits_is_learned_too() -> None:
    texts = Stored()
    for _ in range(3000):
        texts.use(texts.store("prompt"))
        texts.store("output")
    for _ in range(3000):
        texts.store("prompt")
        texts.use(texts.store("output"))
    prompt, output = texts.store("prompt"), texts.store("output")
    assert texts.order(prompt, output) == [prompt, output]
