"""The search's forks, one record each, beside forks that copy whole states; the same nodes, in turns."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.cache.transfer import copy_blocks
from kvbuffer.instcache.tree import Int32, Tree, node_bytes
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.weights import resolve_model
from kvbuffer.ops.batch import LinearForm, ModelInputs
from kvbuffer.ops.layout import StatePool


class WholeStates(Tree):
    """Every node has a state of its own, copied from its parent and then rewritten by the recurrence."""

    def _allocate(self, kind: str, size: int) -> LinearCache | AttentionCache:
        cache = super()._allocate(kind, size)
        if isinstance(cache, AttentionCache):
            return cache
        _, *heads = cache.states.data.shape
        states = StatePool.allocate(size, *heads)
        states.data.zero_()
        return cache._replace(states=states)

    def _copy_from_parents(self, nodes: Int32, parents: Int32, at: Int32) -> None:
        super()._copy_from_parents(nodes, parents, at)
        old = parents >= 0
        copy_blocks(self._caches, "slots", parents[old].tolist(), nodes[old].tolist())

    def _inputs(self, nodes: Int32, at: Int32) -> ModelInputs:
        inputs = super()._inputs(nodes, at)
        [section] = inputs.sections
        section = dataclasses.replace(section, form=LinearForm.RECURRENT, slots=torch.from_numpy(nodes))
        return dataclasses.replace(inputs, sections=(section,))


KINDS = {"records": Tree, "states": WholeStates}


def state_heavy(folder: Path) -> Path:
    """A model with the head dims of Qwen3-Next and small everything else, with random weights."""
    from tests.support.checkpoints import make_checkpoint

    return make_checkpoint(
        folder, "qwen3_5", hidden_size=256, intermediate_size=512, linear_key_head_dim=128, linear_value_head_dim=128,
        linear_num_key_heads=4, linear_num_value_heads=8, num_hidden_layers=4,
    )  # fmt: skip


def time_forks(tree: Tree, batch: int, depth: int, width: int) -> float:
    """Return nodes per second of growing texts of ``depth`` tokens, ``width`` children each, by batches."""
    rng = np.random.default_rng(0)
    tree.reset()
    parents = np.full(batch, tree.root, np.int32)
    seconds, count = 0.0, 0
    for _ in range(depth):
        tokens = rng.integers(3, 300, batch).astype(np.int32)
        began = time.perf_counter()
        nodes, _ = tree.append(parents, tokens)
        seconds += time.perf_counter() - began
        count += batch
        parents = np.repeat(nodes[: batch // width], width)
    return count / seconds


def compare_forks(folder: Path) -> dict[str, Any]:
    results = {}
    for name, path in (("demo", resolve_model("demo")), ("128-dim heads", state_heavy(folder))):
        config = ModelConfig.from_folder(path)
        model = Decoder(path, config, torch.bfloat16, 64, show_progress=False)
        each = config.cache_shape
        linear = each.linear
        state = each.num_linear_layers * linear.num_value_heads * linear.key_head_dim * linear.value_head_dim * 4
        trees = {kind: cls(model, [1, 3], 24, 900 * node_bytes(model, 26)) for kind, cls in KINDS.items()}
        for tree in trees.values():
            tree.reset()
        rounds: dict[str, list[float]] = {kind: [] for kind in trees}
        for tree in trees.values():
            time_forks(tree, 64, 12, 4)
        for _ in range(2):
            for kind, tree in trees.items():
                rounds[kind].append(time_forks(tree, 64, 12, 4))
        medians = {kind: float(np.median(speeds)) for kind, speeds in rounds.items()}
        results[name] = {
            "state_bytes": state, "nodes_per_second": medians, "rounds": rounds,
            "ratio": float(np.median(np.array(rounds["records"]) / np.array(rounds["states"]))),
        }  # fmt: skip
    return results
