"""Drafters that know what is going to be generated, and are right or wrong as a test wants it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import Draft, Drafter


class OracleDrafter(Drafter):
    """Proposes what a request is going to say, with mistakes.

    Args:
        outputs: for each prompt what follows it; longer than any request goes on.
        is_right: whether the guess at a place of an output is to be right, asked anew for every guess.
        vocab_size: wrong guesses stay below.
    """

    def __init__(
        self, outputs: dict[tuple[int, ...], list[int]], is_right: Callable[[int], bool], vocab_size: int
    ) -> None:
        self.outputs, self.is_right, self.vocab_size = outputs, is_right, vocab_size

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        return [self._propose(request, limit) for request, limit in zip(requests, limits, strict=True)]

    def _propose(self, request: Request, limit: int) -> Draft:
        output, done = self.outputs[tuple(request.token_ids[: request.num_prompt_tokens])], request.num_output_tokens
        assert request.token_ids[request.num_prompt_tokens :] == output[:done]
        guesses = [
            token if self.is_right(place) else (token + 1) % self.vocab_size
            for place, token in enumerate(output[done : done + limit], done)
        ]
        return Draft(guesses)


class TreeDrafter(OracleDrafter):
    """Hides the oracle's chain in a random tree: some of its tokens have wrong siblings, and these have children."""

    def __init__(
        self, outputs: dict[tuple[int, ...], list[int]], is_right: Callable[[int], bool], vocab_size: int
    ) -> None:
        super().__init__(outputs, is_right, vocab_size)
        self.random = Random(2)

    def _propose(self, request: Request, limit: int) -> Draft:
        chain = super()._propose(request, limit).token_ids
        nodes: list[tuple[int, int]] = []
        last = -1
        while len(nodes) < limit:
            parent = last
            if chain and self.random.random() < 0.5:
                last, token = len(nodes), chain.pop(0)
            else:
                parent, token = self.random.randrange(-1, len(nodes)), self.random.randrange(self.vocab_size)
            if (token, parent) not in nodes:
                nodes.append((token, parent))
            elif last == len(nodes):
                last = nodes.index((token, parent))
        token_ids, parents = map(list, zip(*nodes, strict=True))
        return Draft(token_ids, parents)


def random_tree(size: int, random: Random) -> tuple[list[int], list[list[int]]]:
    """Return the parents of a tree's tokens, and the path to each one, itself included."""
    parents = [random.randrange(-1, i) for i in range(size)]
    paths: list[list[int]] = []
    for i, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), i])
    return parents, paths


def fixed_length(num_tokens: int) -> dict[str, Any]:
    """A ``speculative_config`` for drafts that are as long as may be, whatever they bring."""
    return {"method": "ngram", "num_speculative_tokens": num_tokens, "adaptive": False}


def sometimes(share: float) -> Callable[[int], bool]:
    """Let guesses be right at random."""
    random = Random(1)
    return lambda _: random.random() < share


def use_drafter(engine: Engine, drafter: Drafter) -> None:
    """Let another drafter propose from now on."""
    assert engine._speculator is not None
    engine._speculator.drafter = drafter
    engine._runner.needs_hidden = drafter.needs_hidden
