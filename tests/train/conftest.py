"""Prepared data, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import prepare_tiny


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tokens of tiny texts, and their tokenizer."""
    return prepare_tiny(tmp_path_factory.mktemp("training"))
