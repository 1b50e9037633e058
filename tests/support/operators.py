"""Random inputs, poisoned pools and error measures for tests of the linear-attention operators."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from kvbuffer.ops.buffered import buffered_decode, fold_records
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import Correction, Decay, UpdateRule


def make_tokens(rng: Generator, rule: UpdateRule, tokens: int, hk: int, hv: int, k: int, v: int) -> Tokens:
    """Unit-length keys, strengths over [0, 1] with both ends, decays from none to almost total."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    def unit(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(randn(*shape), dim=-1)

    def strengths(*shape: int) -> Tensor:
        x = torch.sigmoid(randn(*shape) * 2)
        x[torch.rand(shape, generator=rng) < 0.05] = 0.0
        x[torch.rand(shape, generator=rng) < 0.05] = 1.0
        return x

    g = beta = read = write = None
    if rule.decay is not Decay.NONE:
        shape = (tokens, hv) if rule.decay is Decay.SCALAR else (tokens, hv, k)
        g = -torch.exp(randn(*shape) * 2 - 3)
        g[torch.rand(shape, generator=rng) < 0.02] = -60.0
    if rule.correction is Correction.DELTA:
        beta = strengths(tokens, hv)
    if rule.correction is Correction.REMOVAL:
        # RWKV-7 takes out what it has not let decay: a rate of 1 on an undecayed state removes exactly.
        read = unit(tokens, hk, k)
        write = read * strengths(tokens, hk, k)
    return Tokens(unit(tokens, hk, k) * k**-0.5, unit(tokens, hk, k), randn(tokens, hv, v), g, beta, read, write)


def double(tokens: Tokens) -> Tokens:
    return Tokens(*(None if x is None else x.double() for x in tokens))


def stack(tokens: list[Tokens]) -> Tokens:
    """One call's inputs from single tokens ([1, ...] each)."""
    return Tokens(*(None if xs[0] is None else torch.cat(xs) for xs in zip(*tokens, strict=True)))


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    assert not actual.isnan().any()
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt().clamp_min(1e-30))


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poison(*tensors: Tensor | None) -> None:
    for x in tensors:
        if x is not None:
            x.fill_(float("nan") if x.dtype.is_floating_point else 77)


class Pool:
    """States and record pages of a few requests, poisoned wherever nothing was written."""

    def __init__(
        self,
        rule: UpdateRule,
        requests: int,
        hk: int,
        hv: int,
        k: int,
        v: int,
        m: int,
        page: int,
        rng: Generator,
        state_dtype: torch.dtype = torch.float32,
        record_dtype: torch.dtype = torch.float32,
    ):
        per_request = -(-m // page)
        self.rule, self.m = rule, m
        self.states = StatePool.allocate(requests + 2, hv, k, v, state_dtype)
        poison(*self.states)
        self.slots = torch.randperm(requests + 2, generator=rng)[:requests].int()
        rows = self.slots.long()
        if self.states.scales is None:
            self.states.data[rows] = torch.randn(requests, hv, k, v, generator=rng).to(state_dtype)
        else:
            self.states.data[rows] = torch.randint(-127, 128, (requests, hv, k, v), generator=rng, dtype=torch.int8)
            self.states.scales[rows] = torch.rand(requests, hv, k, generator=rng) / 64
        pages = torch.randperm(requests * per_request + 3, generator=rng)[: requests * per_request]
        self.page_table = pages.view(requests, per_request).int()
        self.records = RecordPages.allocate(rule, requests * per_request + 3, page, hk, hv, k, v, record_dtype)
        poison(*self.records)
        self.fill = torch.zeros(requests, dtype=torch.int32)

    def state(self, b: int) -> Tensor:
        """A copy of request b's state in float64."""
        slot = self.slots[b]
        state = self.states.data[slot].double()
        return state if self.states.scales is None else state * self.states.scales[slot].double().unsqueeze(-1)

    def decode(self, tokens: Tokens, rows: list[int] | None = None) -> Tensor:
        rows = list(range(len(self.slots))) if rows is None else rows
        fold = (self.fill[rows] == self.m).to(torch.uint8)
        out = buffered_decode(
            self.rule, tokens, self.states, self.slots[rows], self.records, self.page_table[rows], self.fill[rows], fold
        )
        self.fill[rows] = torch.where(fold.bool(), 0, self.fill[rows]) + 1
        return out

    def fold(self) -> None:
        fold_records(self.rule, self.states, self.slots, self.records, self.page_table, self.fill)
        self.fill.zero_()
