"""A layer's heads in one call: whatever the dtypes, the batch and the forms, the bits of its operators.

Requests are at different positions and fills, with and without a state, and some fold. Everything a call may write,
outputs, states, records, rings and the residual, is compared, so what it must not write is held to it, too.
"""

import itertools

import pytest
import torch

from kvbuffer.ops import dispatch
from kvbuffer.ops.batch import LinearForm, LinearSection, ModelInputs
from kvbuffer.ops.buffered import buffered_decode, buffered_verify, recurrent_decode
from kvbuffer.ops.chunked import chunked_prefill
from kvbuffer.ops.conv import causal_conv
from kvbuffer.ops.gated_delta import GatedDeltaHeads
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.norm import gated_delta_inputs
from kvbuffer.ops.rule import GATED_DELTANET

HK, HV, K, V, HIDDEN, TAPS, RING, PAGE, EPS = 2, 4, 32, 64, 96, 4, 8, 16, 1e-6
CHANNELS, WIDTH = 2 * HK * K + HV * V, 2 * HK * K + 2 * HV * V + 2 * HV

pytestmark = pytest.mark.skipif(dispatch.cpu_kernels() is None, reason="there is one call only with the kernels")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


class Layer:
    def __init__(self, dtype, state_dtype, requests):
        torch.manual_seed(requests)
        self.in_proj = Linear(random(WIDTH, HIDDEN, dtype=dtype))
        self.norm, self.conv_weight = random(HIDDEN), random(TAPS, CHANNELS)
        self.a_log, self.dt_bias = random(HV), random(HV)
        self.states = StatePool(random(requests, HV, K, V).to(state_dtype))
        if state_dtype == torch.int8:
            self.states = StatePool(
                torch.randint(-127, 128, (requests, HV, K, V)).to(state_dtype), random(requests, HV, K)
            )
        self.rings = random(requests, RING, CHANNELS, dtype=dtype)
        self.records = RecordPages(
            random(2 * requests, HK, PAGE, K),
            random(2 * requests, HV, PAGE, V),
            -random(2 * requests, HV, PAGE, 1).abs(),
        )
        self.written = [*(part for part in self.states if part is not None), self.rings, *self.records]

    def one_by_one(self, x, residual, inputs):
        projected = self.in_proj.of_add_rms_norm(x, residual, self.norm, EPS)
        where = (self.rings, inputs.rings, inputs.cu_seqlens, inputs.context_lens)
        qkv = causal_conv(projected, self.conv_weight, *where, parents=inputs.parents)
        _, _, b, a = projected.split([CHANNELS, HV * V, HV, HV], 1)
        qk, v = qkv[:, : 2 * HK * K].view(-1, 2 * HK, K), qkv[:, 2 * HK * K :].view(-1, HV, V)
        g, beta = gated_delta_inputs(qk, b, a, self.a_log, self.dt_bias)
        return torch.cat(
            [self.form(part, Tokens(qk[:, :HK], qk[:, HK:], v, g, beta)) for part in inputs.sections]
        ), projected

    def form(self, part, tokens):
        own, buffer = tokens.rows(part.tokens), (self.states, part.slots, self.records, part.page_table, part.fill)
        if part.form is LinearForm.RECURRENT:
            return recurrent_decode(GATED_DELTANET, own, self.states, part.slots)
        if part.form is LinearForm.BUFFERED:
            return buffered_decode(GATED_DELTANET, own, *buffer, part.fold)
        if part.form is LinearForm.CHUNKED:
            return chunked_prefill(GATED_DELTANET, own, self.states, part.slots, part.cu_seqlens, part.fresh)
        return buffered_verify(GATED_DELTANET, own, *buffer, part.cu_seqlens, part.parents)

    def at_once(self, *arguments):
        assert GatedDeltaHeads.covers(self.in_proj, self.states, self.records)
        return GatedDeltaHeads(
            self.in_proj,
            self.norm,
            EPS,
            self.conv_weight,
            self.a_log,
            self.dt_bias,
            self.states,
            self.rings,
            self.records,
        )(*arguments)


def batch_of(forms, requests):
    """As many requests of each form, at random fills, some without a state and some that fold; drafts are trees."""
    count = requests * len(forms)
    order, fills = torch.randperm(count).int(), torch.randint(0, 2 * PAGE - 8, (count,)).int()
    pages, sections, lengths, parents, begin = torch.randperm(2 * count).int().view(count, 2), [], [], [], 0
    for number, form in enumerate(forms):
        rows = slice(number * requests, (number + 1) * requests)
        slots, fill = order[rows].clone(), fills[rows].clone()
        fold = (fill % 2).to(torch.uint8)
        own = (
            [1] * requests if form in (LinearForm.RECURRENT, LinearForm.BUFFERED) else [2 + i for i in range(requests)]
        )
        if form not in (LinearForm.RECURRENT, LinearForm.CHUNKED) and requests > 1:
            slots[1], fold[1] = -1, 0
        tree = [parent for n in own for parent in [-1, 0, *[0] * (n - 2)][:n]]
        tokens = slice(begin, begin + sum(own))
        cu_seqlens = torch.tensor([0, *itertools.accumulate(own)]).int()
        in_tree = torch.tensor(tree).int() if form is LinearForm.VERIFIED else None
        chain = [i - 1 for n in own for i in range(n)]
        parents += tree if form is LinearForm.VERIFIED else chain
        fresh = (order[rows] % 2).to(torch.uint8)
        sections.append(LinearSection(form, tokens, cu_seqlens, slots, pages[rows], fill, fold, fresh, in_tree))
        lengths += own
        begin += sum(own)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)]).int()
    nothing = torch.empty(0)
    return ModelInputs(
        nothing.new_zeros(begin).long(), nothing, cu_seqlens, torch.randint(0, 50, (count,)).int(),
        torch.empty(0, 0), order, nothing, tuple(sections),
        torch.tensor(parents).int() if LinearForm.VERIFIED in forms else None,
    )  # fmt: skip


@pytest.mark.parametrize("requests", [1, 5])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.int8)],
)
@pytest.mark.parametrize(
    "forms",
    [
        [LinearForm.RECURRENT],
        [LinearForm.BUFFERED],
        [LinearForm.BUFFERED, LinearForm.VERIFIED],
        [LinearForm.RECURRENT, LinearForm.BUFFERED, LinearForm.CHUNKED, LinearForm.APPENDED],
    ],
    ids=["recurrent", "buffered", "drafts", "prompts"],
)
def test_one_call_gives_the_bits_of_its_operators(requests, dtype, state_dtype, forms):
    layer = Layer(dtype, state_dtype, requests * len(forms))
    inputs = batch_of(forms, requests)
    tokens = len(inputs.token_ids)
    x, residual = random(tokens, HIDDEN), random(tokens, HIDDEN)
    before = [residual, *layer.written]
    kept = [part.clone() for part in before]
    expected = [*layer.one_by_one(x, residual, inputs), *(part.clone() for part in before)]
    for part, old in zip(before, kept, strict=True):
        part.copy_(old)
    actual = [*layer.at_once(x, residual, inputs), *before]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
