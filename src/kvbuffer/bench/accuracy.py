"""The gate before every speed: a sample of the same calls against the recurrence in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from kvbuffer.bench.forms import TimedForm
from kvbuffer.bench.pools import Pools
from kvbuffer.ops.calibration import random_tokens
from kvbuffer.ops.cost import LayerShape
from kvbuffer.ops.layout import Tokens
from kvbuffer.ops.reference import recurrence

#: RMS error over RMS of the outputs that a dtype may cause in a sample: a few times what correct kernels show, a
#: fraction of what one wrong record does.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.int8: 5e-2}

_REQUESTS = 2
_LEAST_TOKENS = 32


def error_limit(form: TimedForm, shape: LayerShape) -> float:
    """Return the largest error that passes, by the dtypes that the form uses."""
    used = [shape.state_dtype] * form.uses_state + [shape.record_dtype] * form.uses_records
    return max(LIMITS[dtype] for dtype in used)


@cache
def sample_error(form: TimedForm, shape: LayerShape, device: str) -> float:
    """Return the RMS error, relative to the RMS of the right outputs, over two cycles of two requests.

    One group of heads is enough: heads do not touch each other.
    """
    shape = replace(shape, key_heads=1, value_heads=shape.value_heads // shape.key_heads)
    rng = torch.Generator().manual_seed(0)
    calls = max(2 * form.calls + 1, -(-_LEAST_TOKENS // form.tokens)) if form.uses_state else form.calls
    pools = Pools(shape, _REQUESTS, 1, form.capacity, 0, device)
    starts = _random_states(pools, rng) if form.uses_state else torch.zeros(pools.states.data.shape).double()
    dims = shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim
    sequences = [random_tokens(shape.rule, calls * form.tokens, *dims, generator=rng) for _ in range(_REQUESTS)]
    step = form.bind(pools)
    outputs = []
    for n in range(calls):
        span = slice(n * form.tokens, (n + 1) * form.tokens)
        out = step(n, 0, _stack([sequence.rows(span) for sequence in sequences], device))
        outputs.append(out.unflatten(0, (_REQUESTS, form.tokens)))
    actual = torch.cat(outputs, 1).cpu().double()
    expected = torch.stack(
        [recurrence(shape.rule, _double(one), start)[0] for one, start in zip(sequences, starts, strict=True)]
    )
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def _random_states(pools: Pools, rng: torch.Generator) -> torch.Tensor:
    """Fill the states and return them in float64, on the CPU."""
    data, scales = pools.states
    if scales is None:
        data.copy_(torch.randn(data.shape, generator=rng) * 0.1)
        return data.cpu().double()
    data.copy_(torch.randint(-127, 128, data.shape, generator=rng))
    scales.fill_(0.1 / 127)
    return data.cpu().double() * scales.cpu().double().unsqueeze(-1)


def _stack(parts: list[Tokens], device: str) -> Tokens:
    columns = [None if xs[0] is None else torch.cat(xs).to(device) for xs in zip(*parts, strict=True)]
    return Tokens(*columns)  # type: ignore[arg-type]


def _double(tokens: Tokens) -> Tokens:
    columns = [None if x is None else x.double() for x in tokens]
    return Tokens(*columns)  # type: ignore[arg-type]
