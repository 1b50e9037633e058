"""The causal convolution equals its definition, however a sequence is cut and whatever else is in the batch."""

from __future__ import annotations

from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kvbuffer.ops.conv import causal_conv, compact_rings
from tests.support.drafters import random_tree

# One lane, a vector and its odd rest, more than one task's block of channels.
CHANNELS = [1, 7, 33, 531]
W = 4
RING = 8


def definition(x: Tensor, weight: Tensor) -> Tensor:
    """silu(conv(x)) of one whole sequence [N, C] in float64."""
    if len(x) == 0:
        return x.double()
    # A convolution of full rank with a diagonal weight: PyTorch's grouped one is slow.
    taps = weight.shape[0]
    padded = F.pad(x.double().T, (taps - 1, 0)).unsqueeze(0)
    return F.silu(F.conv1d(padded, torch.diag_embed(weight.double()).permute(1, 2, 0).contiguous()))[0].T


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Stream:
    """Sequences that are fed to :func:`causal_conv` in parts; the pool starts poisoned."""

    def __init__(self, xs: list[Tensor], weight: Tensor, rng: Generator, dtype: torch.dtype = torch.float32) -> None:
        self.xs, self.weight = xs, weight
        self.rings = torch.randperm(len(xs) + 2, generator=rng)[: len(xs)].int()
        self.pool = torch.full((len(xs) + 2, RING, weight.shape[1]), float("nan"), dtype=dtype)
        self.done = [0] * len(xs)

    def feed(self, counts: list[int]) -> list[Tensor]:
        parts = [x[d : d + n] for x, d, n in zip(self.xs, self.done, counts, strict=True)]
        borders = int32([0, *torch.tensor(counts).cumsum(0).tolist()])
        out = causal_conv(torch.cat(parts), self.weight, self.pool, self.rings, borders, int32(self.done))
        assert out.dtype == torch.float32
        self.done = [d + n for d, n in zip(self.done, counts, strict=True)]
        return list(out.split(counts))


def sequences(lengths: list[int], channels: int, rng: Generator) -> tuple[list[Tensor], Tensor]:
    xs = [torch.randn(n, channels, generator=rng) for n in lengths]
    return xs, torch.randn(W, channels, generator=rng)


@pytest.mark.parametrize("channels", CHANNELS)
def test_ragged_batches_equal_the_definition(backend: str, rng: Generator, channels: int) -> None:
    lengths = [5, 1, 0, 2, 3, 70]
    xs, weight = sequences(lengths, channels, rng)
    for out, x in zip(Stream(xs, weight, rng).feed(lengths), xs, strict=True):
        torch.testing.assert_close(out.double(), definition(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", CHANNELS)
def test_a_sequence_cut_anywhere_gives_the_same_output(backend: str, rng: Generator, channels: int) -> None:
    (x,), weight = sequences([9], channels, rng)
    (whole,) = Stream([x], weight, rng).feed([9])
    for cut in range(10):
        stream = Stream([x], weight, rng)
        parts = torch.cat([*stream.feed([cut]), *stream.feed([9 - cut])])
        same(backend, parts, whole)
    one_by_one = Stream([x], weight, rng)
    same(backend, torch.cat([one_by_one.feed([1])[0] for _ in range(9)]), whole)


def test_a_sequence_does_not_depend_on_its_neighbours(backend: str, rng: Generator) -> None:
    lengths = [6, 1, 40, 3]
    xs, weight = sequences(lengths, 37, rng)
    for together, x in zip(Stream(xs, weight, rng).feed(lengths), xs, strict=True):
        same(backend, together, Stream([x], weight, rng).feed([len(x)])[0])


def same(backend: str, actual: Tensor, expected: Tensor) -> None:
    """The same bits from the kernels; PyTorch's vectorised SiLU rounds by an element's place."""
    if backend == "cpu":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 9, 14])
def test_a_position_lies_in_its_row_of_the_ring_and_nothing_else_is_touched(
    backend: str, rng: Generator, taps: int, length: int
) -> None:
    x, weight = torch.randn(length, 5, generator=rng), torch.randn(taps, 5, generator=rng)
    stream = Stream([x], weight, rng)
    (out,) = stream.feed([length])
    ring = int(stream.rings[0])
    for row in range(RING):
        positions = [p for p in range(length) if p % RING == row]
        kept = stream.pool[ring, row]
        assert torch.equal(kept, x[positions[-1]]) if positions else kept.isnan().all()
    assert stream.pool[[r for r in range(3) if r != ring]].isnan().all()
    torch.testing.assert_close(out.double(), definition(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rejected", range(RING - W + 2))
def test_rejected_tokens_need_no_undoing(backend: str, rng: Generator, rejected: int) -> None:
    """As many as the ring is longer than what the taps reach back to."""
    (x,), weight = sequences([20], 7, rng)
    draft = torch.cat([x[:10], torch.randn(rejected, 7, generator=rng)])
    stream = Stream([draft], weight, rng)
    stream.feed([9])
    stream.feed([1 + rejected])
    stream.xs, stream.done = [x], [10]
    (out,) = stream.feed([10])
    torch.testing.assert_close(out.double(), definition(x, weight)[10:], rtol=1e-5, atol=1e-5)


def test_a_later_sequence_goes_on_in_the_ring_of_an_earlier_one(backend: str, rng: Generator) -> None:
    """The parts of one prompt may be computed in one call, with other requests between them."""
    (x, other), weight = sequences([600, 4], 300, rng)
    pool = torch.full((2, RING, 300), float("nan"))
    out = causal_conv(
        torch.cat([x[:590], other, x[590:]]), weight, pool, int32([1, 0, 1]), int32([0, 590, 594, 604]),
        int32([0, 0, 590]),
    )  # fmt: skip
    (whole,) = Stream([x], weight, rng).feed([600])
    same(backend, torch.cat([out[:590], out[594:]]), whole)


@pytest.mark.parametrize("context", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("channels", [5, 531])
def test_a_ring_that_is_kept_is_that_of_a_part_of_the_sequence(
    backend: str, rng: Generator, channels: int, context: int
) -> None:
    """Several in one call, before, at and after the end of the first row of taps; the outputs are those without."""
    lengths, counts = [12, 1, 7], [(0, 1), (0, 2), (0, 12), (2, 3), (2, 7)]
    xs, weight = sequences([context + n for n in lengths], channels, rng)
    pool, rings = torch.full((9, RING, channels), float("nan")), int32([4, 0, 2])

    def feed(pool: Tensor, rings: Tensor, parts: list[Tensor], context: int, kept: Tensor | None = None) -> Tensor:
        borders = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).int()
        return causal_conv(
            torch.cat(parts), weight, pool, rings, borders, torch.full_like(rings, context), kept=kept
        )  # fmt: skip

    feed(pool, rings, [x[:context] for x in xs], 0)
    expected, plain = pool.clone(), [x[context:] for x in xs]
    others = [1, 3, 5, 6, 7]
    kept = torch.tensor([[ring, s, n] for ring, (s, n) in zip(others, counts, strict=True)], dtype=torch.int32)
    out = feed(pool, rings, plain, context, kept)
    assert torch.equal(out, feed(expected, rings, plain, context))
    assert torch.equal(pool[rings.long()].nan_to_num(), expected[rings.long()].nan_to_num())
    assert pool[8].isnan().all()
    for ring, (s, n) in zip(others, counts, strict=True):
        own = torch.full((1, RING, channels), float("nan"))
        for begin, end in ((0, context), (context, context + n)):
            feed(own, int32([0]), [xs[s][begin:end]], begin)
        assert torch.equal(pool[ring].nan_to_num(), own[0].nan_to_num()), (s, n)


def test_a_bfloat16_ring_rounds_only_what_it_keeps(backend: str, rng: Generator) -> None:
    (x,), weight = sequences([30], 37, rng)
    stream = Stream([x], weight, rng, torch.bfloat16)
    (first,), (second,) = stream.feed([20]), stream.feed([10])
    rounded = torch.cat([x[:20].bfloat16().float(), x[20:]])
    torch.testing.assert_close(first.double(), definition(x, weight)[:20], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.double(), definition(rounded, weight)[20:], rtol=1e-5, atol=1e-5)


def test_an_empty_request_keeps_its_inputs(backend: str, rng: Generator) -> None:
    xs, weight = sequences([4, 2], 5, rng)
    stream = Stream(xs, weight, rng)
    stream.feed([3, 2])
    before = stream.pool[stream.rings[1].long()].nan_to_num()
    stream.feed([1, 0])
    assert torch.equal(stream.pool[stream.rings[1].long()].nan_to_num(), before)


def test_rows_may_be_strided(backend: str, rng: Generator) -> None:
    """The inputs are the first columns of a wider projection."""
    wide = torch.randn(6, 50, generator=rng)
    weight = torch.randn(W, 19, generator=rng)
    pool = torch.full((1, RING, 19), float("nan"))
    out = causal_conv(wide, weight, pool, int32([0]), int32([0, 6]), int32([0]))
    torch.testing.assert_close(out.double(), definition(wide[:, :19], weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 33, 531])
@pytest.mark.parametrize("context", [0, 1, 2, 5, 9])
def test_a_token_of_a_tree_sees_its_path(rng: Generator, backend: str, channels: int, context: int) -> None:
    """And once a path has been accepted, what follows is as if it had been a chain."""
    weight, tree, ring_len = torch.randn(W, channels, generator=rng), 6, W - 1 + 6
    before, after = torch.randn(context, channels, generator=rng), torch.randn(3, channels, generator=rng)
    x = torch.randn(tree, channels, generator=rng)
    parents, paths = random_tree(tree, Random(context))
    for path in paths:
        pool = torch.full((2, ring_len, channels), float("nan"))
        rings = int32([1])
        causal_conv(before, weight, pool, rings, int32([0, context]), int32([0]))
        out = causal_conv(x, weight, pool, rings, int32([0, tree]), int32([context]), int32(parents))
        expected = definition(torch.cat([before, x[path], after]), weight)
        torch.testing.assert_close(out[path].double(), expected[context : context + len(path)], atol=1e-5, rtol=1e-5)
        accepted, now = int32(path), context + len(path)
        compact_rings(pool, rings, int32([context]), accepted, int32([0, len(path)]))
        out = causal_conv(after, weight, pool, rings, int32([0, 3]), int32([now]))
        torch.testing.assert_close(out.double(), expected[now:], atol=1e-5, rtol=1e-5)
