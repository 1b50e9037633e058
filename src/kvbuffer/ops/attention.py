"""Full attention over paged keys and values, as in the full-attention layers of Qwen3-Next and Qwen3.5.

One step of a layer is two calls: :func:`attention_inputs` turns the projections of the new tokens into queries
and writes their keys and values into pages, :func:`paged_attention` lets every new token attend to its request's
tokens.

Qwen3.5's multimodal rotary embedding takes each frequency's position from one of three axes. Text has the same
position on all three, so for text it is the plain rotary embedding computed here.

A layer's ``pages`` are ``[num_pages, 2, num_kv_heads, PAGE_SIZE, D]`` in the model dtype, contiguous. Index 1 holds
values, ``[PAGE_SIZE, D]`` per page and head. Index 0 holds keys *dimension-major*: the same ``PAGE_SIZE * D``
elements are ``[D, PAGE_SIZE]``, so that a vector register loads one dimension of all tokens of a page; read them
through :func:`key_pages`. Pages can be copied and shared whole without knowing this.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from kvbuffer.ops import dispatch

#: Tokens in a page of keys and values.
PAGE_SIZE = 16

_MAX_HEAD_DIM = 256
_WIDEST_VECTOR = 16


def key_pages(pages: Tensor) -> Tensor:
    """View the keys of ``pages`` token by token: [num_pages, num_kv_heads, PAGE_SIZE, D], not contiguous."""
    num_pages, _, num_kv_heads, page_size, head_dim = pages.shape
    return pages[:, 0].view(num_pages, num_kv_heads, head_dim, page_size).transpose(2, 3)


def attention_inputs(
    qkv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> Tensor:
    """Normalise and rotate the new tokens' queries and keys, and write keys and values into their pages.

    Each query and key head goes through a zero-centred RMS norm (``(1 + weight) * x / rms(x)``) and a rotary
    embedding of its first ``2 * cos.shape[1]`` dimensions, in float32; keys and values are rounded once, to the pages'
    dtype. The softmax scale is left to :func:`paged_attention`.

    Args:
        qkv: [N, at least 2 (H + HKV) D] float32, any row stride; each row holds q (H*D), gate (H*D),
            k (HKV*D) and v (HKV*D). The gate is not read here.
        q_norm_weight: [D], or [G, D] for G groups of H / G heads each; float32, contiguous (another dtype is converted
            at every call).
        k_norm_weight: [D], as ``q_norm_weight``.
        cos: [max_len, rotary_dim / 2] float32, contiguous: one half of the usual table, which repeats it.
        sin: as ``cos``.
        positions: [N] int32, rows of ``cos`` and ``sin``.
        pages: [num_pages, 2, HKV, PAGE_SIZE, D] model dtype, written at the new tokens' slots.
        page_table: [B, max_pages] int32, page ids of each request in the order of its tokens.
        cu_seqlens: [B + 1] int32, where each request's new tokens start in the batch.
        context_lens: [B] int32, tokens of each request already in its pages: new token i goes to slot
            ``context_lens[b] + i``.
        num_heads: H.
        num_kv_heads: HKV, which divides H.
        head_dim: D.
        eps: added to the mean square.

    Returns:
        Queries, [N, H, D] float32.
    """
    lib = dispatch.cpu_kernels()
    if lib is None or not has_kernels(pages.dtype, head_dim):
        return _attention_inputs_portable(
            qkv, q_norm_weight, k_norm_weight, cos, sin, positions, pages, page_table, cu_seqlens,
            context_lens, num_heads, num_kv_heads, head_dim, eps,
        )  # fmt: skip
    q_norm_weight, k_norm_weight = q_norm_weight.float(), k_norm_weight.float()
    q = qkv.new_empty(qkv.shape[0], num_heads, head_dim)
    _declare(lib)
    lib.kvb_attention_inputs(
        qkv.data_ptr(), qkv.stride(0), q_norm_weight.data_ptr(), k_norm_weight.data_ptr(),
        cos.data_ptr(), sin.data_ptr(), cos.shape[1], positions.data_ptr(), q.data_ptr(), pages.data_ptr(),
        page_table.data_ptr(), page_table.stride(0), cu_seqlens.data_ptr(), context_lens.data_ptr(),
        qkv.shape[0], context_lens.shape[0], num_heads, num_kv_heads, head_dim, q_norm_weight.numel() // head_dim, eps,
        dispatch.DTYPE_CODES[pages.dtype],
    )  # fmt: skip
    return q


def paged_attention(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    gate: Tensor | None = None,
    parents: Tensor | None = None,
) -> Tensor:
    """Causal attention of every new token to its request's tokens up to and including itself.

    Scores are scaled by ``D ** -0.5``; everything is float32 inside. With the CPU kernels a token's result is the
    same bit for bit whatever else is in the batch, however its prompt was split into steps, and for any number of
    threads.

    Args:
        q: [N, H, D] float32, contiguous, from :func:`attention_inputs`.
        pages: [num_pages, 2, HKV, PAGE_SIZE, D] model dtype, the new tokens' keys and values already written.
            Slots past a request's tokens may hold anything.
        page_table: [B, max_pages] int32.
        cu_seqlens: [B + 1] int32; a request may have no new tokens.
        context_lens: [B] int32, tokens of each request before its new ones.
        gate: [N, H*D] float32, any row stride: the output is multiplied by its sigmoid.
        parents: [N] int32, the token that each new one follows, counted among its request's new ones and less than its
            own place; -1 follows the last in the pages. A token sees its path only. None for chains; a request whose
            tokens are not a chain has at most 64 of them.

    Returns:
        [N, H*D] float32.
    """
    num_tokens, num_heads, head_dim = q.shape
    lib = dispatch.cpu_kernels()
    if lib is None or not has_kernels(pages.dtype, head_dim):
        return _paged_attention_portable(q, pages, page_table, cu_seqlens, context_lens, gate, parents)
    out = q.new_empty(num_tokens, num_heads * head_dim)
    _declare(lib)
    lib.kvb_paged_attention(
        q.data_ptr(), pages.data_ptr(), page_table.data_ptr(), page_table.stride(0), cu_seqlens.data_ptr(),
        context_lens.data_ptr(), None if gate is None else gate.data_ptr(),
        0 if gate is None else gate.stride(0), None if parents is None else parents.data_ptr(), out.data_ptr(),
        context_lens.shape[0], num_heads, pages.shape[2], head_dim, dispatch.DTYPE_CODES[pages.dtype],
    )  # fmt: skip
    return out


def compact_pages(
    pages: Tensor, page_table: Tensor, context_lens: Tensor, accepted: Tensor, cu_accepted: Tensor
) -> None:
    """Keep the accepted path of a tree: move its keys and values to where those of a chain lie.

    Args:
        pages: [num_pages, 2, HKV, PAGE_SIZE, D], written.
        page_table: [B, P] int32.
        context_lens: [B] int32, tokens of each request before the tree.
        accepted: [A] int32, the accepted tokens, counted among their request's own, ascending.
        cu_accepted: [B + 1] int32, borders of the requests in ``accepted``.
    """
    request = torch.arange(len(context_lens)).repeat_interleave(cu_accepted.diff().long())
    source = context_lens[request] + accepted
    target = context_lens[request] + torch.arange(len(accepted)) - cu_accepted[request]
    from_page, to_page = (page_table[request, place // PAGE_SIZE].long() for place in (source, target))
    for part in (key_pages(pages), pages[:, 1]):
        part[to_page, :, target % PAGE_SIZE] = part[from_page, :, source % PAGE_SIZE]


def has_kernels(dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the compiled kernels, where there are any, take pages of such a dtype and width."""
    return dtype in dispatch.DTYPE_CODES and head_dim % _WIDEST_VECTOR == 0 and head_dim <= _MAX_HEAD_DIM


@cache
def _declare(lib: ctypes.CDLL) -> None:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    lib.kvb_attention_inputs.restype = None
    lib.kvb_attention_inputs.argtypes = [
        pointer, size, pointer, pointer, pointer, pointer, size, pointer, pointer, pointer, pointer, size,
        pointer, pointer, size, size, size, size, size, size, ctypes.c_float, ctypes.c_int,
    ]  # fmt: skip
    lib.kvb_paged_attention.restype = None
    lib.kvb_paged_attention.argtypes = [
        pointer, pointer, pointer, size, pointer, pointer, pointer, size, pointer, pointer, size, size, size, size,
        ctypes.c_int,
    ]  # fmt: skip


def _attention_inputs_portable(
    qkv: Tensor,
    q_norm_weight: Tensor,
    k_norm_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> Tensor:
    num_tokens = qkv.shape[0]
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    q, _, k, v = torch.split(qkv[:, : 2 * (q_size + kv_size)], [q_size, q_size, kv_size, kv_size], dim=1)
    cos, sin = cos[positions.long(), None], sin[positions.long(), None]
    q_norm_weight, k_norm_weight = (
        weight.view(-1, head_dim).repeat_interleave(heads * head_dim // weight.numel(), 0)
        for weight, heads in ((q_norm_weight, num_heads), (k_norm_weight, num_kv_heads))
    )
    q = _norm_rotate(q.view(num_tokens, num_heads, head_dim), q_norm_weight, cos, sin, eps)
    k = _norm_rotate(k.view(num_tokens, num_kv_heads, head_dim), k_norm_weight, cos, sin, eps)

    new_lens = cu_seqlens.diff().long()
    request = torch.arange(len(new_lens)).repeat_interleave(new_lens)
    slots = torch.arange(num_tokens) + (context_lens - cu_seqlens[:-1])[request]
    page = page_table[request, slots // PAGE_SIZE].long()
    key_pages(pages)[page, :, slots % PAGE_SIZE] = k.to(pages.dtype)
    pages[:, 1][page, :, slots % PAGE_SIZE] = v.view(num_tokens, num_kv_heads, head_dim).to(pages.dtype)
    return q


def _norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight.float())
    half = cos.shape[-1]
    a, b, rest = normed.tensor_split([half, 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _paged_attention_portable(
    q: Tensor,
    pages: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    gate: Tensor | None,
    parents: Tensor | None,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // pages.shape[2]
    keys, values = key_pages(pages), pages[:, 1]
    out = q.new_empty(num_tokens, num_heads * head_dim)
    bounds = cu_seqlens.tolist()
    for request, context in enumerate(context_lens.tolist()):
        begin, end = bounds[request], bounds[request + 1]
        length = context + end - begin
        table = page_table[request, : -(-length // PAGE_SIZE)].long()
        # [HKV, length, D], each key/value head repeated for its group of query heads
        k, v = (
            part[table].transpose(0, 1).flatten(1, 2)[:, :length].float().repeat_interleave(group, dim=0)
            for part in (keys, values)
        )
        scores = q[begin:end].transpose(0, 1) @ k.mT * head_dim**-0.5
        seen = torch.ones(end - begin, length, dtype=torch.bool).tril(context)
        if parents is not None:
            seen[:, context:] = torch.eye(end - begin, dtype=torch.bool)
            for i, parent in enumerate(parents[begin:end].tolist()):
                if parent >= 0:
                    seen[i, context:] |= seen[parent, context:]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        mixed = (weights @ v).transpose(0, 1).flatten(1)
        out[begin:end] = mixed if gate is None else mixed * torch.sigmoid(gate[begin:end])
    return out
