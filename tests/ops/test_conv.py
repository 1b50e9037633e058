"""The causal convolution equals its definition, however a sequence is cut and whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kvbuffer.ops.conv import causal_conv

# One lane, a vector and its odd rest, more than one task's block of channels.
CHANNELS = [1, 7, 33, 531]
W = 4


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

    def __init__(self, xs: list[Tensor], weight: Tensor, rng: Generator) -> None:
        self.xs, self.weight = xs, weight
        self.slots = torch.randperm(len(xs) + 2, generator=rng)[: len(xs)].int()
        self.state = torch.full((len(xs) + 2, weight.shape[0] - 1, weight.shape[1]), float("nan"))
        self.done = [0] * len(xs)

    def feed(self, counts: list[int]) -> list[Tensor]:
        parts = [x[d : d + n] for x, d, n in zip(self.xs, self.done, counts, strict=True)]
        fresh = torch.tensor([d == 0 for d in self.done], dtype=torch.uint8)
        borders = int32([0, *torch.tensor(counts).cumsum(0).tolist()])
        out = causal_conv(torch.cat(parts), self.weight, self.state, self.slots, borders, fresh)
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
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_the_last_inputs_are_kept_and_nothing_else_is_touched(
    backend: str, rng: Generator, taps: int, length: int
) -> None:
    """Also when a sequence is shorter than what is kept: zeros, as before its start, then all its inputs."""
    x, weight = torch.randn(length, 5, generator=rng), torch.randn(taps, 5, generator=rng)
    stream = Stream([x], weight, rng)
    (out,) = stream.feed([length])
    slot = int(stream.slots[0])
    assert torch.equal(stream.state[slot], F.pad(x, (0, 0, taps - 1, 0))[length:])
    assert stream.state[[s for s in range(3) if s != slot]].isnan().all()
    torch.testing.assert_close(out.double(), definition(x, weight), rtol=1e-5, atol=1e-5)


def test_an_empty_request_keeps_its_inputs(backend: str, rng: Generator) -> None:
    xs, weight = sequences([4, 2], 5, rng)
    stream = Stream(xs, weight, rng)
    stream.feed([3, 2])
    before = stream.state[stream.slots[1].long()].clone()
    stream.feed([1, 0])
    assert torch.equal(stream.state[stream.slots[1].long()], before)


def test_rows_may_be_strided(backend: str, rng: Generator) -> None:
    """The inputs are the first columns of a wider projection."""
    wide = torch.randn(6, 50, generator=rng)
    weight = torch.randn(W, 19, generator=rng)
    state = torch.full((1, W - 1, 19), float("nan"))
    fresh = torch.ones(1, dtype=torch.uint8)
    out = causal_conv(wide, weight, state, int32([0]), int32([0, 6]), fresh)
    torch.testing.assert_close(out.double(), definition(wide[:, :19], weight), rtol=1e-5, atol=1e-5)
