"""Defaults shared by the engine's options and the command line's; importing PyTorch here would slow --help down."""

from __future__ import annotations

MAX_NUM_SEQS = 256
MAX_NUM_BATCHED_TOKENS = 512
MAX_QUEUE_LEN = 4096
CACHE_DIR_BYTES = 16 << 30
