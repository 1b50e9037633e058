"""The compiled chunked prefill where it has more to get wrong than portable PyTorch: padding, tiles, threads, rounding.

That it computes the recurrence at all is tested with every other backend in test_chunked.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Generator, Tensor

from kvbuffer.ops import dispatch, portable
from kvbuffer.ops.chunked import CHUNK
from kvbuffer.ops.cpu.backend import chunked_prefill
from kvbuffer.ops.layout import StatePool, Tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, KDA, RETNET, RWKV7, Correction, Decay, UpdateRule
from tests.support.operators import Pool, double, int32, make_tokens, poison, rms_ratio

RULES = list(FAMILIES.values())
# One of each way that operands are prepared.
WAYS = [RETNET, GATED_DELTANET, KDA, RWKV7]

pytestmark = pytest.mark.skipif(dispatch.cpu_kernels() is None, reason=dispatch.explain())


def name(rule: UpdateRule) -> str:
    return rule.name


def prefill_one(rule: UpdateRule, x: Tokens, start: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and final state of one sequence in a call of its own."""
    states = StatePool(start.clone().unsqueeze(0))
    out = chunked_prefill(rule, x, states, int32([0]), int32([0, len(x.v)]), torch.zeros(1, dtype=torch.uint8))
    return out, states.data[0]


def nan(x: Tokens) -> Tokens:
    return Tokens(*(None if t is None else torch.full_like(t, torch.nan) for t in x))


@pytest.mark.parametrize("rule", RULES, ids=name)
@pytest.mark.parametrize("dims", [(16, 16), (17, 48), (128, 64), (100, 16), (256, 256)], ids=str)
def test_dims_that_fill_no_tile_or_panel(rng: Generator, rule: UpdateRule, dims: tuple[int, int]) -> None:
    x = make_tokens(rng, rule, CHUNK + 37, 1, 3, *dims)
    start = torch.randn(3, *dims, generator=rng)
    prefill_one(rule, nan(x), start)
    out, state = prefill_one(rule, x, start)
    expected, final = recurrence(rule, double(x), start.double())
    assert rms_ratio(out, expected) < 2e-6
    assert rms_ratio(state, final) < 2e-6


@pytest.mark.parametrize("rule", WAYS, ids=name)
def test_every_length_of_a_ragged_chunk(rng: Generator, rule: UpdateRule) -> None:
    """A token's result does not depend on how many follow it: each length gives a prefix of the full chunk's bits."""
    x = make_tokens(rng, rule, 2 * CHUNK, 1, 2, 32, 48)
    start = torch.randn(2, 32, 48, generator=rng)
    whole, _ = prefill_one(rule, x, start)
    for length in range(1, 2 * CHUNK):
        prefill_one(rule, nan(x), start)  # what a short chunk were to read of the work space past its end would show
        out, state = prefill_one(rule, x.rows(slice(length)), start)
        assert torch.equal(out, whole[:length])
        if length % 9 == 0:
            assert rms_ratio(state, recurrence(rule, double(x.rows(slice(length))), start.double())[1]) < 2e-6


@pytest.mark.parametrize("rule", WAYS, ids=name)
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(
    rng: Generator, rule: UpdateRule
) -> None:
    """Threads also change how many value heads share the products of their key head: 1, 2 or all 4."""
    lengths, heads, dims = [70, 1, 0, 200], (2, 8), (32, 48)
    x = make_tokens(rng, rule, sum(lengths), *heads, *dims)
    starts = torch.randn(len(lengths), heads[1], *dims, generator=rng)
    borders = [0, *itertools.accumulate(lengths)]
    spans = zip(itertools.pairwise(borders), starts, strict=True)
    alone = [prefill_one(rule, x.rows(slice(a, b)), s) for (a, b), s in spans]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7, 32):
            torch.set_num_threads(count)
            states = StatePool(starts.clone())
            no = torch.zeros(len(lengths), dtype=torch.uint8)
            out = chunked_prefill(rule, x, states, torch.arange(len(lengths), dtype=torch.int32), int32(borders), no)
            assert torch.equal(out, torch.cat([o for o, _ in alone]))
            assert torch.equal(states.data, torch.stack([s for _, s in alone]))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("rule", WAYS, ids=name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_states_are_rounded_once_as_portable_does(rng: Generator, rule: UpdateRule, dtype: torch.dtype) -> None:
    length, heads, dims = 3 * CHUNK, (2, 4), (32, 48)
    x = make_tokens(rng, rule, length, *heads, *dims)
    pool = Pool(rule, 2, *heads, *dims, 1, 16, rng, dtype)
    copy = StatePool(*(None if t is None else t.clone() for t in pool.states))
    exact = torch.stack([pool.state(b) for b in range(2)]).float()
    args = pool.slots[:1], int32([0, length]), torch.zeros(1, dtype=torch.uint8)
    out = chunked_prefill(rule, x, pool.states, *args)
    unrounded, final = prefill_one(rule, x, exact[0])
    assert torch.equal(out, unrounded)
    portable.buffered.store_state(copy, int(pool.slots[0]), final)
    # One step of the format where the two divide by an int8 row's scale differently.
    assert (pool.states.data.float() - copy.data.float()).abs().nan_to_num().max() <= (dtype == torch.int8)
    assert torch.equal(pool.states.data[pool.slots[1]], copy.data[pool.slots[1]])
    assert rms_ratio(pool.state(0), final) < 1e-2


@pytest.mark.parametrize("rule", [r for r in RULES if r.decay is not Decay.NONE], ids=name)
def test_a_decay_of_minus_infinity_forgets(rng: Generator, rule: UpdateRule) -> None:
    """Whatever the state and the tokens before held, from that token on everything is as from a zero state."""
    x = make_tokens(rng, rule, 2 * CHUNK, 2, 2, 32, 48)
    assert x.g is not None
    at = CHUNK + 21
    x.g[at] = -torch.inf
    if rule.correction is Correction.REMOVAL:
        assert x.removal_read is not None
        x.removal_read[at] = 0.0  # it would read the state before the decay
    out, state = prefill_one(rule, x, torch.randn(2, 32, 48, generator=rng))
    rest = x.rows(slice(at, None))
    rest.g[0] = 0.0
    expected, final = recurrence(rule, double(rest), torch.zeros(2, 32, 48, dtype=torch.float64))
    assert rms_ratio(out[at:], expected) < 2e-6
    assert rms_ratio(state, final) < 2e-6


def test_slow_decays_do_not_drift(rng: Generator) -> None:
    """A decay of 1 - 1e-5 per token is lost in the rounding of float32 factors, but not of their exponents' sums."""
    length = 64 * CHUNK
    x = make_tokens(rng, RETNET, length, 1, 1, 16, 16)._replace(g=torch.full((length, 1), -1e-5))
    start = torch.randn(1, 16, 16, generator=rng) * 1e3  # so that the state, and not the tokens, makes the result
    out, state = prefill_one(RETNET, x, start)
    expected, final = recurrence(RETNET, double(x), start.double())
    assert rms_ratio(out, expected) < 2e-6
    assert rms_ratio(state, final) < 2e-6


def test_strided_rows_and_decays_shared_by_all_tokens(rng: Generator) -> None:
    rule = RETNET
    x = make_tokens(rng, rule, 100, 2, 4, 32, 48)
    decay = -torch.rand(4, generator=rng).expand(100, 4)
    x = x._replace(g=decay)
    wide = torch.empty(100, 2 * 64 + 4 * 48 + 5)
    poison(wide)
    q, k, v = wide[:, :64].view(100, 2, 32), wide[:, 64:128].view(100, 2, 32), wide[:, 128:320].view(100, 4, 48)
    for view, dense in zip((q, k, v), x[:3], strict=True):
        view.copy_(dense)
    start = torch.randn(4, 32, 48, generator=rng)
    out, state = prefill_one(rule, x._replace(q=q, k=k, v=v), start)
    expected, final = prefill_one(rule, x._replace(g=decay.contiguous()), start)
    assert torch.equal(out, expected)
    assert torch.equal(state, final)


def test_a_removal_rule_with_a_scalar_decay_of_its_own(rng: Generator) -> None:
    """No family of the table, but a rule that data can say."""
    rule = UpdateRule("scalar_removal", Decay.SCALAR, Correction.REMOVAL)
    x = make_tokens(rng, rule, 150, 2, 4, 32, 48)
    start = torch.randn(4, 32, 48, generator=rng)
    out, state = prefill_one(rule, x, start)
    expected, final = recurrence(rule, double(x), start.double())
    assert rms_ratio(out, expected) < 2e-6
    assert rms_ratio(state, final) < 2e-6
