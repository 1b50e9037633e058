"""What a drafter is. It guesses a request's next tokens; the model checks all guesses in one step.

A guess costs time if it is wrong, but never changes what is generated: the model samples every token as it would have
without drafts, and a draft is accepted if it is the token sampled. For drafts that are not themselves random this is
rejection sampling (Leviathan et al., arXiv 2211.17192) with a proposal that is certain; the distribution is unchanged,
and so is every text of a given seed. A drafter that samples should draw with ``request.sampling.uniform(position)``,
the very number that the model's token at that output position is drawn with: then the two agree most often.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from kvbuffer.engine.request import Request


class Draft(NamedTuple):
    """Guesses of what follows a request's last known token: a chain or a tree.

    Attributes:
        token_ids: the guesses.
        parents: for each guess the index of the one that it follows, which comes before it; -1 for the last known
            token. No two guesses with the same parent are the same token. None for a chain, each following the last.
    """

    token_ids: list[int]
    parents: list[int] | None = None

    @property
    def depth(self) -> int:
        """The most tokens of it that can be accepted."""
        if self.parents is None:
            return len(self.token_ids)
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
        return max(depths, default=0)

    def child(self, place: int, token_id: int) -> int | None:
        """Return the place of the guess ``token_id`` that follows the guess at ``place`` (-1: the known token)."""
        if self.parents is None:
            follows = place + 1 < len(self.token_ids) and self.token_ids[place + 1] == token_id
            return place + 1 if follows else None
        nodes = zip(self.token_ids, self.parents, strict=True)
        return next((i for i, node in enumerate(nodes) if node == (token_id, place)), None)


#: Nothing to propose.
NO_DRAFT = Draft([])


class Committed(NamedTuple):
    """The part of a step that counts for one request: tokens of a prompt, or a token with the drafts accepted after it.

    Attributes:
        request: the request. Its ``token_ids`` already hold what was sampled after these tokens, if anything was.
        begin: place of the first of them in ``request.token_ids``; the others follow.
        rows: where each of them was in the step.
    """

    request: Request
    begin: int
    rows: list[int]


class Drafter(ABC):
    """Guesses the next tokens of requests.

    Attributes:
        needs_hidden: whether :meth:`observe` is to get the model's hidden states.
    """

    needs_hidden = False

    def prepare(self, requests: Sequence[Request]) -> int:
        """Make up for what was put off while no drafts were wanted.

        Args:
            requests: those that drafts are wanted for now.

        Returns:
            For how many of them there was anything to make up for.
        """
        return 0

    @abstractmethod
    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Guess what follows all known tokens of each request.

        Args:
            requests: requests that decode: all tokens but the last are computed.
            limits: at least 1 each, the most tokens of its draft.

        Returns:
            A draft for each request; one without tokens if there is nothing to propose.
        """

    def observe(self, committed: Iterable[Committed], hidden: Tensor | None) -> None:  # noqa: B027  # optional
        """Learn what a step has computed; requests that end with it still have their memory.

        Args:
            committed: the parts of the step that count, prompts included.
            hidden: [N, hidden_size] float32, the step's hidden states after the final norm; None unless needed.
        """

    def forget(self, request: Request, publish: bool) -> None:  # noqa: B027  # optional
        """Drop what is kept of a request that ends and still has its memory; one that is preempted only loses its row.

        Args:
            request: it.
            publish: whether what it computed is any good to later requests.
        """
