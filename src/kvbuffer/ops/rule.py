"""What distinguishes one linear-attention family from another, as data.

Every family keeps, per value head, a state ``S`` of shape (K, V) and updates it once per token with one or two
key-value pairs, with ``a_t = exp(g_t) <= 1``::

    S_t = diag(a_t) S_{t-1} + sum_r k_t^(r) (u_t^(r))^T
    o_t = S_t^T q_t

Families differ in the shape of the decay ``g_t`` and in how what is written depends on what the state holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Decay(Enum):
    """Shape of the log-decay ``g`` per token and value head."""

    NONE = "none"
    SCALAR = "scalar"
    VECTOR = "vector"


class Correction(Enum):
    """How the written values depend on the state before the token.

    NONE: ``u_t = v_t``.
    DELTA: ``u_t = beta_t (v_t - (diag(a_t) S_{t-1})^T k_t)``: the error of what the decayed state predicts for the key.
    REMOVAL: a second pair takes something out before ``(k_t, v_t)`` is written: key ``removal_write_t``, value
    ``-S_{t-1}^T removal_read_t``, which reads the state before its decay.
    """

    NONE = "none"
    DELTA = "delta"
    REMOVAL = "removal"


@dataclass(frozen=True)
class UpdateRule:
    """One family of linear attention.

    Attributes:
        name: the family's name, as options and tables spell it.
        decay: NONE (no ``g``), SCALAR (``g`` [N, HV]) or VECTOR (``g`` [N, HV, K]).
        correction: which of the inputs ``beta`` and ``removal_*`` it takes.
    """

    name: str
    decay: Decay
    correction: Correction

    def __hash__(self) -> int:
        # Rules are looked up in every call. A hash of all fields would go through Python's code for enums.
        return hash(self.name)

    @property
    def num_pairs(self) -> int:
        """Key-value pairs that one token writes."""
        return 2 if self.correction is Correction.REMOVAL else 1


LINEAR_ATTENTION = UpdateRule("linear_attention", Decay.NONE, Correction.NONE)
#: RetNet and Lightning attention: the decay is a constant per head; an expanded ``g`` needs no copy per token.
RETNET = UpdateRule("retnet", Decay.SCALAR, Correction.NONE)
MAMBA2 = UpdateRule("mamba2", Decay.SCALAR, Correction.NONE)
GLA = UpdateRule("gla", Decay.VECTOR, Correction.NONE)
DELTANET = UpdateRule("deltanet", Decay.NONE, Correction.DELTA)
GATED_DELTANET = UpdateRule("gated_deltanet", Decay.SCALAR, Correction.DELTA)
KDA = UpdateRule("kda", Decay.VECTOR, Correction.DELTA)
RWKV7 = UpdateRule("rwkv7", Decay.VECTOR, Correction.REMOVAL)

#: All families by name.
FAMILIES: dict[str, UpdateRule] = {
    rule.name: rule for rule in (LINEAR_ATTENTION, RETNET, MAMBA2, GLA, DELTANET, GATED_DELTANET, KDA, RWKV7)
}
