"""Counted FLOPs are those of the formulas."""

from __future__ import annotations

from typing import Any

from kvbuffer.train.flops import step_flops
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.training import config_of

ROWS, LENGTH = 3, 64


def products(config: dict[str, Any]) -> int:
    """Weights that every token is multiplied with, in a Llama model."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    attention = 2 * hidden * config["head_dim"] * (heads + kv_heads)
    layer = attention + 3 * hidden * config["intermediate_size"]
    return int(config["num_hidden_layers"] * layer + VOCAB_SIZE * hidden)


def test_a_transformer_costs_six_per_weight_and_token() -> None:
    config = config_of("llama")
    heads = config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    # Two products of T by T per head forward; backward recomputes one and does four more.
    attention = heads * LENGTH * LENGTH * 2 * (2 + 5) * ROWS
    # The first layer's input is looked up, so nothing but weights needs a gradient there.
    assert step_flops(config, ROWS, LENGTH, "adamw") == 6 * products(config) * ROWS * LENGTH + attention


def test_a_hybrid_costs_what_its_layers_do() -> None:
    """A chunk of linear attention has products of C by C, and triangular systems; none of them is left out."""
    config = config_of("qwen3_5", num_hidden_layers=4)
    more = config_of("qwen3_5", num_hidden_layers=4, linear_value_head_dim=64)
    one, two = (step_flops(c, ROWS, LENGTH, "adamw") for c in (config, more))
    assert one % ROWS == 0
    assert two > one
    assert step_flops(config, 2 * ROWS, LENGTH, "adamw") == 2 * one
    assert step_flops(config, ROWS, LENGTH, "muon") > one


def test_experts_cost_what_is_routed_to_them() -> None:
    few = config_of("qwen3_5_moe", num_hidden_layers=4, num_experts_per_tok=2, num_experts=4)
    many = {**few, "num_experts_per_tok": 3}
    tokens = ROWS * LENGTH
    expert = 3 * few["hidden_size"] * few["moe_intermediate_size"]
    difference = step_flops(many, ROWS, LENGTH, "adamw") - step_flops(few, ROWS, LENGTH, "adamw")
    assert difference == 4 * 6 * expert * tokens
