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
