"""How the answers of the API write log-probabilities: chats, completions, and vLLM's form for prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

from kvbuffer.engine.request import TokenLogprob

#: JSON has no infinity; this stands for the logprob of a token that cannot be drawn (vLLM's value).
MIN_LOGPROB = -9999.0

#: Text of a token id.
TokenText = Callable[[int], str]


def chat_logprobs(logprobs: Iterable[TokenLogprob], token_text: TokenText) -> dict[str, Any]:
    """Return the field ``logprobs`` of a chat's choice."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(token_id)
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(text.encode())}

    content = [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*candidate) for candidate in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    logprobs: Iterable[TokenLogprob], token_text: TokenText, offset: int, first: int | None = None
) -> dict[str, Any]:
    """Return the field ``logprobs`` of a text completion's choice.

    Args:
        logprobs: of the tokens shown.
        token_text: text of a token id.
        offset: characters of the choice before these tokens.
        first: a token shown before them, a prompt's first, which has no log-probability.
    """
    shown = list(logprobs)
    tokens = [token_text(token.token_id) for token in shown]
    values: list[float | None] = [max(token.logprob, MIN_LOGPROB) for token in shown]
    best: list[dict[str, float] | None] = [
        {
            token_text(token_id): max(logprob, MIN_LOGPROB)
            for token_id, logprob in [*token.top, (token.token_id, token.logprob)]
        }
        for token in shown
    ]
    if first is not None:
        tokens, values, best = [token_text(first), *tokens], [None, *values], [None, *best]
    offsets = list(accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else []
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}


def prompt_logprobs(logprobs: Iterable[TokenLogprob], token_text: TokenText) -> list[dict[int, dict[str, Any]] | None]:
    """Return vLLM's field ``prompt_logprobs``: a mapping from token ids for each token, None for the first.

    Args:
        logprobs: of the prompt's tokens but the first.
        token_text: text of a token id.
    """

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": token_text(token_id)}

    return [
        None,
        *(
            {token.token_id: entry(token.token_id, token.logprob, token.rank)}
            | {token_id: entry(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(token.top, 1)}
            for token in logprobs
        ),
    ]
