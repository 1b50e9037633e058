"""Requests without text, to drive the scheduler with: what it does not look at is left out."""

from __future__ import annotations

from kvbuffer.cache.shapes import LinearShape
from kvbuffer.engine.forms import FormPolicy
from kvbuffer.engine.request import Request
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.ops.cost import Bandwidth, Costs, LayerShape
from kvbuffer.ops.rule import GATED_DELTANET


def bare_request(name: str, token_ids: list[int], max_len: int) -> Request:
    """A request whose tokens the caller appends, with neither sampler nor detokenizer."""
    return Request(name, SamplingParams(), token_ids, len(token_ids), max_len, None, None)


def fixed_forms(linear: LinearShape, buffer_len: int, kv_only_len: int) -> FormPolicy:
    """A policy that always says the same, so that the machine's speed has no part in the result."""
    heads = (linear.num_key_heads, linear.num_value_heads, linear.key_head_dim, linear.value_head_dim)
    costs = Costs(Bandwidth(1.0, 1.0))  # not looked at when both lengths are given
    return FormPolicy(LayerShape(GATED_DELTANET, *heads), costs, buffer_len, kv_only_len, 1)
