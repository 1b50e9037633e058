"""Loads a process's model: all of it, or one rank's part."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from kvbuffer.cache.plan import MemoryPlan
from kvbuffer.cache.store import AttentionCache, LinearCache, allocate
from kvbuffer.cqil.plan import NO_GROUPS, CqilPlan
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.ranks import ProcessRanks, follow
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.parallel import ParallelDecoder, shard_config
from kvbuffer.models.weights import resolve_model


def follow_engine(config: EngineConfig) -> None:
    """Be another rank than 0 of an engine with these options until it is closed.

    Raises:
        ModelError: the checkpoint is missing, broken or of an unsupported kind.
        RankLostError: another rank has ended without a word.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = resolve_model(config.model)
    model_config = ModelConfig.from_folder(folder)
    shard_config(model_config, config.tensor_parallel_size)
    cqil = load_plan(config.cqil, folder, model_config)
    ranks = ProcessRanks(config.tensor_parallel_size)

    def build(plan: MemoryPlan) -> tuple[Decoder, list[LinearCache | AttentionCache]]:
        model = build_model(config, folder, model_config, cqil, plan, ranks)
        return model, allocate(dataclasses.replace(model.config.cache_shape, groups=cqil.groups), plan)

    follow(ranks, build)


def load_plan(path: Path | None, folder: Path, model_config: ModelConfig) -> CqilPlan:
    """Return the plan in a file, with its adapter if it has one, checked; the one of no groups for None.

    Raises:
        ConfigError: the plan does not fit the model.
    """
    if path is None:
        return NO_GROUPS
    cqil = CqilPlan.load(path)
    cqil.check(folder, model_config)
    return cqil


def build_model(
    config: EngineConfig,
    folder: Path,
    model_config: ModelConfig,
    cqil: CqilPlan,
    plan: MemoryPlan,
    ranks: ProcessRanks | None,
) -> Decoder:
    """Return this process's model."""
    options = (plan.dtype, plan.max_model_len, config.show_progress, cqil.groups, cqil.bypass, cqil.adapter)
    if ranks is None:
        return Decoder(folder, model_config, *options)
    return ParallelDecoder(folder, model_config, *options, ranks)
