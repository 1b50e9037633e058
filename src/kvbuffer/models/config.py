"""A checkpoint's ``config.json`` reduced to what the engine needs, checked field by field."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvbuffer.cache.shapes import CacheShape, LinearShape
from kvbuffer.errors import ModelError

#: Architectures in ``config.json`` that are served, and the weight layout that each one has.
SUPPORTED_ARCHITECTURES = {
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5",
    "Qwen3_5MoeForCausalLM": "qwen3_5",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
}


@dataclass(frozen=True)
class MoeConfig:
    """Shape of the sparse MLP layers."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int
    normalize: bool


@dataclass(frozen=True)
class ModelConfig:
    """One decoder's shape.

    Attributes:
        architecture: the name in ``config.json``.
        layout: key of the weight layout, a module of ``kvbuffer.models``.
        layer_types: per layer ``"linear_attention"`` or ``"full_attention"``.
        sparse_layers: per layer, whether its MLP is a mixture of experts.
        rotary_dim: dims of each attention head that are rotated.
        dtype: dtype the weights were saved in.
        eos_token_ids: ends of sequence by ``config.json`` (``generation_config.json`` adds to them).
        with_mtp: the multi-token-prediction head is loaded, too.
    """

    architecture: str
    layout: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    sparse_layers: tuple[bool, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    linear: LinearShape
    moe: MoeConfig | None
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    with_mtp: bool = False

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layer_types)

    def repeated(self, count: int) -> ModelConfig:
        """Return the configuration whose layers have the heads of ``count`` of these side by side."""
        return replace(
            self,
            linear=self.linear.repeated(count),
            num_heads=count * self.num_heads,
            num_kv_heads=count * self.num_kv_heads,
        )

    @property
    def cache_shape(self) -> CacheShape:
        """What the layers remember; last, where it is used, that of the multi-token-prediction head."""
        types = (*self.layer_types, "full_attention") if self.with_mtp else self.layer_types
        return CacheShape(types, self.linear, self.num_kv_heads, self.head_dim, self.max_position_embeddings)

    @classmethod
    def from_folder(cls, folder: Path, with_mtp: bool = False) -> ModelConfig:
        """Read ``config.json``.

        Args:
            folder: checkpoint folder.
            with_mtp: use its multi-token-prediction head.

        Raises:
            ModelError: the file is missing or broken, or describes a model that is not supported.
        """
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ModelError(f"{folder} has no config.json: not a Hugging Face checkpoint folder") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ModelError(f"{path} must hold a JSON object, got {type(raw).__name__}")
        return dataclasses.replace(cls.from_dict(raw), with_mtp=with_mtp)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Build from the contents of ``config.json``; see :meth:`from_folder`."""
        names = raw.get("architectures") or []
        architecture = next((name for name in names if name in SUPPORTED_ARCHITECTURES), None)
        if architecture is None:
            raise ModelError(
                f"architecture {names or 'missing'} in config.json is not supported; "
                f"supported: {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        fields = _Fields({**raw, **raw["text_config"]} if isinstance(raw.get("text_config"), dict) else raw)
        layers = fields.integer("num_hidden_layers")
        interval = fields.integer("full_attention_interval", 4)
        default_types = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
        layer_types = tuple(fields.get("layer_types") or default_types)
        if len(layer_types) != layers or not set(layer_types) <= {"linear_attention", "full_attention"}:
            raise ModelError(
                f"layer_types in config.json must name linear_attention or full_attention for each of the "
                f"{layers} layers, got {list(layer_types)}"
            )
        if fields.get("hidden_act", "silu") != "silu":
            raise ModelError(f"hidden_act {fields.get('hidden_act')!r} is not supported; supported: 'silu'")
        heads = fields.integer("num_attention_heads")
        head_dim = fields.integer("head_dim", fields.integer("hidden_size") // heads)
        theta, rotary_dim = _rope(fields, head_dim)
        linear = LinearShape(
            num_key_heads=fields.integer("linear_num_key_heads"),
            num_value_heads=fields.integer("linear_num_value_heads"),
            key_head_dim=fields.integer("linear_key_head_dim"),
            value_head_dim=fields.integer("linear_value_head_dim"),
            conv_kernel=fields.integer("linear_conv_kernel_dim", 4),
        )
        if linear.num_value_heads % linear.num_key_heads:
            raise ModelError(
                f"linear_num_value_heads ({linear.num_value_heads}) must be a multiple of linear_num_key_heads "
                f"({linear.num_key_heads})"
            )
        kv_heads = fields.integer("num_key_value_heads", heads)
        if heads % kv_heads:
            raise ModelError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads}) in config.json"
            )
        moe, sparse = _moe(fields, architecture, layers)
        eos = fields.get("eos_token_id")
        return cls(
            architecture=architecture,
            layout=SUPPORTED_ARCHITECTURES[architecture],
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size", 0),
            layer_types=layer_types,
            sparse_layers=sparse,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_theta=theta,
            rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            attention_bias=bool(fields.get("attention_bias", False)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", fields.get("tie_word_embeddings", False))),
            max_position_embeddings=fields.integer("max_position_embeddings", 32768),
            linear=linear,
            moe=moe,
            dtype=_dtype(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"),
            eos_token_ids=tuple([eos] if isinstance(eos, int) else eos or ()),
        )


class _Fields:
    """Typed access to the fields of ``config.json``."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self._raw = raw

    def get(self, name: str, default: Any = None) -> Any:
        value = self._raw.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if value is None:
            raise ModelError(f"config.json has no {name}")
        # Zero is allowed only where it is the default: it means that there is none of these.
        if isinstance(value, bool) or not isinstance(value, int) or value < (default != 0):
            kind = "non-negative" if default == 0 else "positive"
            raise ModelError(f"{name} in config.json must be a {kind} integer, got {value!r}")
        return int(value)


def _rope(fields: _Fields, head_dim: int) -> tuple[float, int]:
    """Return theta and the rotated dims; checkpoints spell these in an older and a newer way."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelError(f"rope type {kind!r} is not supported yet; supported: 'default'")
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 0.25))
    return float(theta), int(head_dim * partial)


def _moe(fields: _Fields, architecture: str, layers: int) -> tuple[MoeConfig | None, tuple[bool, ...]]:
    experts = 0 if "Moe" not in architecture and "Next" not in architecture else fields.integer("num_experts", 0)
    if experts == 0:
        return None, (False,) * layers
    moe = MoeConfig(
        num_experts=experts,
        top_k=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        shared_intermediate_size=fields.integer("shared_expert_intermediate_size"),
        normalize=bool(fields.get("norm_topk_prob", True)),
    )
    if moe.top_k > experts:
        raise ModelError(f"num_experts_per_tok ({moe.top_k}) must be at most num_experts ({experts}) in config.json")
    dense = set(fields.get("mlp_only_layers", []))
    step = fields.integer("decoder_sparse_step", 1)
    return moe, tuple(i not in dense and (i + 1) % step == 0 for i in range(layers))


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"dtype {name!r} in config.json is not a torch dtype")
    return dtype
