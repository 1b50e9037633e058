"""Every instruction with a negative log-likelihood of at most sigma: a search of the predictor's tree, exact.

A token costs -log p >= 0, so whatever lies below a text that costs more than sigma does, too. The tree is searched
depth first, but many nodes at a time: the likeliest of the texts that were found last come first. So few nodes are in
memory at a time, and a bound is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvbuffer.instcache.tree import MAX_BATCH, Float32, Int32, Tree

Float64 = npt.NDArray[np.float64]
# Far more than rounding: what may be within sigma in float32 is looked at again in float64.
_MARGIN = 1e-2


class Layer(NamedTuple):
    """Texts that wait to be computed, the likeliest last.

    Attributes:
        parents: [N] nodes.
        tokens: [N] the token behind each.
        costs: [N] float64, -log p of the whole text.
    """

    parents: Int32
    tokens: Int32
    costs: Float64

    def split(self, count: int) -> tuple[Layer, Layer]:
        """Return the layer without its last ``count`` texts, and these."""
        at = max(0, len(self.tokens) - count)
        parents, tokens, costs = self
        return Layer(parents[:at], tokens[:at], costs[:at]), Layer(parents[at:], tokens[at:], costs[at:])


class Found(NamedTuple):
    """An instruction: its tokens, and -log p with the token that ends it."""

    tokens: list[int]
    cost: float


class Waiting(NamedTuple):
    """A layer as it is saved: texts by their tokens.

    Attributes:
        texts: the parents' tokens, each once.
        behind: [N] which of them each text goes on behind.
        tokens: as in ``Layer``.
        costs: as in ``Layer``.
    """

    texts: list[list[int]]
    behind: Int32
    tokens: Int32
    costs: Float64


class Search:
    """A search under way.

    Args:
        tree: memory, with nothing in it but its root.
        sigma: the bound, in nats.
        end: token that ends an instruction.
        allowed: [vocab_size] the tokens that an instruction may hold.
        frontier: where an earlier search was when :meth:`frontier` was called; from the root without one.
    """

    def __init__(
        self,
        tree: Tree,
        sigma: float,
        end: int,
        allowed: Sequence[bool],
        frontier: Sequence[Waiting] | None = None,
    ) -> None:
        self._tree, self._sigma, self._end = tree, sigma, end
        self._forbidden = np.flatnonzero(~np.array(allowed, bool))
        self._layers: list[Layer] = []
        self._found: list[Found] = []
        if frontier is None:
            root = np.array([tree.root], np.int32)
            self._expand(root, tree.root_costs[None].copy(), np.zeros(1))
        else:
            self._restore(frontier)

    @property
    def num_waiting(self) -> int:
        """Texts found that are still to be computed."""
        return sum(len(layer.tokens) for layer in self._layers)

    def run(self) -> Iterator[list[Found]]:
        """Search on, one batch after the other; yield what each one finds, which may be nothing."""
        while True:
            found, self._found = self._found, []
            yield found
            if not self._layers:
                return
            parents, tokens, costs = self._pop()
            nodes, following = self._tree.append(parents, tokens)
            self._expand(nodes, following, costs)

    def _pop(self) -> Layer:
        """Take the texts to compute next: as many as leave each level of the tree below them the same memory."""
        taken: list[Layer] = []
        count, shallowest = 0, self._tree.max_tokens
        while self._layers:
            shallowest = min(shallowest, int(self._tree.depth(self._layers[-1].parents).min()))
            room = min(MAX_BATCH, self._tree.num_free // (self._tree.max_tokens - shallowest)) - count
            if taken and room <= 0:
                break
            rest, likeliest = self._layers.pop().split(max(1, room))
            taken.append(likeliest)
            count += len(likeliest.tokens)
            if len(rest.tokens):
                self._layers.append(rest)
                break
        parents, tokens, costs = zip(*taken, strict=True)
        return Layer(np.concatenate(parents), np.concatenate(tokens), np.concatenate(costs))

    def _expand(self, nodes: Int32, following: Float32, costs: Float64) -> None:
        """Note what lies below some nodes within sigma: instructions that end there, texts that go on.

        ``following`` is overwritten.
        """
        left = self._sigma - costs
        ends = costs + following[:, self._end].astype(np.float64)
        ending = np.flatnonzero(ends <= self._sigma)
        self._found += map(Found, self._tree.texts(nodes[ending]), ends[ending].tolist())
        following[:, self._end] = np.inf
        following[:, self._forbidden] = np.inf
        following[self._tree.depth(nodes) >= self._tree.max_tokens] = np.inf
        rows, tokens = np.nonzero(following <= (left + _MARGIN).astype(np.float32)[:, None])
        children = costs[rows] + following[rows, tokens].astype(np.float64)
        within = children <= self._sigma
        rows, children = rows[within], children[within]
        self._tree.hold(nodes, np.bincount(rows, minlength=len(nodes)))
        if len(children):
            order = np.argsort(-children, kind="stable")
            self._layers.append(Layer(nodes[rows[order]], tokens[within][order].astype(np.int32), children[order]))

    def frontier(self) -> list[Waiting]:
        """Return where the search is, for one that goes on from here: between two batches that ``run`` yields."""
        saved = []
        for layer in self._layers:
            nodes, behind = np.unique(layer.parents, return_inverse=True)
            saved.append(Waiting(self._tree.texts(nodes), behind.astype(np.int32), layer.tokens, layer.costs))
        return saved

    def _restore(self, frontier: Sequence[Waiting]) -> None:
        """Compute the nodes of a saved frontier again, all that it has in common once."""
        texts = [text for layer in frontier for text in layer.texts]
        nodes: Int32 = np.full(len(texts), self._tree.root, np.int32)
        for numbers, ends, _ in self._tree.walk(texts):
            nodes[numbers] = ends
        begin = 0
        for layer in frontier:
            own = nodes[begin : begin + len(layer.texts)]
            begin += len(layer.texts)
            self._tree.hold(own, np.bincount(layer.behind, minlength=len(own)))
            self._layers.append(Layer(own[layer.behind], layer.tokens, layer.costs))
        self._tree.drop(nodes)


def score(tree: Tree, end: int, texts: Sequence[Sequence[int]]) -> Float64:
    """Return what instructions cost, [N] float64: just what the search says, as they are computed in the same way.

    Args:
        tree: memory, with nothing in it but its root.
        end: token that ends an instruction.
        texts: their tokens; longer ones than the tree takes cost infinity.
    """
    costs: Float64 = np.full(len(texts), np.inf)
    short = [i for i, text in enumerate(texts) if len(text) <= tree.max_tokens]
    short.sort(key=lambda i: list(texts[i]))  # the same beginnings together
    at_once = max(1, tree.num_free // max(1, tree.max_tokens))
    for begin in range(0, len(short), at_once):
        part = short[begin : begin + at_once]
        own = [texts[i] for i in part]
        paid = np.array([tree.root_costs[text[0] if text else end] for text in own], np.float64)
        nodes: Int32 = np.full(len(own), tree.root, np.int32)
        for numbers, reached, following in tree.walk(own):
            depths = tree.depth(reached).tolist()
            nodes[numbers] = reached
            nexts = [own[i][at] if at < len(own[i]) else end for i, at in zip(numbers, depths, strict=True)]
            paid[numbers] += following[np.arange(len(numbers)), nexts].astype(np.float64)
        tree.drop(nodes)
        costs[part] = paid
    return costs
