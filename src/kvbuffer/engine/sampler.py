"""Choosing the next token of each request from the model's logits.

The definition, for one row of logits: apply penalties, then logit bias and the ``min_tokens`` mask; order the
tokens by descending logit, equals by ascending id; give each the weight exp((logit - largest) / temperature).
Now ``min_p``, ``top_k`` and ``top_p`` each keep a prefix of that order, in this sequence, ``top_p`` measuring
mass among what is left. The token sampled is the first whose cumulative weight exceeds u times the kept
weight; u, uniform in [0, 1), is the element of the request's Philox stream at the token's output position.

A row's largest logit, which is all that a greedy request needs, is found for all rows of a step in one call. What else
a row needs is done row by row, by NumPy on one thread in one fixed order, so a row's result cannot depend on the batch
or on the number of threads; its reductions over a row are also far faster than PyTorch's arg max, top-k and sort. A few
large logits decide almost every draw: no full sort is made unless they turn out not to.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kvbuffer.engine.request import TokenLogprob
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState
from kvbuffer.ops.argmax import finite_argmax

Row = npt.NDArray[np.float32]

_FLOAT32_MAX = float(np.finfo(np.float32).max)
#: How many of the largest logits to look at first, and next; after that all of them.
_FIRST_CANDIDATES, _MORE_CANDIDATES = 128, 2048


class Logits:
    """The logits of a step.

    Args:
        logits: [R, V] float32 on the CPU; not copied.

    Attributes:
        rows: the same.
        best: for each row the lowest id among those of its largest logit; -1 where that is not a finite number, or the
            row holds NaN.
    """

    def __init__(self, logits: Tensor) -> None:
        self.rows: npt.NDArray[np.float32] = logits.numpy()
        self.best: list[int] = finite_argmax(logits).tolist()


class SampledToken(NamedTuple):
    """A token chosen for one row, with its log-probability when the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None


class InvalidLogits(NamedTuple):
    """Stands in the place of a token when a row offers none; only that request fails.

    Attributes:
        reason: what is wrong, as a sentence for the user.
    """

    reason: str


def sample_row(logits: Logits, row: int, state: SamplingState) -> SampledToken | InvalidLogits:
    """Choose one token. The logits and the state are not modified.

    Args:
        logits: of the step.
        row: the one that the token is chosen from.
        state: whose token it is, the one at ``num_output_tokens``.

    Returns:
        The token; :class:`InvalidLogits` if the row holds NaN or infinity, or no token with finite logit.
    """
    best = token_id = logits.best[row]
    if best < 0:
        return InvalidLogits("The model's logits hold NaN or infinity, or no finite value.")
    params = state.params
    edited = raw = logits.rows[row]
    if state.edits_logits:
        edited = raw.copy()
        state.edit_logits(edited)
        token_id = int(edited.argmax())  # the lowest id among equals; NaN counts as largest
        if not math.isfinite(edited[token_id]):
            return InvalidLogits("Penalties, logit_bias and min_tokens leave no token to choose.")
    if not params.greedy:
        token_id = _draw(edited, edited[token_id], params, state.uniform(state.num_output_tokens))
    if params.logprobs is None:
        return SampledToken(token_id, None)
    return SampledToken(token_id, _token_logprob(raw, raw[best], token_id, params.logprobs))


def score_token(row: Row, token_id: int, num_top: int) -> TokenLogprob:
    """Return the log-probability of a token that is already known, and of the most likely ones.

    Args:
        row: [V] logits.
        token_id: the token, below V.
        num_top: how many of the most likely tokens to report.
    """
    return _token_logprob(row, row.max(), token_id, num_top)


def _draw(row: Row, peak: np.float32, params: SamplingParams, uniform: float) -> int:
    """Return the token id that the definition gives for ``row`` [V], all finite or -inf, and its maximum."""
    top_k = min(params.top_k, row.size)
    sizes = (top_k,) if top_k else (_FIRST_CANDIDATES, _MORE_CANDIDATES, row.size)
    total: float | None = None
    for size in sizes:
        ids, values = _largest(row, size)
        order = np.sort(values)[::-1]
        weights = _weights(order, peak, params.temperature)
        num_kept = int(np.count_nonzero(weights >= params.min_p))
        # Whether min_p and top_k cut inside the candidates, so that these are all that matters.
        complete = bool(top_k) or num_kept < order.size or order.size == row.size
        if top_k:
            num_kept = min(num_kept, top_k)
        cumulative = np.cumsum(weights[:num_kept], dtype=np.float64)
        if complete:
            kept = float(cumulative[-1])
        elif params.min_p > 0.0:
            continue
        else:
            if total is None:
                total = float(_weights(row, peak, params.temperature).sum())
            kept = total
        if params.top_p < 1.0:
            cut = int(np.searchsorted(cumulative, params.top_p * kept))
            if cut == cumulative.size and not complete:
                continue
            kept = float(cumulative[min(cut, cumulative.size - 1)])
        rank = int(np.searchsorted(cumulative, uniform * kept, side="right"))
        if rank < cumulative.size:
            break
    # Rounding can leave ``kept`` a hair above the last cumulative weight.
    rank = min(rank, int(np.count_nonzero(weights[:num_kept])) - 1)
    value = order[rank]
    return int(ids[np.flatnonzero(values == value)[rank - np.count_nonzero(values > value)]])


def _largest(row: Row, size: int) -> tuple[npt.NDArray[np.int64], Row]:
    """Return ids (ascending) and values of the largest entries: ``size`` or more, ties included.

    The row is seen as 8 x size columns. At least ``size`` of the columns' maxima reach the size-th largest of
    these maxima, hence so do at least ``size`` entries of the row, and rarely many more.
    """
    num_columns = 8 * size
    depth = row.size // num_columns
    if depth < 2:
        return np.arange(row.size), row
    maxima = row[: depth * num_columns].reshape(depth, num_columns).max(axis=0)
    threshold = np.partition(maxima, num_columns - size)[num_columns - size]
    ids = np.flatnonzero(row >= threshold)
    return ids, row[ids]


def _weights(values: Row, peak: np.float32, temperature: float) -> Row:
    """Return exp((values - peak) / temperature), float32, the same shape as ``values``."""
    with np.errstate(over="ignore"):  # to -inf, whose weight is 0
        weights = values - peak
        if temperature != 1.0:
            weights /= np.float32(min(temperature, _FLOAT32_MAX))
    np.exp(weights, out=weights)
    return weights


def _token_logprob(raw: Row, peak: np.float32, token_id: int, num_top: int) -> TokenLogprob:
    log_total = float(peak) + math.log(float(_weights(raw, peak, 1.0).sum()))
    value = raw[token_id]
    rank = 1 + int(np.count_nonzero(raw > value)) + int(np.count_nonzero(raw[:token_id] == value))
    top: list[tuple[int, float]] = []
    if num_top:
        ids, values = _largest(raw, num_top)
        best: npt.NDArray[Any] = np.argsort(-values, kind="stable")[:num_top]
        top = [(int(ids[i]), float(values[i]) - log_total) for i in best]
    return TokenLogprob(token_id, float(value) - log_total, rank, top)
