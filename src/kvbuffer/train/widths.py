"""How the parameters of each architecture depend on its widths: one row of data per parameter.

Merging units of a width is a linear map. Along an axis of outputs (rows of a projection, embeddings, scales of norms)
merged units are averaged, and growing back copies them; along an axis of inputs they are summed, and growing back gives
each copy its share. So a grown model computes what the small one does (Zou et al., arXiv 2404.07999, section 3.1).

Units are merged whole: head i with head i + H/2, so that head dims, groups of query or value heads, convolution
channels, decays and gates stay together. Along a contiguous axis that is the first half with the second; where an axis
is made of several parts (queries, keys, values), it is so in each of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kvbuffer.errors import ModelError

#: Architectures that can be trained, grown and shrunk.
ARCHITECTURES = ("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "LlamaForCausalLM")
#: Fields of ``config.json`` that width coalescing divides; those of one unit stay as they are.
WIDTH_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the architecture that ``config.json`` names.

    Raises:
        ModelError: it is none of :data:`ARCHITECTURES`.
    """
    names = config.get("architectures") or []
    for architecture in ARCHITECTURES:
        if architecture in names:
            return architecture
    raise ModelError(f"architecture {names or 'missing'} cannot be trained; known: {', '.join(ARCHITECTURES)}")


class Axis(NamedTuple):
    """One axis of a parameter: what merging does along it, and the widths it is made of, in order."""

    role: Literal["out", "in"]
    widths: tuple[str, ...]


class Row(NamedTuple):
    """One parameter: its axes (None: never merged), and what its model adds to it before use."""

    axes: tuple[Axis | None, ...]
    offset: float = 0.0


def _out(*widths: str) -> Axis:
    return Axis("out", widths)


def _in(*widths: str) -> Axis:
    return Axis("in", widths)


_HIDDEN = _out("hidden"), _in("hidden")
_NORM = Row((_out("hidden"),))
_HEAD_NORM = Row((None,))

_LAYER = {
    "input_layernorm.weight": _NORM,
    "post_attention_layernorm.weight": _NORM,
    "self_attn.q_proj.weight": Row((_out("queries"), _in("hidden"))),
    "self_attn.k_proj.weight": Row((_out("kv"), _in("hidden"))),
    "self_attn.v_proj.weight": Row((_out("kv"), _in("hidden"))),
    "self_attn.o_proj.weight": Row((_out("hidden"), _in("heads"))),
    "self_attn.q_proj.bias": Row((_out("queries"),)),
    "self_attn.k_proj.bias": Row((_out("kv"),)),
    "self_attn.v_proj.bias": Row((_out("kv"),)),
    "self_attn.o_proj.bias": _NORM,
    "self_attn.q_norm.weight": _HEAD_NORM,
    "self_attn.k_norm.weight": _HEAD_NORM,
    "linear_attn.in_proj_qkv.weight": Row((_out("keys", "keys", "values"), _in("hidden"))),
    "linear_attn.in_proj_z.weight": Row((_out("values"), _in("hidden"))),
    "linear_attn.in_proj_b.weight": Row((_out("value_heads"), _in("hidden"))),
    "linear_attn.in_proj_a.weight": Row((_out("value_heads"), _in("hidden"))),
    # Qwen3-Next groups these by key head, and a group is merged whole.
    "linear_attn.in_proj_qkvz.weight": Row((_out("qkvz"), _in("hidden"))),
    "linear_attn.in_proj_ba.weight": Row((_out("ba"), _in("hidden"))),
    "linear_attn.conv1d.weight": Row((_out("keys", "keys", "values"), None, None)),
    "linear_attn.A_log": Row((_out("value_heads"),)),
    "linear_attn.dt_bias": Row((_out("value_heads"),)),
    "linear_attn.norm.weight": _HEAD_NORM,
    "linear_attn.out_proj.weight": Row((_out("hidden"), _in("values"))),
    "mlp.gate_proj.weight": Row((_out("mlp"), _in("hidden"))),
    "mlp.up_proj.weight": Row((_out("mlp"), _in("hidden"))),
    "mlp.down_proj.weight": Row((_out("hidden"), _in("mlp"))),
    "mlp.gate_proj.bias": Row((_out("mlp"),)),
    "mlp.up_proj.bias": Row((_out("mlp"),)),
    "mlp.down_proj.bias": _NORM,
    "mlp.gate.weight": Row((None, _in("hidden"))),
    "mlp.experts.gate_up_proj": Row((None, _out("expert", "expert"), _in("hidden"))),
    "mlp.experts.down_proj": Row((None, _out("hidden"), _in("expert"))),
    "mlp.experts.*.gate_proj.weight": Row((_out("expert"), _in("hidden"))),
    "mlp.experts.*.up_proj.weight": Row((_out("expert"), _in("hidden"))),
    "mlp.experts.*.down_proj.weight": Row((_out("hidden"), _in("expert"))),
    "mlp.shared_expert.gate_proj.weight": Row((_out("shared"), _in("hidden"))),
    "mlp.shared_expert.up_proj.weight": Row((_out("shared"), _in("hidden"))),
    "mlp.shared_expert.down_proj.weight": Row((_out("hidden"), _in("shared"))),
    "mlp.shared_expert_gate.weight": Row((None, _in("hidden"))),
}
_ONE_KEY_HEAD = {
    "linear_attn.in_proj_qkvz.weight": Row((_out("keys", "keys", "values", "values"), _in("hidden"))),
    "linear_attn.in_proj_ba.weight": Row((_out("value_heads", "value_heads"), _in("hidden"))),
}
_MODEL = {
    "model.embed_tokens.weight": Row((None, _out("hidden"))),
    "model.norm.weight": _NORM,
    "lm_head.weight": Row((None, _in("hidden"))),
    "mtp.fc.weight": Row((_out("hidden"), _in("hidden", "hidden"))),
    "mtp.pre_fc_norm_embedding.weight": _NORM,
    "mtp.pre_fc_norm_hidden.weight": _NORM,
    "mtp.norm.weight": _NORM,
}


@dataclass(frozen=True)
class Shape:
    """A model's widths and the kinds of its layers.

    Attributes:
        widths: what the axes above are made of, in elements.
        fixed: what must be the same in both models: vocabulary, head dims, number of experts and the like.
        heads: pairs of counts that are merged together: heads, and the groups they form.
        kinds: per layer, its token mixer and its MLP.
        tied: whether the logits come from the embeddings.
        norm_offset: what the model adds to the weights of its norms.
    """

    architecture: str
    widths: Mapping[str, int]
    fixed: Mapping[str, Any]
    heads: tuple[tuple[int, int], ...]
    kinds: tuple[tuple[str, str], ...]
    tied: bool
    norm_offset: float

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Shape:
        """Read a checkpoint's ``config.json``.

        Raises:
            ModelError: its architecture is none of :data:`ARCHITECTURES`, or a field is missing.
        """
        architecture = architecture_of(config)
        try:
            return cls._of(architecture, config)
        except KeyError as error:
            raise ModelError(f"config.json of {architecture} has no {error.args[0]}") from None

    @classmethod
    def _of(cls, architecture: str, config: Mapping[str, Any]) -> Shape:
        hybrid = architecture != "LlamaForCausalLM"
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        layers = config["num_hidden_layers"]
        mixers = config["layer_types"] if hybrid else ["full_attention"] * layers
        widths = {
            "hidden": hidden,
            "mlp": config.get("intermediate_size") or 0,
            "expert": config.get("moe_intermediate_size") or 0,
            "shared": config.get("shared_expert_intermediate_size") or 0,
            "heads": heads * head_dim,
            "queries": heads * head_dim * (2 if hybrid else 1),  # with their gates
            "kv": kv_heads * head_dim,
        }
        pairs = [(heads, kv_heads)]
        fixed = {name: config.get(name) for name in ("vocab_size", "num_experts", "num_experts_per_tok")}
        fixed["head_dim"] = head_dim
        if hybrid:
            key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
            keys = key_heads * config["linear_key_head_dim"]
            values = value_heads * config["linear_value_head_dim"]
            widths |= {"keys": keys, "values": values, "value_heads": value_heads}
            widths |= {"qkvz": 2 * (keys + values), "ba": 2 * value_heads}
            pairs.append((value_heads, key_heads))
            for name in ("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"):
                fixed[name] = config[name]
        sparse = architecture == "Qwen3_5MoeForCausalLM" or bool(config.get("num_experts"))
        dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
        mlps = ["moe" if sparse and i not in dense and (i + 1) % step == 0 else "dense" for i in range(layers)]
        return cls(
            architecture=architecture,
            widths=widths,
            fixed=fixed,
            heads=tuple(pairs),
            kinds=tuple(zip(mixers, mlps, strict=True)),
            tied=bool(config.get("tie_word_embeddings")),
            norm_offset=1.0 if hybrid else 0.0,
        )

    def row(self, name: str) -> Row:
        """Return what parameter ``name`` of this model is made of.

        Raises:
            ModelError: no such parameter is known.
        """
        if self.tied and name in ("model.norm.weight", "mtp.norm.weight"):
            # The embeddings are copied, not shared out, so the logits they give must be: by the last norm's scale.
            return Row((_in("hidden"),), self.norm_offset)
        layer = re.fullmatch(r"(?:model|mtp)\.layers\.\d+\.(.+)", name)
        key = re.sub(r"\.\d+\.", ".*.", layer[1]) if layer else name
        # A single key head stays, and then what is grouped by key head is one group of four parts.
        grouped = _ONE_KEY_HEAD if len(self.heads) > 1 and self.heads[1][1] == 1 else {}
        row = grouped.get(key) or (_LAYER if layer else _MODEL).get(key)
        if row is None:
            raise ModelError(f"parameter {name} of {self.architecture} is unknown: it cannot be grown or shrunk")
        return row
