"""The memory of a growing tree of texts: one node per token, and a node costs one record.

A node's siblings share everything up to their parent: the checkpoint (the state of the text before the instructions, or
none) and the records since. So a fork is a record of its own, in a page of one, and a row of page numbers; no state is
copied, whatever its size. Only what a layer changes in place is copied from the parent: the convolution's last inputs,
and the attention page that the token falls into.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvbuffer.cache.plan import RECORD_PAGE_SIZE, attention_pages, block_bytes, format_size
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.cache.transfer import copy_blocks
from kvbuffer.errors import CapacityError
from kvbuffer.models.decoder import Decoder
from kvbuffer.ops import memory
from kvbuffer.ops.attention import PAGE_SIZE
from kvbuffer.ops.batch import LinearForm, LinearSection, ModelInputs
from kvbuffer.ops.buffered import fold_records
from kvbuffer.ops.layout import RecordPages, StatePool
from kvbuffer.ops.rule import GATED_DELTANET

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

#: A text before the instructions that is longer than this is folded into a state; shorter ones are records, too.
LONGEST_HEAD = 32
#: Most nodes that are computed at once.
MAX_BATCH = 256


class Tree:
    """Nodes below a common beginning, each with its text's memory.

    A node lives while it is held: by what is still to be done with it (:meth:`hold`), and by its children.

    Args:
        model: the decoder.
        head: tokens of the common beginning, at least one.
        max_tokens: longest text below it, in tokens.
        num_bytes: memory for the nodes.

    Attributes:
        max_tokens: as above.
        root_costs: [vocab_size] float32, see :meth:`append`, of the tokens after ``head``.
        root: the node of the last token of ``head``.
        num_evaluated: nodes computed so far.

    Raises:
        CapacityError: the memory cannot hold one text.
    """

    def __init__(self, model: Decoder, head: Sequence[int], max_tokens: int, num_bytes: int) -> None:
        self._model, self.max_tokens = model, max_tokens
        longest = len(head) + max_tokens
        each = node_bytes(model, longest)
        size = num_bytes // each
        if size < 2 * longest:
            raise CapacityError(
                f"{format_size(num_bytes)} cannot hold instructions of {max_tokens} tokens: "
                f"{format_size(2 * longest * each)} are needed"
            )
        self._caches = [self._allocate(kind, size) for kind in model.config.layer_types]
        self._free: Int32 = np.arange(size - 1, -1, -1, dtype=np.int32)
        self._num_free = size
        self._holders: Int32 = np.zeros(size, np.int32)
        self._parent: Int32 = np.full(size, -1, np.int32)
        self._token: Int32 = np.zeros(size, np.int32)
        self._length: Int32 = np.zeros(size, np.int32)
        self._nodes: Int32 = np.zeros((size, longest), np.int32)  # of each text, by position: its record pages
        self._pages: Int32 = np.zeros((size, attention_pages(longest)), np.int32)
        self._checkpoint = 0  # tokens that the state of slot 0 covers
        self._head, self.num_evaluated = len(head), 0
        node = np.full(1, -1, np.int32)
        for token in head:
            node, costs = self.append(node, np.array([token], np.int32))
            self.hold(node, 1)
        self.root, self.root_costs = int(node[0]), costs[0]
        if self._head > LONGEST_HEAD:
            self._fold_head()

    def reset(self) -> None:
        """Free everything below the root, whatever holds it."""
        size, kept = len(self._holders), self._nodes[self.root, : self._head].copy()
        self._holders[:] = 0
        self._holders[kept] = 1
        self._num_free = size - len(kept)
        self._free[: self._num_free] = np.setdiff1d(np.arange(size), kept)

    def _allocate(self, kind: str, size: int) -> LinearCache | AttentionCache:
        """Return the memory of a layer: what a node owns has the node's number."""
        config, dtype = self._model.config, self._model.dtype
        if kind == "full_attention":
            return AttentionCache(memory.empty(size, 2, config.num_kv_heads, PAGE_SIZE, config.head_dim, dtype=dtype))
        shape = config.linear
        heads = (shape.num_value_heads, shape.key_head_dim, shape.value_head_dim)
        return LinearCache(
            StatePool.allocate(1, *heads),
            torch.empty(size, shape.conv_kernel, shape.conv_dim, dtype=dtype),
            RecordPages.allocate(GATED_DELTANET, size, 1, shape.num_key_heads, *heads),
        )

    def _fold_head(self) -> None:
        pages = torch.from_numpy(self._nodes[[self.root], : self._head])
        none, slot, count = (torch.tensor([n], dtype=torch.int32) for n in (-1, 0, self._head))
        for cache in self._caches:
            if isinstance(cache, LinearCache):
                fold_records(GATED_DELTANET, cache.states, none, cache.records, pages, count, slot)
        self._checkpoint = self._head

    @property
    def num_free(self) -> int:
        """Nodes that there is memory for."""
        return self._num_free

    def depth(self, nodes: Int32) -> Int32:
        """Return how many tokens of the nodes' texts come after the head."""
        return self._length[nodes] - self._head

    def texts(self, nodes: Int32) -> list[list[int]]:
        """Return the nodes' tokens after the head."""
        paths = [self._nodes[node, self._head : end] for node, end in zip(nodes, self._length[nodes], strict=True)]
        return [self._token[path].tolist() for path in paths]

    def append(self, parents: Int32, tokens: Int32) -> tuple[Int32, Float32]:
        """Compute one more token behind each of some nodes; the caller holds the new nodes before anything else.

        Args:
            parents: [B] nodes; a node may come several times. Each time takes the place of one of its holders.
            tokens: [B] token ids.

        Returns:
            The new nodes [B], and what each next token costs, -log p [B, vocab_size]. A row's numbers do not depend on
            the others, so they are the same whenever and with whatever they are computed.

        Raises:
            RuntimeError: fewer nodes are free, a bug in the caller.
        """
        count = len(parents)
        if count > self._num_free:
            raise RuntimeError(f"{count} nodes asked for, {self._num_free} are free")
        self._num_free -= count
        nodes = self._free[self._num_free : self._num_free + count].copy()
        at = np.where(parents < 0, 0, self._length[parents])
        self._parent[nodes], self._token[nodes], self._length[nodes] = parents, tokens, at + 1
        self._holders[nodes] = 0
        self._nodes[nodes], self._pages[nodes] = self._nodes[parents], self._pages[parents]
        self._nodes[nodes, at], self._pages[nodes, at // PAGE_SIZE] = nodes, nodes
        self._copy_from_parents(nodes, parents, at)
        costs = self._costs(nodes, at)
        self.num_evaluated += count
        return nodes, costs

    def _copy_from_parents(self, nodes: Int32, parents: Int32, at: Int32) -> None:
        old = parents >= 0
        copy_blocks(self._caches, "rings", parents[old].tolist(), nodes[old].tolist())
        inside = at % PAGE_SIZE > 0
        source = self._pages[parents[inside], at[inside] // PAGE_SIZE]
        copy_blocks(self._caches, "attention_pages", source.tolist(), nodes[inside].tolist())

    def _costs(self, nodes: Int32, at: Int32) -> Float32:
        logits = self._model.forward(self._inputs(nodes, at), self._caches).numpy()
        shifted = logits - logits.max(1, keepdims=True)
        costs: Float32 = np.log(np.exp(shifted).sum(1, keepdims=True)) - shifted
        return costs

    def _inputs(self, nodes: Int32, at: Int32) -> ModelInputs:
        count, longest = len(nodes), int(at.max())
        each, borders = torch.arange(count), torch.arange(count + 1, dtype=torch.int32)
        fill = torch.from_numpy(at - self._checkpoint)
        section = LinearSection(
            form=LinearForm.BUFFERED,
            tokens=slice(0, count),
            cu_seqlens=borders,
            slots=torch.full((count,), 0 if self._checkpoint else -1, dtype=torch.int32),
            page_table=torch.from_numpy(self._nodes[nodes, self._checkpoint : longest + 1]),
            fill=fill,
            fold=torch.zeros(count, dtype=torch.uint8),
            fresh=torch.zeros(count, dtype=torch.uint8),
        )
        return ModelInputs(
            token_ids=torch.from_numpy(self._token[nodes]).long(),
            positions=torch.from_numpy(at),
            cu_seqlens=borders,
            context_lens=torch.from_numpy(at),
            attention_page_table=torch.from_numpy(self._pages[nodes, : attention_pages(longest + 1)]),
            rings=torch.from_numpy(nodes),
            logits_rows=each,
            sections=(section,),
        )

    def hold(self, nodes: Int32, counts: npt.ArrayLike) -> None:
        """Add holders to some nodes; a node without any is freed, and with it what only it held.

        Args:
            nodes: [B] nodes, each once.
            counts: how many to add to each: one for every time that :meth:`append` will be called behind it.
        """
        self._holders[nodes] += np.asarray(counts, np.int32)
        gone = nodes[self._holders[nodes] == 0]
        while len(gone):
            self._free[self._num_free : self._num_free + len(gone)] = gone
            self._num_free += len(gone)
            parents = self._parent[gone]
            np.subtract.at(self._holders, parents, 1)
            gone = np.unique(parents[self._holders[parents] == 0])

    def walk(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[Int32, Int32, Float32]]:
        """Grow the nodes of some texts below the root, token by token; what texts have in common is computed once.

        A node is held by its children and once for every text that ends in it; see :meth:`drop`.

        Args:
            texts: tokens after the head, none longer than ``max_tokens``.

        Yields:
            For some of the texts at a time, each once per token: their numbers [I], the nodes of their tokens [I], and
            the costs of the next tokens there [I, vocab_size].
        """
        lengths = np.array([len(text) for text in texts], np.int32)
        where = np.full(len(texts), self.root, np.int32)
        self._holders[self.root] += np.count_nonzero(lengths == 0)
        for at in range(int(lengths.max(initial=0))):
            active = np.flatnonzero(lengths > at).astype(np.int32)
            steps = np.stack([where[active], np.array([texts[i][at] for i in active.tolist()], np.int32)], 1)
            unique, inverse = np.unique(steps, axis=0, return_inverse=True)
            inverse = inverse.reshape(-1)
            np.add.at(self._holders, unique[:, 0], 1)
            for begin in range(0, len(unique), MAX_BATCH):
                part = unique[begin : begin + MAX_BATCH]
                nodes, costs = self.append(part[:, 0].copy(), part[:, 1].copy())
                chosen = (inverse >= begin) & (inverse < begin + len(part))
                rows, own = inverse[chosen] - begin, active[chosen]
                where[own] = nodes[rows]
                np.add.at(self._holders, where[own[lengths[own] == at + 1]], 1)
                yield own, where[own], costs[rows]

    def drop(self, nodes: Int32) -> None:
        """Give up one hold of each of some nodes, which may come several times."""
        np.subtract.at(self._holders, nodes, 1)
        self.hold(np.unique(nodes), 0)


def node_bytes(model: Decoder, longest: int) -> int:
    """Return the bytes of a node in a tree of texts of ``longest`` tokens: in the layers' memory, and in the tables."""
    config = model.config
    each = block_bytes(config.cache_shape, model.dtype, torch.float32, torch.float32, config.linear.conv_kernel)
    tables = 4 * (longest + attention_pages(longest) + 5)
    return each.record_page // RECORD_PAGE_SIZE + each.ring + each.attention_page + tables
