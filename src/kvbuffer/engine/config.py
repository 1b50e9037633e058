"""The engine's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvbuffer.engine import defaults
from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.errors import ConfigError
from kvbuffer.ops.chunked import CHUNK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATE_DTYPES = {**DTYPES, "int8": torch.int8}


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is built from; the names are vLLM's where it has them.

    Attributes:
        model: checkpoint folder, hub id, or ``demo``.
        served_model_name: name in the API; the model's by default.
        dtype: ``auto`` (the checkpoint's), ``float32`` or ``bfloat16``.
        state_dtype: dtype of the linear-attention states, ``auto`` (float32), ``float32``, ``bfloat16`` or ``int8``.
        record_dtype: dtype of the keys and values in the KV buffers, ``auto`` (float32 beside float32 states, otherwise
            bfloat16), ``float32`` or ``bfloat16``.
        max_model_len: longest request in tokens, prompt and output; the model's own, if it fits, by default.
        max_num_seqs: at most this many requests run at once.
        max_num_batched_tokens: at most this many tokens are computed in a step, prompts being split to fit; exceeded
            only to let 64 prompt tokens in beside many decoding requests.
        max_queue_len: at most this many requests wait, half of them of one client; None for any number.
        memory: bytes for states, buffers and attention pages; by default half of the free memory.
        buffer_len: tokens a KV buffer holds before it is folded into the state; by default what the measured cost model
            finds cheapest for each batch.
        kv_only_len: tokens that a request has before it gets a state; by default as long as that pays.
        enable_prefix_caching: keep the memory of finished requests for later ones that begin with the same tokens.
        speculative_config: how the next tokens are guessed, as a :class:`SpeculativeConfig`, a dictionary or JSON; None
            for not at all.
        cache_dir: folder for cached prefixes that memory has no room for, and for all of them across a restart.
        cache_dir_bytes: most bytes in it.
        tensor_parallel_size: processes, started by torchrun, that each hold a part of the model; ``memory`` is of each.
        cqil: plan of the layers that are computed at once (see :mod:`kvbuffer.cqil.plan`).
        threads: CPU threads; PyTorch's choice by default.
        show_progress: draw a progress bar while loading.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str
    served_model_name: str | None = None
    dtype: str = "auto"
    state_dtype: str = "auto"
    record_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = defaults.MAX_NUM_SEQS
    max_num_batched_tokens: int = defaults.MAX_NUM_BATCHED_TOKENS
    max_queue_len: int | None = defaults.MAX_QUEUE_LEN
    memory: int | None = None
    buffer_len: int | None = None
    kv_only_len: int | None = None
    enable_prefix_caching: bool = True
    speculative_config: SpeculativeConfig | Mapping[str, Any] | str | None = None
    cache_dir: Path | None = None
    cache_dir_bytes: int = defaults.CACHE_DIR_BYTES
    tensor_parallel_size: int = 1
    cqil: Path | None = None
    threads: int | None = None
    show_progress: bool = True

    def __post_init__(self) -> None:
        if str(self.state_dtype).startswith("fp8"):
            raise ConfigError(
                f"state_dtype {self.state_dtype} is not supported: int8 is as small, and its error 2 to 4 times "
                "smaller (docs/operators.md has the measurements): use int8"
            )
        for name, dtypes in (("dtype", DTYPES), ("state_dtype", STATE_DTYPES), ("record_dtype", DTYPES)):
            if getattr(self, name) not in ("auto", *dtypes):
                raise ConfigError(f"{name} must be auto, {' or '.join(dtypes)}, got {getattr(self, name)!r}")
        bounds = {
            "max_model_len": 2,
            "max_num_seqs": 1,
            "max_num_batched_tokens": CHUNK,
            "max_queue_len": 1,
            "memory": 1,
            "buffer_len": 1,
            "kv_only_len": 0,
            "cache_dir_bytes": 1,
            "tensor_parallel_size": 1,
            "threads": 1,
        }
        for name, low in bounds.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}")
        if self.cache_dir is not None and not self.enable_prefix_caching:
            raise ConfigError("cache_dir keeps cached prefixes: leave prefix caching enabled, or leave cache_dir out")
        for name in ("buffer_len", "kv_only_len"):
            if (getattr(self, name) or 0) > 1024:
                raise ConfigError(f"{name} must be at most 1024, got {getattr(self, name)}")
        if self.speculative_config is not None:
            object.__setattr__(self, "speculative_config", SpeculativeConfig.parse(self.speculative_config))
        if self.tensor_parallel_size > 1:
            for name, given in (("cache_dir", self.cache_dir is not None), ("method mtp", self.uses_mtp)):
                if given:
                    raise ConfigError(
                        f"{name} works in one process only, not with tensor_parallel_size "
                        f"{self.tensor_parallel_size}: leave one of them out"
                    )

    @property
    def speculative(self) -> SpeculativeConfig | None:
        """The checked ``speculative_config``."""
        assert self.speculative_config is None or isinstance(self.speculative_config, SpeculativeConfig)
        return self.speculative_config

    @property
    def uses_mtp(self) -> bool:
        """Whether the model's multi-token-prediction head drafts."""
        return self.speculative is not None and self.speculative.method == "mtp"

    @property
    def num_draft_tokens(self) -> int:
        """Most tokens that a request drafts in a step."""
        return 0 if self.speculative is None else self.speculative.num_speculative_tokens
