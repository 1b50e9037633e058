"""Paged attention and the preparation of its inputs, against a dense float64 definition.

The oracle keeps each request's keys and values in plain tensors and computes softmax attention in float64; pages are
shuffled and every slot that holds no token is NaN, so a read past a request's tokens shows. Where bits are compared,
the same request runs alone, in a batch, in chunks, and token by token: serving must not change a result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from kvbuffer.ops import dispatch
from kvbuffer.ops.attention import PAGE_SIZE, attention_inputs, compact_pages, key_pages, paged_attention
from tests.support.drafters import random_tree

#: Rounding the output, the sigmoid and their product.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3 * 2**-8}
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


@pytest.fixture(autouse=True)
def seed(rng: torch.Generator) -> None:
    torch.manual_seed(rng.initial_seed())


@pytest.fixture
def kernel() -> None:
    if dispatch.cpu_kernels() is None:
        pytest.skip(dispatch.explain())


@dataclass
class Shape:
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype


@dataclass
class Request:
    """All tokens of one request; the first ``context`` are in the pages before the step, the rest are new."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    context: int

    @property
    def new(self) -> int:
        return len(self.q) - self.context


def make_request(shape: Shape, context: int, new: int) -> Request:
    n = context + new
    q, k, v, gate = (
        torch.randn(n, heads, shape.dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    k, v = k.to(shape.dtype), v.to(shape.dtype)
    return Request(2 * q, k, v, gate.flatten(1), context)


def page_table_for(lengths: list[int]) -> tuple[Tensor, int]:
    """A shuffled page table whose unused entries are page 0, and the number of pages (one of them unused)."""
    counts = [-(-length // PAGE_SIZE) for length in lengths]
    ids = torch.randperm(sum(counts) + 1).int().tolist()
    table = torch.zeros(len(lengths), max([1, *counts]), dtype=torch.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.tensor([ids.pop() for _ in range(count)])
    return table, sum(counts) + 1


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def run(shape: Shape, requests: list[Request], gated: bool = True, parents: Tensor | None = None) -> list[Tensor]:
    """One step over the requests: the outputs of the new tokens of each."""
    table, num_pages = page_table_for([len(r.q) for r in requests])
    pages = torch.full((num_pages, 2, shape.kv_heads, PAGE_SIZE, shape.dim), float("nan"), dtype=shape.dtype)
    for row, r in zip(table.long(), requests, strict=True):
        token = torch.arange(len(r.q))
        key_pages(pages)[row[token // PAGE_SIZE], :, token % PAGE_SIZE] = r.k
        pages[:, 1][row[token // PAGE_SIZE], :, token % PAGE_SIZE] = r.v
    q = torch.cat([r.q[r.context :] for r in requests])
    gate = torch.cat([r.gate[r.context :] for r in requests])
    out = paged_attention(
        q,
        pages,
        table,
        cumulative([r.new for r in requests]),
        torch.tensor([r.context for r in requests], dtype=torch.int32),
        torch.cat([gate, gate], dim=1)[:, : gate.shape[1]] if gated else None,  # strided rows
        parents,
    )
    return list(out.split([r.new for r in requests]))


def dense(shape: Shape, r: Request, gated: bool = True) -> Tensor:
    """Causal softmax attention of the new tokens in float64."""
    group = shape.heads // shape.kv_heads
    q = r.q[r.context :].double()
    k, v = (x.double().repeat_interleave(group, dim=1) for x in (r.k, r.v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / shape.dim**0.5
    position = torch.arange(len(r.k))
    scores = scores.masked_fill(position > position[r.context :, None], float("-inf"))
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    return out * torch.sigmoid(r.gate[r.context :].double()) if gated else out


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Largest error, relative to the largest value where that is above 1."""
    if expected.numel():
        bound = (tolerance or TOLERANCE[actual.dtype]) * max(1.0, expected.abs().max().item())
        assert (actual.double() - expected).abs().max().item() <= bound


RAGGED = [(0, 1), (0, 5), (15, 1), (16, 1), (17, 1), (0, 70), (64, 64), (15, 18), (510, 5), (600, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(2, 2, 16), (4, 2, 32), (4, 1, 80), (8, 1, 128), (16, 2, 256), (3, 3, 64), (12, 1, 48)],
)
@pytest.mark.usefixtures("backend")
def test_ragged_batch_matches_dense_attention(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    shape = Shape(heads, kv_heads, dim, dtype)
    requests = [make_request(shape, context, new) for context, new in RAGGED]
    for out, r in zip(run(shape, requests), requests, strict=True):
        assert_close(out, dense(shape, r))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("backend")
def test_the_gate_is_optional(dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 32, dtype)
    r = make_request(shape, 20, 50)
    assert_close(run(shape, [r], gated=False)[0], dense(shape, r, gated=False))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (16, 2, 256)])
@pytest.mark.usefixtures("backend")
def test_a_token_of_a_tree_sees_its_path(heads: int, kv_heads: int, dim: int) -> None:
    """Trees of up to 64 tokens that lie across pages, units of 64 tokens and blocks of rows; chains beside them."""
    shape = Shape(heads, kv_heads, dim, torch.float32)
    sizes = [(0, 7), (5, 64), (62, 6), (64, 3), (100, 33), (510, 9), (1, 1)]
    chains = [(30, 70), (3, 1)]
    requests = [make_request(shape, context, new) for context, new in sizes + chains]
    trees = [random_tree(size, Random(size)) for _, size in sizes]
    parents = [*(torch.tensor(tree[0]) for tree in trees), *(torch.arange(new) - 1 for _, new in chains)]
    outs = run(shape, requests, parents=torch.cat(parents).int())
    for out, r, (_, paths) in zip(outs, requests, trees, strict=False):
        for i, path in enumerate(paths):
            seen = torch.cat([torch.arange(r.context), r.context + torch.tensor(path)])
            alone = Request(r.q[seen], r.k[seen], r.v[seen], r.gate[seen], r.context)
            assert_close(out[i : i + 1], dense(shape, alone)[-1:])
    for out, r in zip(outs[len(trees) :], requests[len(trees) :], strict=True):
        assert_close(out, dense(shape, r))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_accepted_path_of_a_tree_becomes_a_chain(dtype: torch.dtype) -> None:
    pages = torch.randn(8, 2, 3, PAGE_SIZE, 16).to(dtype)
    table, context = torch.tensor([[5, 2], [1, 7]], dtype=torch.int32), torch.tensor([13, 4], dtype=torch.int32)
    before = [torch.cat([part[row] for row in table[b].tolist()], 1) for b in (0, 1) for part in kinds(pages)]
    compact_pages(pages, table, context, torch.tensor([0, 2, 5, 11], dtype=torch.int32), cumulative([1, 3]))
    after = [torch.cat([part[row] for row in table[b].tolist()], 1) for b in (0, 1) for part in kinds(pages)]
    for old, new in zip(before[:2], after[:2], strict=True):
        assert torch.equal(old, new)
    for old, new in zip(before[2:], after[2:], strict=True):
        assert torch.equal(new[:, :4], old[:, :4])
        assert torch.equal(new[:, 4:7], old[:, [6, 9, 15]])


def kinds(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, [num_pages, HKV, PAGE_SIZE, D]."""
    return key_pages(pages).clone(), pages[:, 1].clone()


@pytest.mark.parametrize("dim", [24, 512])
def test_head_dimensions_without_a_kernel_run_portably(dim: int) -> None:
    shape = Shape(2, 1, dim, torch.float32)
    r = make_request(shape, 3, 20)
    assert_close(run(shape, [r])[0], dense(shape, r))


@pytest.mark.usefixtures("backend")
def test_requests_without_new_tokens_and_empty_batches_are_allowed() -> None:
    shape = Shape(4, 2, 32, torch.float32)
    requests = [make_request(shape, context, new) for context, new in [(5, 0), (0, 3), (0, 0), (33, 1), (9, 0)]]
    for out, r in zip(run(shape, requests), requests, strict=True):
        assert_close(out, dense(shape, r))
    assert run(shape, [requests[0]])[0].shape == (0, 4 * 32)


@pytest.mark.usefixtures("backend")
def test_large_scores_do_not_overflow() -> None:
    """Scores of some thousands: exp() of one would overflow, and float32 leaves their difference 4 digits."""
    shape = Shape(2, 1, 64, torch.float32)
    r = make_request(shape, 100, 40)
    r.q *= 300
    assert_close(run(shape, [r])[0], dense(shape, r), tolerance=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 2, 256), (4, 4, 64), (6, 2, 48)])
@pytest.mark.usefixtures("kernel")
def test_a_request_gets_the_same_bits_alone_and_in_a_batch(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    shape = Shape(heads, kv_heads, dim, dtype)
    requests = [make_request(shape, context, new) for context, new in RAGGED]
    for together, r in zip(run(shape, requests), requests, strict=True):
        assert torch.equal(together, run(shape, [r])[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 2, 256), (4, 4, 64), (6, 2, 48)])
@pytest.mark.usefixtures("kernel")
def test_a_prompt_gets_the_same_bits_whole_in_chunks_and_token_by_token(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    shape = Shape(heads, kv_heads, dim, dtype)
    whole = make_request(shape, 0, 530)
    expected = run(shape, [whole])[0]

    def step(begin: int, end: int) -> Tensor:
        return run(shape, [Request(whole.q[:end], whole.k[:end], whole.v[:end], whole.gate[:end], begin)])[0]

    for cuts in ([0, 64, 256, 448, 530], [0, 1, 17, 63, 65, 130, 511, 513, 530]):
        assert torch.equal(torch.cat([step(*ends) for ends in itertools.pairwise(cuts)]), expected)
    for token in [0, 1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 529]:
        assert torch.equal(step(token, token + 1)[0], expected[token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cases", [[(1300, 1)], [(508, 6), (1000, 3)], [(0, 300), (40, 1)], RAGGED])
@pytest.mark.usefixtures("kernel")
def test_threads_do_not_change_bits(
    cases: list[tuple[int, int]], dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    shape = Shape(8, 2, 64, dtype)
    requests = [make_request(shape, context, new) for context, new in cases]
    threads(1)
    expected = torch.cat(run(shape, requests))
    for count in (2, 3):
        threads(count)
        assert torch.equal(torch.cat(run(shape, requests)), expected)


def rotary_tables(max_len: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(max_len)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    return angles.cos(), angles.sin()


def norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Zero-centred norm, then rotation of the leading dimensions, in float64: [N, heads, D]."""
    wide = x.double()
    wide = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight.double())
    half = cos.shape[1]
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos[:, None].double(), sin[:, None].double()
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "half"), [(4, 2, 32, 4), (16, 2, 256, 32), (3, 3, 16, 8)])
@pytest.mark.usefixtures("backend")
def test_inputs_are_normalised_rotated_and_written_to_pages(
    heads: int, kv_heads: int, dim: int, half: int, dtype: torch.dtype
) -> None:
    contexts, new = [0, 15, 3, 16, 40], [20, 2, 0, 1, 7]
    n, width = sum(new), 2 * (heads + kv_heads) * dim
    qkv = torch.randn(n, width + 24)[:, :width]
    q_weight, k_weight = torch.randn(2, dim) * 0.3
    cos, sin = rotary_tables(64, half)
    # positions may differ from slots
    positions = torch.randint(64, (n,), dtype=torch.int32)
    table, num_pages = page_table_for([c + m for c, m in zip(contexts, new, strict=True)])
    pages = torch.full((num_pages, 2, kv_heads, PAGE_SIZE, dim), float("nan"), dtype=dtype)

    q = attention_inputs(
        qkv, q_weight, k_weight, cos, sin, positions, pages, table, cumulative(new),
        torch.tensor(contexts, dtype=torch.int32), heads, kv_heads, dim, EPS,
    )  # fmt: skip

    raw_q, _, raw_k, raw_v = qkv.split([heads * dim, heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    cos, sin = cos[positions.long()], sin[positions.long()]
    expected_k = norm_rotate(raw_k.reshape(n, kv_heads, dim), k_weight, cos, sin)
    assert q.dtype == torch.float32
    expected_q = norm_rotate(raw_q.reshape(n, heads, dim), q_weight, cos, sin)
    torch.testing.assert_close(q.double(), expected_q, rtol=1e-6, atol=1e-6)
    loose = {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]  # keys are rounded to the pages' dtype
    written, i = 0, 0
    for row, context, count in zip(table.long(), contexts, new, strict=True):
        for slot in range(context, context + count):
            page = row[slot // PAGE_SIZE]
            key = key_pages(pages)[page, :, slot % PAGE_SIZE]
            torch.testing.assert_close(key.double(), expected_k[i], rtol=loose, atol=loose)
            assert torch.equal(pages[page, 1, :, slot % PAGE_SIZE], raw_v[i].view(kv_heads, dim).to(dtype))
            written, i = written + 2 * kv_heads * dim, i + 1
    assert int((~pages.isnan()).sum()) == written, "slots of other tokens were touched"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("backend")
def test_inputs_of_a_token_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    heads, kv_heads, dim, n = 4, 2, 64, 37
    qkv = torch.randn(n, 2 * (heads + kv_heads) * dim)
    weight = torch.randn(dim) * 0.3
    cos, sin = rotary_tables(64, 8)

    def inputs(begin: int, end: int) -> tuple[Tensor, Tensor]:
        pages = torch.zeros(4, 2, kv_heads, PAGE_SIZE, dim, dtype=dtype)
        q = attention_inputs(
            qkv[begin:end], weight, weight, cos, sin, torch.arange(begin, end, dtype=torch.int32), pages,
            torch.tensor([[2, 0, 3]], dtype=torch.int32), cumulative([end - begin]),
            torch.tensor([begin], dtype=torch.int32), heads, kv_heads, dim, EPS,
        )  # fmt: skip
        return q, pages

    q, pages = inputs(0, n)
    parts = [inputs(begin, end) for begin, end in [(0, 16), (16, 17), (17, n)]]
    assert torch.equal(torch.cat([part[0] for part in parts]), q)
    assert torch.equal(sum(part[1] for part in parts), pages)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5"])
@pytest.mark.usefixtures("backend")
def test_layer_matches_transformers(family: str) -> None:
    """The module of the model's own code, over a prompt and then one more token; for Qwen3.5 with its mrope."""
    hidden, heads, kv_heads, dim, length = 48, 8, 2, 32, 40
    sizes = {
        "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim,
        "num_hidden_layers": 1, "layer_types": ["full_attention"], "attn_implementation": "eager",
    }  # fmt: skip
    if family == "qwen3_next":
        config = qwen3_next.Qwen3NextConfig(**sizes)
        layer = qwen3_next.Qwen3NextAttention(config, layer_idx=0)
        rotary = qwen3_next.Qwen3NextRotaryEmbedding(config)
        position_ids = torch.arange(length)[None]
    else:
        config = qwen3_5.Qwen3_5TextConfig(**sizes)
        layer = qwen3_5.Qwen3_5Attention(config, layer_idx=0)
        rotary = qwen3_5.Qwen3_5TextRotaryEmbedding(config)
        position_ids = torch.arange(length).expand(3, 1, length)
    with torch.no_grad():
        for weight in (layer.q_norm.weight, layer.k_norm.weight):
            weight.copy_(torch.randn(dim) * 0.3)
    x = torch.randn(1, length, hidden)
    cos, sin = rotary(x, position_ids)
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    expected = layer(x, (cos, sin), mask)[0][0]

    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:]), "the second half of the table repeats the first"
    cos, sin = (table[0, :, :half].contiguous() for table in (cos, sin))
    q_and_gate = layer.q_proj(x[0]).view(length, heads, 2, dim).transpose(1, 2).flatten(1)
    qkv = torch.cat([q_and_gate, layer.k_proj(x[0]), layer.v_proj(x[0])], dim=1).detach()
    gate = qkv[:, heads * dim : 2 * heads * dim]
    pages = torch.full((3, 2, kv_heads, PAGE_SIZE, dim), float("nan"))
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    outs = []
    for begin, end in [(0, length - 1), (length - 1, length)]:
        batch = pages, table, cumulative([end - begin]), torch.tensor([begin], dtype=torch.int32)
        q = attention_inputs(
            qkv[begin:end], layer.q_norm.weight.detach(), layer.k_norm.weight.detach(), cos, sin,
            torch.arange(begin, end, dtype=torch.int32), *batch, heads, kv_heads, dim, config.rms_norm_eps,
        )  # fmt: skip
        outs.append(paged_attention(q, *batch, gate[begin:end]))
    torch.testing.assert_close(layer.o_proj(torch.cat(outs)), expected, rtol=1e-5, atol=1e-5)


def test_both_backends_write_the_same_pages(monkeypatch: pytest.MonkeyPatch, kernel: None) -> None:
    heads, kv_heads, dim = 2, 1, 32
    qkv = torch.randn(5, 2 * (heads + kv_heads) * dim)
    cos, sin = rotary_tables(8, 4)
    results = []
    for _ in range(2):
        pages = torch.zeros(1, 2, kv_heads, PAGE_SIZE, dim)
        attention_inputs(
            qkv, torch.zeros(dim), torch.zeros(dim), cos, sin, torch.arange(5, dtype=torch.int32), pages,
            torch.zeros(1, 1, dtype=torch.int32), cumulative([5]), torch.zeros(1, dtype=torch.int32),
            heads, kv_heads, dim, EPS,
        )  # fmt: skip
        results.append(pages)
        monkeypatch.setattr(dispatch, "cpu_kernels", lambda: None)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
