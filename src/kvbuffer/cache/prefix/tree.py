"""The structure under the prefix cache: a tree of pages of tokens, and the snapshots along its paths."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Literal

from kvbuffer.cache.snapshot import Snapshot
from kvbuffer.ops.attention import PAGE_SIZE

Tokens = tuple[int, ...]
#: Why a snapshot was made: another text leaves this one there, or a chunk of prefill, the prompt, the output ends; or
#: the prompt will soon end, in tokens that a chat template adds.
Origin = Literal["branch", "chunk", "tail", "prompt", "output"]


class StoredSnapshot:
    """A snapshot in the tree.

    Attributes:
        snapshot: its blocks and bounds.
        node: the page with its last token.
        origin: why it was made.
        uses: requests that started from it.
        last_used: when a request last started from it, or it was made; in requests started.
        recency: when it was last looked up, likewise.
        queued: whether the eviction queue has it.
        alive: whether it is in the tree.
    """

    __slots__ = ("alive", "last_used", "node", "origin", "queued", "recency", "snapshot", "uses")

    def __init__(self, snapshot: Snapshot, node: Node, origin: Origin, now: int) -> None:
        self.snapshot, self.node, self.origin, self.uses = snapshot, node, origin, 0
        self.last_used = self.recency = now
        self.queued, self.alive = False, True


class Node:
    """An attention page and the tokens whose keys and values it holds; or the root, which stands before all pages.

    Only a full page has children. Children are sorted by their tokens, and none is a prefix of another: the one that
    shares the most tokens with a text is therefore beside the place where the text would be inserted.

    Attributes:
        tokens: 1 to PAGE_SIZE tokens; none at the root.
        block: the number of the attention page; -1 at the root.
        parent: the page before; itself at the root.
        salt: the salt of the tree.
        depth: tokens before this page.
        children: pages that follow, in the order of their tokens.
        snapshots: those whose last token is in this page.
        resumable: for tokens that may follow this page (1 to PAGE_SIZE of them), the snapshots usable right after them.
        recency: when the page was last looked up, in requests started.
        queued: whether the eviction queue has it.
        alive: whether it is in the tree.
    """

    __slots__ = (
        *("alive", "block", "children", "depth", "keys", "parent", "queued", "recency", "resumable", "salt"),
        *("snapshots", "tokens"),
    )

    def __init__(self, tokens: Tokens, block: int, parent: Node | None, salt: str | None) -> None:
        self.tokens, self.block, self.salt = tokens, block, salt
        self.parent: Node = parent or self
        self.depth: int = 0 if parent is None else parent.depth + len(parent.tokens)
        self.keys: list[Tokens] = []
        self.children: list[Node] = []
        self.snapshots: list[StoredSnapshot] = []
        self.resumable: dict[Tokens, list[StoredSnapshot]] = {}
        self.recency, self.queued, self.alive = 0, False, True

    @classmethod
    def root(cls, salt: str | None) -> Node:
        """Return the root of a new tree."""
        return cls((), -1, None, salt)

    def starting_with(self, tokens: Tokens) -> Node | None:
        """Return a child whose page begins with ``tokens``."""
        place = bisect_left(self.keys, tokens)
        found = place < len(self.keys) and self.keys[place][: len(tokens)] == tokens
        return self.children[place] if found else None

    def continued_by(self, tokens: Tokens) -> Node | None:
        """Return the child whose page is the beginning of ``tokens`` and no more."""
        place = bisect_left(self.keys, tokens) - 1
        found = place >= 0 and self.keys[place] == tokens[: len(self.keys[place])]
        return self.children[place] if found else None

    def common_tokens(self, tokens: Tokens) -> int:
        """Return the most tokens that ``tokens`` and a child's page have in common from their beginning."""
        place = bisect_left(self.keys, tokens)
        return max((_common(key, tokens) for key in self.keys[max(0, place - 1) : place + 1]), default=0)

    def add(self, tokens: Tokens, block: int) -> Node:
        """Add a child, no sibling's beginning or continuation, and return it."""
        place = bisect_left(self.keys, tokens)
        child = Node(tokens, block, self, self.salt)
        self.keys.insert(place, tokens)
        self.children.insert(place, child)
        return child

    def extend(self, child: Node, tokens: Tokens, block: int) -> None:
        """Let ``child`` have ``tokens``, which continue its own, in page ``block``."""
        self.keys[bisect_left(self.keys, child.tokens)] = tokens
        child.tokens, child.block = tokens, block

    def remove(self, child: Node) -> None:
        """Take a child without children or snapshots out of the tree."""
        place = bisect_left(self.keys, child.tokens)
        del self.keys[place], self.children[place]
        child.alive = False

    def path(self) -> list[Node]:
        """Return the pages from the first to this one."""
        nodes, node = [], self
        while node.tokens:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


def attach(stored: StoredSnapshot) -> None:
    """Enter a snapshot at its page, and at every position where it can be resumed."""
    stored.node.snapshots.append(stored)
    for parent, tokens in resume_points(stored):
        parent.resumable.setdefault(tokens, []).append(stored)


def detach(stored: StoredSnapshot) -> None:
    """Undo :func:`attach`."""
    stored.alive = False
    stored.node.snapshots.remove(stored)
    for parent, tokens in resume_points(stored):
        parent.resumable[tokens].remove(stored)
        if not parent.resumable[tokens]:
            del parent.resumable[tokens]


def resume_points(stored: StoredSnapshot) -> Iterator[tuple[Node, Tokens]]:
    """Go through the positions where a snapshot can be resumed: the page before, and the tokens after that page."""
    node, last, first = stored.node, stored.snapshot.end, max(1, stored.snapshot.start)
    while last >= first:
        for position in range(last, max(first, node.depth + 1) - 1, -1):
            yield node.parent, node.tokens[: position - node.depth]
        last, node = node.depth, node.parent


def previous_end(stored: StoredSnapshot) -> int:
    """Return the tokens covered by the next shorter snapshot on the same path; 0 without one."""
    node = stored.node
    while node.tokens:
        shorter = [other.snapshot.end for other in node.snapshots if other.snapshot.end < stored.snapshot.end]
        if shorter:
            return max(shorter)
        node = node.parent
    return 0


def all_pages(root: Node) -> list[Node]:
    """Return every page under a root, parents before children."""
    nodes = [root]
    for node in nodes:
        nodes += node.children
    return nodes[1:]


def pages_of(token_ids: Sequence[int]) -> Iterator[Tokens]:
    """Cut tokens into pages; the last may be partial."""
    for start in range(0, len(token_ids), PAGE_SIZE):
        yield tuple(token_ids[start : start + PAGE_SIZE])


def walk(root: Node, token_ids: Sequence[int]) -> tuple[list[Node], int]:
    """Follow a text; return the root and the full pages that agree with it, and how many tokens agree."""
    path = [root]
    for tokens in pages_of(token_ids):
        child = path[-1].starting_with(tokens) if len(tokens) == PAGE_SIZE else None
        if child is None:
            return path, path[-1].depth + len(path[-1].tokens) + path[-1].common_tokens(tokens)
        path.append(child)
    return path, len(token_ids)


def last_resumable(path: list[Node], token_ids: Sequence[int]) -> tuple[int, StoredSnapshot | None]:
    """Return the last position in a text where a snapshot is usable, and the snapshot; 0 without one.

    Args:
        path: root and full pages of the text, from :func:`walk`.
        token_ids: the text.
    """
    for node in reversed(path):
        if node.resumable:
            start = node.depth + len(node.tokens)
            following = tuple(token_ids[start : start + PAGE_SIZE])
            for length in range(len(following), 0, -1):
                usable = node.resumable.get(following[:length])
                if usable:
                    return start + length, min(usable, key=lambda stored: stored.snapshot.end)
    return 0, None


def _common(one: Tokens, other: Tokens) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def check_structure(root: Node) -> None:
    """Check the tree under a root.

    Raises:
        RuntimeError: it is not what :class:`Node` says.
    """
    expected, found = set(), set()
    for node in [root, *all_pages(root)]:
        for child, key in zip(node.children, node.keys, strict=True):
            sound = child.parent is node and child.alive and child.tokens == key
            if not sound or not 0 < len(key) <= PAGE_SIZE or child.depth != node.depth + len(node.tokens):
                raise RuntimeError(f"prefix cache: page {child.block} does not fit the page before")
        if any(after[: len(key)] == key for key, after in zip(node.keys, node.keys[1:], strict=False)):
            raise RuntimeError(f"prefix cache: a page after page {node.block} is the beginning of another")
        if node.keys != sorted(node.keys) or (node.children and 0 < len(node.tokens) < PAGE_SIZE):
            raise RuntimeError(f"prefix cache: the pages after page {node.block} are out of order")
        for stored in node.snapshots:
            if not stored.alive or not 0 < stored.snapshot.end - node.depth <= len(node.tokens):
                raise RuntimeError(f"prefix cache: a snapshot of {stored.snapshot.end} tokens is at the wrong page")
            expected |= {(id(parent), tokens, id(stored)) for parent, tokens in resume_points(stored)}
        found |= {(id(node), tokens, id(stored)) for tokens, usable in node.resumable.items() for stored in usable}
    if expected != found:
        raise RuntimeError("prefix cache: resumable positions are not those of the snapshots")
