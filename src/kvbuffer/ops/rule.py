"""What distinguishes one linear-attention family from another, as data.

Every family keeps, per value head, a state ``S`` of shape (K, V) and updates it once per token (DESIGN of the paper's
§2, with ``a_t = exp(g_t) <= 1``)::

    S_t = diag(a_t) S_{t-1} + k_t u_t^T
    o_t = S_t^T q_t

Families differ in the shape of the decay ``g_t`` and in the written value ``u_t``: either the value itself, or, under
the delta rule, ``u_t = beta_t (v_t - (diag(a_t) S_{t-1})^T k_t)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Decay(Enum):
    """Shape of the log-decay ``g`` per token and value head."""

    NONE = "none"
    SCALAR = "scalar"
    VECTOR = "vector"


@dataclass(frozen=True)
class UpdateRule:
    """One family of linear attention.

    Attributes:
        name: the family's name in the literature.
        decay: NONE (no ``g``), SCALAR (``g`` [N, HV]) or VECTOR (``g`` [N, HV, K]).
        delta: whether the written value is corrected by what the state already predicts (needs ``beta`` [N, HV]).
    """

    name: str
    decay: Decay
    delta: bool


LINEAR_ATTENTION = UpdateRule("linear attention", Decay.NONE, delta=False)
MAMBA2 = UpdateRule("Mamba-2", Decay.SCALAR, delta=False)
GLA = UpdateRule("GLA", Decay.VECTOR, delta=False)
DELTANET = UpdateRule("DeltaNet", Decay.NONE, delta=True)
GATED_DELTANET = UpdateRule("Gated DeltaNet", Decay.SCALAR, delta=True)
KDA = UpdateRule("KDA", Decay.VECTOR, delta=True)
