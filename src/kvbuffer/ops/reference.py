"""The recurrence, one token at a time: the definition that every other form is tested against.

Dims: T tokens, HK key heads, HV value heads (a multiple of HK: value head h reads key head ``h // (HV // HK)``),
K key dim, V value dim. Runs in whatever dtype it is given, float64 included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbuffer.ops.rule import Decay, UpdateRule


def log_decay(rule: UpdateRule, g: Tensor | None, like: Tensor) -> Tensor:
    """Return the log-decay as [..., HV, 1] (none, scalar) or [..., HV, K] (vector), to broadcast over a state's rows.

    Args:
        rule: the family.
        g: what the family's layer computes, or None when it has no decay.
        like: values [..., HV, V], for the shape of a missing ``g``.
    """
    if rule.decay is Decay.NONE or g is None:
        return torch.zeros_like(like[..., :1])
    return g.unsqueeze(-1) if rule.decay is Decay.SCALAR else g


def recurrence(
    rule: UpdateRule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run one sequence through the recurrence of DESIGN §2.

    Args:
        rule: the family.
        q: [T, HK, K] queries with the softmax scale folded in.
        k: [T, HK, K] keys.
        v: [T, HV, V] values.
        g: log-decays, [T, HV], [T, HV, K] or None, as the rule says.
        beta: [T, HV] writing strengths, None without the delta rule.
        state: [HV, K, V] state before the first token.

    Returns:
        Outputs [T, HV, V] and the state [HV, K, V] after the last token.
    """
    rep = v.shape[1] // k.shape[1]
    decay = log_decay(rule, g, v).exp()
    outputs = torch.empty_like(v)
    for t in range(v.shape[0]):
        q_t = q[t].repeat_interleave(rep, 0)
        k_t = k[t].repeat_interleave(rep, 0)
        state = decay[t].unsqueeze(-1) * state
        u_t = v[t]
        if rule.delta:
            assert beta is not None
            u_t = beta[t].unsqueeze(-1) * (u_t - torch.einsum("hkv,hk->hv", state, k_t))
        state = state + k_t.unsqueeze(-1) * u_t.unsqueeze(-2)
        outputs[t] = torch.einsum("hkv,hk->hv", state, q_t)
    return outputs, state
