"""The recurrence, one token at a time: the definition that every other form is tested against.

Runs in whatever dtype it is given, float64 included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbuffer.ops.layout import Tokens
from kvbuffer.ops.rule import Correction, Decay, UpdateRule


def log_decay(rule: UpdateRule, tokens: Tokens) -> Tensor:
    """Return the log-decay as [N, HV, 1] (none, scalar) or [N, HV, K] (vector), to broadcast over a state's rows."""
    if rule.decay is Decay.NONE or tokens.g is None:
        return torch.zeros_like(tokens.v[..., :1])
    return tokens.g.unsqueeze(-1) if rule.decay is Decay.SCALAR else tokens.g


def recurrence(rule: UpdateRule, tokens: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run one sequence through the recurrence of :mod:`kvbuffer.ops.rule`.

    Args:
        rule: the family.
        tokens: inputs of T tokens, in any one dtype.
        state: [HV, K, V] state before the first token.

    Returns:
        Outputs [T, HV, V] and the state [HV, K, V] after the last token.
    """
    v = tokens.v
    rep = v.shape[1] // tokens.k.shape[1]
    decay = log_decay(rule, tokens).exp()

    def per_value_head(x: Tensor | None, t: int) -> Tensor:
        assert x is not None
        return x[t].repeat_interleave(rep, 0)

    def read(state: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("hkv,hk->hv", state, x)

    outputs = torch.empty_like(v)
    for t in range(v.shape[0]):
        k_t, u_t = per_value_head(tokens.k, t), v[t]
        decayed = decay[t].unsqueeze(-1) * state
        if rule.correction is Correction.DELTA:
            assert tokens.beta is not None
            u_t = tokens.beta[t].unsqueeze(-1) * (u_t - read(decayed, k_t))
        elif rule.correction is Correction.REMOVAL:
            removed = read(state, per_value_head(tokens.removal_read, t))
            decayed = decayed - per_value_head(tokens.removal_write, t).unsqueeze(-1) * removed.unsqueeze(-2)
        state = decayed + k_t.unsqueeze(-1) * u_t.unsqueeze(-2)
        outputs[t] = read(state, per_value_head(tokens.q, t))
    return outputs, state
