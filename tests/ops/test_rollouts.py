"""Thousands of tokens: deferred, exact folds drift no further from float64 than the same dtype's recurrence does."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from kvbuffer.ops.buffered import buffered_verify, recurrent_decode
from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, UpdateRule
from tests.support.operators import Pool, double, int32, make_tokens, rms_ratio

TOKENS, BUFFER, DRAFTS = 2000, 16, 7
LAST = slice(-TOKENS // 4, None)
HEADS, DIM = (1, 2), 32


def slowly_decaying(rng: Generator, rule: UpdateRule) -> Tokens:
    """Tokens whose marks on the state, and errors in it, last for about a thousand tokens."""
    x = make_tokens(rng, rule, TOKENS, *HEADS, DIM, DIM)
    return x if x.g is None else x._replace(g=-torch.exp(torch.randn(x.g.shape, generator=rng) - 7))


def rollout(pool: Pool, x: Tokens) -> Tensor:
    """Decode a token, verify some more, all accepted, and fold whenever no other round fits into the buffer."""
    outputs = []
    for start in range(0, TOKENS, 1 + DRAFTS):
        if pool.fill[0] + 1 + DRAFTS > BUFFER:
            pool.fold()
        outputs.append(pool.decode(x.rows(slice(start, start + 1))))
        drafts = x.rows(slice(start + 1, start + 1 + DRAFTS))
        borders = int32([0, len(drafts.v)])
        where = pool.slots, pool.records, pool.page_table, pool.fill
        outputs.append(buffered_verify(pool.rule, drafts, pool.states, *where, borders))
        pool.fill += borders[1]
    return torch.cat(outputs)


@pytest.mark.parametrize("rule", FAMILIES.values(), ids=lambda r: r.name)
def test_float32_states(backend: str, rng: Generator, rule: UpdateRule) -> None:
    pool = Pool(rule, 1, *HEADS, DIM, DIM, BUFFER, 4, rng)
    x, start = slowly_decaying(rng, rule), pool.state(0)
    expected = recurrence(rule, double(x), start)[0][LAST]
    baseline = recurrence(rule, x, start.float())[0][LAST]
    buffered = rollout(pool, x)[LAST]
    assert rms_ratio(buffered, expected) < 1.1 * rms_ratio(baseline, expected) + 1e-7


def test_bfloat16_states(backend: str, rng: Generator) -> None:
    """Rounding the state once per fold and not once per token."""
    pool = Pool(GATED_DELTANET, 1, *HEADS, DIM, DIM, BUFFER, 4, rng, torch.bfloat16)
    x, start = slowly_decaying(rng, GATED_DELTANET), pool.state(0)
    states = StatePool(pool.states.data.clone())
    expected = recurrence(GATED_DELTANET, double(x), start)[0][LAST]
    baseline = [recurrent_decode(GATED_DELTANET, x.rows(slice(t, t + 1)), states, pool.slots) for t in range(TOKENS)]
    buffered = rollout(pool, x)[LAST]
    assert rms_ratio(buffered, expected) < 0.5 * rms_ratio(torch.cat(baseline)[LAST], expected)
