"""Decoding in one call: whatever the dtypes, the batch and the form, the bits of the operators called one by one.

Requests are at different positions and fills, with and without a state, and some fold. Everything a call may write,
outputs, states, records, rings and the residual, is compared, so what it must not write is held to it, too.
"""

import pytest
import torch

from kvbuffer.ops import dispatch
from kvbuffer.ops.buffered import buffered_decode, recurrent_decode
from kvbuffer.ops.conv import causal_conv
from kvbuffer.ops.gated_delta import GatedDeltaDecode
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

    def one_by_one(self, x, residual, rings, cu_seqlens, context_lens, slots, page_table, fill, fold):
        projected = self.in_proj.of_add_rms_norm(x, residual, self.norm, EPS)
        qkv = causal_conv(projected, self.conv_weight, self.rings, rings, cu_seqlens, context_lens)
        _, _, b, a = projected.split([CHANNELS, HV * V, HV, HV], 1)
        qk, v = qkv[:, : 2 * HK * K].view(-1, 2 * HK, K), qkv[:, 2 * HK * K :].view(-1, HV, V)
        g, beta = gated_delta_inputs(qk, b, a, self.a_log, self.dt_bias)
        tokens = Tokens(qk[:, :HK], qk[:, HK:], v, g, beta)
        if fold is None:
            return recurrent_decode(GATED_DELTANET, tokens, self.states, slots), projected
        buffer = (self.states, slots, self.records, page_table, fill, fold)
        return buffered_decode(GATED_DELTANET, tokens, *buffer), projected

    def at_once(self, *arguments):
        assert GatedDeltaDecode.covers(self.in_proj, self.states, self.records)
        return GatedDeltaDecode(
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


@pytest.mark.parametrize("requests", [1, 5])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.int8),
    ],
)
@pytest.mark.parametrize("recurrent", [False, True])
def test_one_call_gives_the_bits_of_its_operators(requests, dtype, state_dtype, recurrent):
    layer = Layer(dtype, state_dtype, requests)
    x, residual = random(requests, HIDDEN), random(requests, HIDDEN)
    order = torch.randperm(requests).int()
    slots, fill = order.flip(0).contiguous(), torch.randint(0, 2 * PAGE - 1, (requests,)).int()
    fold = (fill % 2).to(torch.uint8)
    if not recurrent and requests > 1:
        slots[1], fold[1] = -1, 0
    arguments = (
        order, torch.arange(requests + 1).int(), torch.randint(0, 50, (requests,)).int(), slots,
        torch.randperm(2 * requests).int().view(requests, 2), fill, None if recurrent else fold,
    )  # fmt: skip
    before = [residual, *layer.written]
    kept = [part.clone() for part in before]
    expected = [*layer.one_by_one(x, residual, *arguments), *(part.clone() for part in before)]
    for part, old in zip(before, kept, strict=True):
        part.copy_(old)
    actual = [*layer.at_once(x, residual, *arguments), *before]
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
