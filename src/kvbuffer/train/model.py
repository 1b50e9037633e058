"""The models that are trained: transformers' own, made from a ``config.json``."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from kvbuffer.errors import ModelError
from kvbuffer.train.data import IGNORED, Batch, DataInfo
from kvbuffer.train.operators import Parameters
from kvbuffer.train.widths import Shape, architecture_of

#: Layers that write to the residual stream.
_WRITERS = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")


class Losses(NamedTuple):
    """Mean cross-entropy in nats per token, and the same with the experts' balance loss added, which is minimised."""

    cross_entropy: Tensor
    total: Tensor


def complete_config(config: Mapping[str, Any], info: DataInfo, seq_len: int) -> dict[str, Any]:
    """Return ``config.json`` with the vocabulary and special tokens of the data, and every default spelt out.

    Raises:
        ModelError: transformers refuses it, or its architecture cannot be trained.
    """
    fields = {
        **config,
        "vocab_size": info.vocab_size,
        "bos_token_id": None,
        "eos_token_id": info.stop_tokens,
        "pad_token_id": info.separator,
        "max_position_embeddings": max(seq_len, config.get("max_position_embeddings", 0)),
        "dtype": "float32",
    }
    cls = _model_class(config)
    try:
        full = cls.config_class(**fields).to_dict()
    except Exception as error:  # its validation raises errors of its own kinds
        raise ModelError(f"config.json is not one of {cls.__name__}: {error}") from None
    full["architectures"] = [cls.__name__]
    Shape.from_config(full)
    return dict(full)


def _model_class(config: Mapping[str, Any]) -> Any:
    cls = getattr(transformers, architecture_of(config))
    module = sys.modules[cls.__module__]
    # Where flash-linear-attention is installed, transformers takes its kernels, which need a GPU.
    if rule := getattr(module, "torch_chunk_gated_delta_rule", None):
        module.torch_chunk_gated_delta_rule = inspect.unwrap(rule)  # type: ignore[attr-defined]
    return cls


def build(config: Mapping[str, Any], seed: int) -> Any:
    """Return a model with fresh weights, in float32.

    Matrices that write to the residual stream start smaller by the square root of their number, so that the stream does
    not grow with depth. Decays of linear attention start as in Mamba-2: from time steps of 0.001 to 0.1, so that
    memories reach from one to a thousand tokens.
    """
    torch.manual_seed(seed)
    cls = _model_class(config)
    model = cls._from_config(cls.config_class(**config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_WRITERS):
                parameter.mul_((2 * config["num_hidden_layers"]) ** -0.5)
            elif name.endswith("dt_bias"):
                step = torch.exp(torch.empty_like(parameter).uniform_(math.log(0.001), math.log(0.1)))
                parameter.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
            elif name.endswith("A_log"):
                parameter.copy_(torch.empty_like(parameter).uniform_(1, 16).log())
    return model.train()


def load(folder: Path) -> Any:
    """Return the model of a checkpoint folder, in float32."""
    cls = _model_class(transformers.AutoConfig.from_pretrained(folder).to_dict())
    return cls.from_pretrained(folder, dtype=torch.float32).train()


def parameters_of(model: nn.Module) -> Parameters:
    """Return the model's parameters by name; tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def set_parameters(model: nn.Module, parameters: Parameters) -> None:
    """Copy parameters into the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])


def loss_of(model: Any, batch: Batch) -> Losses:
    """Return the mean losses of predicting the targets of a batch; zero where it has none."""
    balance = getattr(model, "router_aux_loss_coef", 0.0) * (getattr(model, "num_experts", 0) > 1)
    arguments = {"output_router_logits": True} if balance else {}
    out = model(input_ids=batch.tokens, use_cache=False, **arguments)
    logits = out.logits.flatten(0, 1).float()
    summed = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
    cross_entropy = summed / max(1.0, batch.learned)
    return Losses(cross_entropy, cross_entropy + balance * out.aux_loss if balance else cross_entropy)
