"""What a step's logits add to a request's output: tokens, one after the other, until one is no draft or the last."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from kvbuffer.engine.request import FinishReason, Request, TokenLogprob
from kvbuffer.engine.sampler import InvalidLogits, Logits, Row, sample_row, score_token
from kvbuffer.engine.speculative.drafter import Draft


class Extension(NamedTuple):
    """What a request's output gained.

    Attributes:
        text: new text.
        token_ids: new tokens.
        logprobs: one entry per new token, or None when not asked for.
        finish_reason: why the request ends, or None if it goes on.
        stop_reason: the stop string or stop token id that matched; for ABORT what was wrong.
        accepted: which of the draft's tokens are among the new ones and have been computed: a path from the last token
            that was known.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    accepted: list[int]


def extend_output(
    request: Request, logits: Logits, row: int, draft: Draft, eos_token_ids: Collection[int]
) -> Extension:
    """Sample a token; while it is one that was drafted, go on behind it.

    Every token is sampled from the model's logits as it would have been without drafts, penalties and endings included,
    so drafts change neither the distribution nor what a seed gives; see :mod:`kvbuffer.engine.speculative.drafter`.

    Args:
        request: a request whose known tokens are all computed; the new ones are appended.
        logits: of the step.
        row: the one after the last known token; one after each token of the draft follows.
        draft: guesses of what is sampled.
        eos_token_ids: tokens that end a request unless it ignores them.
    """
    texts, token_ids, logprobs, accepted, place = [], [], [], [], -1
    wants_logprobs = request.params.logprobs is not None
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    if len(request.token_ids) == request.max_len:  # nothing but the prompt's log-probabilities was asked for
        finish = FinishReason.LENGTH
    while finish is None:
        sampled = sample_row(logits, row + 1 + place, request.sampling)
        if isinstance(sampled, InvalidLogits):
            finish, stop_reason = FinishReason.ABORT, sampled.reason
            break
        request.token_ids.append(sampled.token_id)
        request.sampling.append(sampled.token_id)
        token_ids.append(sampled.token_id)
        if sampled.logprob is not None:
            logprobs.append(sampled.logprob)
        text, finish, stop_reason = _ending(request, sampled.token_id, eos_token_ids)
        texts.append(text)
        child = draft.child(place, sampled.token_id)
        if finish is not None or child is None:
            break
        accepted.append(child)
        place = child
    if finish is not None:
        texts.append(request.detokenizer.flush())
    return Extension("".join(texts), token_ids, logprobs if wants_logprobs else None, finish, stop_reason, accepted)


def score_prompt(request: Request, rows: Iterable[Row]) -> None:
    """Append to the log-probabilities of a request's prompt.

    Args:
        request: one that asked for them and does not have them all.
        rows: [R, V] logits, after the next R tokens of the prompt; those after its last token belong to the output.
    """
    assert request.params.prompt_logprobs is not None
    known = request.token_ids[: request.num_prompt_tokens]
    for row, token_id in zip(rows, known[len(request.prompt_logprobs) + 1 :], strict=False):
        request.prompt_logprobs.append(score_token(row, token_id, request.params.prompt_logprobs))


def _ending(
    request: Request, token_id: int, eos_token_ids: Collection[int]
) -> tuple[str, FinishReason | None, str | int | None]:
    """Return the text that a new token adds, and whether and why the request ends with it."""
    params, grammar = request.params, request.sampling.grammar
    if grammar is not None and grammar.is_complete:
        return "", FinishReason.STOP, None
    if request.num_output_tokens > params.min_tokens or not params.min_tokens:
        if token_id in params.stop_token_ids:
            return "", FinishReason.STOP, token_id
        if token_id in eos_token_ids and not params.ignore_eos:
            return "", FinishReason.STOP, None
    text, stop = request.detokenizer.append([token_id])
    if stop is not None:
        return text, FinishReason.STOP, stop
    if len(request.token_ids) >= request.max_len:
        return text, FinishReason.LENGTH, None
    return text, None, None
