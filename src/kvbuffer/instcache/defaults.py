"""Defaults that the command line shows; without PyTorch, which would slow --help down."""

from __future__ import annotations

#: Longest instruction that is searched for, in tokens.
MAX_TOKENS = 64
#: Bytes for the search's tree.
MEMORY = 1 << 30
#: Most tokens of an answer.
MAX_ANSWER_TOKENS = 256
