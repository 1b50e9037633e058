"""Defaults that the command line shows; without PyTorch, which would slow --help down."""

from __future__ import annotations

#: Longest instruction that is searched for, in tokens.
MAX_TOKENS = 64
#: Bytes for the search's tree.
MEMORY = 1 << 30
#: Most tokens of an answer.
MAX_ANSWER_TOKENS = 256
#: Tokens of the tokenizer that a predictor trained from scratch gets.
VOCAB_SIZE = 4096
#: How often a predictor sees each instruction of the log, in how large batches, and for how many steps at least.
EPOCHS, BATCH_SIZE, FEWEST_STEPS = 4.0, 64, 300
