"""What Mamba-2 has beside the operator: its inputs as tokens of the ``mamba2`` rule, and its skip connection.

A state-space model's names and ours (Dao & Gu, "Transformers are SSMs", arXiv 2405.21060, §7; the state here is the
transpose of theirs): the input x, scaled by the time step, is the value, B the key, C the query; a group, whose heads
share one B and C, is a key head; the state size is K and the head size V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbuffer.ops.layout import Tokens


def mamba2_tokens(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tokens:
    """Discretise the inputs of N tokens: ``step = clamp(softplus(dt + dt_bias))``, ``g = -exp(a_log) step``.

    Args:
        x: [N, HV, V] inputs, after convolution and activation; any floating dtype, as the others.
        dt: [N, HV] time steps before their softplus.
        b: [N, HK, K] what is written with, one per group.
        c: [N, HK, K] what is read with, one per group.
        a_log: [HV] log of the decay rate.
        dt_bias: [HV].
        dt_limit: smallest and largest time step.

    Returns:
        Tokens of the ``mamba2`` rule in float32.
    """
    step = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    return Tokens(q=c.float(), k=b.float(), v=x.float() * step.unsqueeze(-1), g=-torch.exp(a_log.float()) * step)


def mamba2_skip(out: Tensor, x: Tensor, d: Tensor) -> Tensor:
    """Add the skip connection ``D x`` to the operator's outputs.

    Args:
        out: [N, HV, V] float32 outputs of an operator.
        x: [N, HV, V] the inputs, before their scaling by the time step.
        d: [HV].

    Returns:
        [N, HV, V] float32.
    """
    return out + d.float().unsqueeze(-1) * x.float()
