"""Other projects' decode of the same operator, timed in the same run."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache

from torch import Tensor

from kvbuffer.bench.forms import Step, TimedForm, recurrent
from kvbuffer.bench.pools import Pools
from kvbuffer.ops.layout import Tokens
from kvbuffer.ops.rule import GATED_DELTANET, UpdateRule

_TRANSFORMERS = ("transformers.models.qwen3_next.modeling_qwen3_next", "torch_recurrent_gated_delta_rule")
_FLA = ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")


@cache
def competitors(rule: UpdateRule, device: str) -> tuple[TimedForm, ...]:
    """Return the recurrent steps on float32 states that are installed for a family and device."""
    if rule != GATED_DELTANET:
        return ()
    module, name = _FLA if device.startswith("cuda") else _TRANSFORMERS
    try:
        function = getattr(importlib.import_module(module), name)
    except ImportError:
        return ()

    def bind(pools: Pools) -> Step:
        states = [pools.states.data[layer * pools.batch :][: pools.batch] for layer in range(pools.num_layers)]
        # Both functions scale queries by K ** -0.5, which ours have had done.
        unscaled = pools.shape.key_dim**0.5

        def step(n: int, layer: int, tokens: Tokens) -> Tensor:
            assert tokens.g is not None
            assert tokens.beta is not None
            q, k, v, g, beta = (x.unsqueeze(1) for x in (tokens.q * unscaled, *tokens[1:5]))  # type: ignore[union-attr]
            out, states[layer] = function(q, k, v, g=g, beta=beta, initial_state=states[layer], output_final_state=True)
            result: Tensor = out.squeeze(1)
            return result

        return step

    project = module.partition(".")[0]
    return (replace(recurrent(), bind=bind, peer=project),)
