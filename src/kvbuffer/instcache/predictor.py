"""An instruction predictor: a checkpoint with the memory to score, search and sample what users may say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import torch

from kvbuffer.errors import ConfigError
from kvbuffer.instcache.defaults import MAX_TOKENS, MEMORY
from kvbuffer.instcache.identity import Identity
from kvbuffer.instcache.instructions import InstructionFile, SearchState
from kvbuffer.instcache.progress import Report, no_report
from kvbuffer.instcache.search import Float64, Search, score
from kvbuffer.instcache.tree import Tree
from kvbuffer.instcache.turn import UserTurn
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.weights import resolve_model
from kvbuffer.tokenizer import Tokenizer

# How long a search goes on between two transactions: what a crash loses at most.
_SAVE_INTERVAL_S = 10.0


class Predictor:
    """A model of what users say first.

    Args:
        model: checkpoint folder, hub id, or ``demo``.
        dtype: of the weights; None for the checkpoint's.
        max_tokens: longest instruction.
        num_bytes: memory for the tree.
        show_progress: draw a progress bar while loading.

    Attributes:
        turn: how an instruction stands in a prompt.
        tree: the memory.
        allowed: for each token whether an instruction may hold it.
        fingerprint: what makes two predictors the same.

    Raises:
        ModelError: the checkpoint or its chat template cannot be used.
        CapacityError: the memory is too small.
    """

    def __init__(
        self,
        model: str,
        dtype: torch.dtype | None = None,
        max_tokens: int = MAX_TOKENS,
        num_bytes: int = MEMORY,
        show_progress: bool = True,
    ) -> None:
        folder = resolve_model(model)
        config, tokenizer = ModelConfig.from_folder(folder), Tokenizer(folder)
        self.turn = UserTurn(tokenizer)
        self.allowed = self.turn.allowed_tokens(config.vocab_size)
        identity = Identity.of(folder, tokenizer)
        dtype = dtype or (torch.float32 if config.dtype == torch.float32 else torch.bfloat16)
        self.fingerprint = blake2b(identity.digest + str(dtype).encode(), digest_size=16).hexdigest()
        decoder = Decoder(folder, config, dtype, len(self.turn.head) + max_tokens, show_progress)
        self.tree = Tree(decoder, self.turn.head, max_tokens, num_bytes)

    def costs(self, instructions: Sequence[str]) -> Float64:
        """Return -log p of each instruction, [N] float64: infinity for those that no search would find."""
        texts = [self.turn.encode(text) or () for text in instructions]
        costs = score(self.tree, self.turn.end, texts)
        for i, ids in enumerate(texts):
            if not ids or not all(self.allowed[token] for token in ids) or self.turn.text(ids) != instructions[i]:
                costs[i] = float("inf")
        return costs

    def build(self, path: Path, sigma: float, report: Report = no_report, expected: int | None = None) -> int:
        """Find every instruction that costs at most ``sigma``; go on where an earlier call was stopped.

        Found are texts in normal form whose own tokens cost no more than that, so each counts once. As
        :meth:`costs` computes in the same way, an instruction is found if and only if its cost says so.

        Args:
            path: the file of instructions.
            sigma: the bound, in nats.
            report: told how many have been found.
            expected: how many there are likely to be, for ``report``.

        Returns:
            The number of instructions.

        Raises:
            ConfigError: sigma is no positive number.
            StoreError: there is something else, or another search, at ``path``.
        """
        if not 0 < sigma < float("inf"):
            raise ConfigError(f"sigma must be a positive number of nats, got {sigma}")
        file = InstructionFile(path, SearchState(self.fingerprint, sigma, self.tree.max_tokens))
        try:
            if not file.state.complete:
                self._search(file, sigma, report, expected)
            return file.state.num_found
        finally:
            file.close()
            self.tree.reset()

    def _search(self, file: InstructionFile, sigma: float, report: Report, expected: int | None) -> None:
        search = Search(self.tree, sigma, self.turn.end, self.allowed, file.frontier())
        before = file.state.num_evaluated - self.tree.num_evaluated
        found: list[tuple[str, float]] = []
        saved_at = time.monotonic()
        for batch in search.run():
            found += [(text, one.cost) for one in batch if (text := self.turn.text(one.tokens)) is not None]
            report(file.state.num_found + len(found), expected)
            if time.monotonic() - saved_at > _SAVE_INTERVAL_S:
                file.save(found, search.frontier(), before + self.tree.num_evaluated)
                found, saved_at = [], time.monotonic()
        file.save(found, [], before + self.tree.num_evaluated)
