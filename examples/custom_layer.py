"""Buffered decoding for a linear-attention layer of your own, here gated linear attention in plain PyTorch."""

import torch
from torch.nn.functional import logsigmoid

from kvbuffer.ops.buffered import buffered_decode
from kvbuffer.ops.chunked import chunked_prefill
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import GLA

HIDDEN, HEADS, K, V, PROMPT, DECODED, BUFFER = 64, 4, 32, 32, 100, 40, 16

torch.manual_seed(0)
torch.set_grad_enabled(False)
project = torch.nn.Linear(HIDDEN, HEADS * (3 * K + V))


def layer(x: torch.Tensor) -> Tokens:
    """Map [N, HIDDEN] to what the rule takes: all that a layer has to say about itself."""
    parts = project(x).split([HEADS * K] * 3 + [HEADS * V], dim=1)
    q, k, g, v = (part.unflatten(1, (HEADS, -1)) for part in parts)
    return Tokens(q * K**-0.5, k, v, (logsigmoid(g) / 16).contiguous())


x = torch.randn(PROMPT + DECODED, HIDDEN)
states = StatePool.allocate(1, HEADS, K, V)
records = RecordPages.allocate(GLA, 1, BUFFER, HEADS, HEADS, K, V)
slots, page_table = torch.tensor([0], dtype=torch.int32), torch.tensor([[0]], dtype=torch.int32)

borders, fresh = torch.tensor([0, PROMPT], dtype=torch.int32), torch.tensor([1], dtype=torch.uint8)
outputs = [chunked_prefill(GLA, layer(x[:PROMPT]), states, slots, borders, fresh)]
fill = torch.zeros(1, dtype=torch.int32)
for token in x[PROMPT:].split(1):
    fold = (fill == BUFFER).to(torch.uint8)
    outputs.append(buffered_decode(GLA, layer(token), states, slots, records, page_table, fill, fold))
    fill = torch.where(fold.bool(), 0, fill) + 1

expected, _ = recurrence(GLA, layer(x), torch.zeros(HEADS, K, V))
error = (torch.cat(outputs) - expected).norm() / expected.norm()
print(f"{DECODED} tokens decoded, relative error against the recurrence: {error:.1e}")
