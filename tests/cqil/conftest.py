"""Tiny checkpoints whose layers can be grouped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.checkpoints import make_checkpoint

#: Groups of two, three and four are possible of either type.
TYPES = ["linear_attention"] * 4 + ["full_attention"] * 4


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers with SwiGLU MLPs; not to be written to."""
    return make_checkpoint(tmp_path_factory.mktemp("cqil"), "qwen3_5", num_hidden_layers=8, layer_types=TYPES)


@pytest.fixture(scope="session")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers with mixtures of experts, but for the first and the sixth, and biases in attention."""
    return make_checkpoint(
        tmp_path_factory.mktemp("cqil"), "qwen3_next", num_hidden_layers=8, layer_types=TYPES, mlp_only_layers=[0, 5],
        attention_bias=True,
    )  # fmt: skip
