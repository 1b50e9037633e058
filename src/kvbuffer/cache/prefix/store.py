"""The trees of cached prefixes, and the cache's references to the blocks that they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvbuffer.cache.pools import POOL_KINDS, Pools, blocks_of
from kvbuffer.cache.prefix.tree import (
    Node,
    StoredSnapshot,
    Tokens,
    all_pages,
    attach,
    check_structure,
    detach,
    pages_of,
)


class PrefixStore:
    """One tree per salt. What enters a tree is kept, what leaves it is dropped.

    Args:
        pools: the pools that blocks are of.
    """

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self._roots: dict[str | None, Node] = {}
        self._with_slot: dict[int, list[StoredSnapshot]] = {}

    def root(self, salt: str | None) -> Node:
        """Return the root of a salt's tree; if there is none, that of an empty one."""
        return self._roots.get(salt) or Node.root(salt)

    def pages(self) -> Iterator[Node]:
        """Go through all pages, parents before children."""
        for root in self._roots.values():
            yield from all_pages(root)

    def add_pages(self, token_ids: Sequence[int], salt: str | None, blocks: Sequence[int]) -> Node:
        """Enter the pages of a text, at least one, those left out that are there; return its last page."""
        node = self._roots.setdefault(salt, Node.root(salt))
        for tokens, block in zip(pages_of(token_ids), blocks, strict=True):
            node = self._add_page(node, tokens, block)
        return node

    def _add_page(self, parent: Node, tokens: Tokens, block: int) -> Node:
        child = parent.starting_with(tokens)
        if child is not None:
            return child
        self.pools.attention_pages.keep((block,))
        shorter = parent.continued_by(tokens)
        if shorter is None:
            return parent.add(tokens, block)
        replaced = shorter.block
        parent.extend(shorter, tokens, block)
        self.pools.attention_pages.drop((replaced,))
        return shorter

    def remove_page(self, leaf: Node) -> Node | None:
        """Take a last page without snapshots out; return the page before, if that is now a last one."""
        parent = leaf.parent
        parent.remove(leaf)
        self.pools.attention_pages.drop((leaf.block,))
        if parent.children:
            return None
        if parent.tokens:
            return parent
        del self._roots[parent.salt]
        return None

    def add_snapshot(self, stored: StoredSnapshot) -> None:
        """Enter a snapshot at its page."""
        self.pools.keep(blocks_of(stored.snapshot))
        if stored.snapshot.slot is not None:
            self._with_slot.setdefault(stored.snapshot.slot, []).append(stored)
        attach(stored)

    def remove_snapshot(self, stored: StoredSnapshot) -> None:
        """Undo :meth:`add_snapshot`."""
        detach(stored)
        slot = stored.snapshot.slot
        if slot is not None:
            self._with_slot[slot].remove(stored)
            if not self._with_slot[slot]:
                del self._with_slot[slot]
        self.pools.drop(blocks_of(stored.snapshot))

    def with_slot(self, slot: int) -> list[StoredSnapshot]:
        """Return the snapshots with the state in a slot."""
        return self._with_slot.get(slot, [])[::]

    def clear(self) -> None:
        """Give up everything."""
        for page in self.pages():
            self.pools.attention_pages.drop((page.block,))
            for stored in page.snapshots:
                self.pools.drop(blocks_of(stored.snapshot))
        self._roots.clear()
        self._with_slot.clear()

    def check_integrity(self) -> None:
        """Check the structure, and that the blocks it names are the ones it holds.

        Raises:
            RuntimeError: they are not.
        """
        held: list[dict[int, int]] = [{} for _ in POOL_KINDS]
        for root in self._roots.values():
            check_structure(root)
        for page in self.pages():
            for blocks in [blocks_of(None, (page.block,)), *(blocks_of(s.snapshot) for s in page.snapshots)]:
                for count, numbers in zip(held, blocks, strict=True):
                    for number in numbers:
                        count[number] = count.get(number, 0) + 1
        for pool, count in zip(self.pools.all, held, strict=True):
            pool.check_integrity()
            if any(pool.kept(block) != count.get(block, 0) for block in range(pool.num_taken)):
                raise RuntimeError(f"prefix cache: {pool.name} held are not those of the tree")
