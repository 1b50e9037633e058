"""Memory plans and engines of chosen sizes, where a byte budget would be a detour."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kvbuffer.cache.plan import RECORD_PAGE_SIZE, MemoryPlan, plan_memory
from kvbuffer.cache.pools import POOL_KINDS
from kvbuffer.cache.shapes import CacheShape, LinearShape
from kvbuffer.cache.transfer import block_tensors
from kvbuffer.engine.config import STATE_DTYPES, EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.forms import FormPolicy
from kvbuffer.engine.request import CompletionDelta, TokenLogprob
from kvbuffer.engine.speculative.draft_model import DraftModel
from kvbuffer.models.config import ModelConfig
from kvbuffer.tokenizer import Tokenizer

LINEAR = LinearShape(num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=32, conv_kernel=4)


def shape(linear: int = 3, attention: int = 1, max_position_embeddings: int = 4096) -> CacheShape:
    """A model of ``linear`` and ``attention`` layers."""
    types = ("linear_attention",) * linear + ("full_attention",) * attention
    return CacheShape(types, LINEAR, num_kv_heads=2, head_dim=32, max_position_embeddings=max_position_embeddings)


def plan_for(cache_shape: CacheShape, budget: int = 1 << 30, **options: Any) -> MemoryPlan:
    """``plan_memory`` in float32 with the options that a test does not care about filled in."""
    defaults = {"max_model_len": None, "max_num_seqs": 64, "buffer_len": 16, "kv_only_len": 24}
    types = dict.fromkeys(("dtype", "state_dtype", "record_dtype"), torch.float32)
    return plan_memory(cache_shape, budget=budget, **{**defaults, **types, **options})


def sized_plan(slots: int, pages: int, max_model_len: int = 128, **options: Any) -> MemoryPlan:
    """A plan of exactly so many state slots, rings and attention pages, and two record pages for each slot."""
    plan = plan_for(shape(), max_model_len=max_model_len, **options)
    return _sized(plan, slots, pages)


def _sized(plan: MemoryPlan, slots: int, pages: int) -> MemoryPlan:
    record_pages = slots * -(-plan.max_records // RECORD_PAGE_SIZE)
    return dataclasses.replace(
        plan, num_slots=slots, num_rings=slots, num_record_pages=record_pages, num_attention_pages=pages
    )


def sized_engine(
    folder: Path,
    slots: int = 8,
    pages: int = 64,
    max_model_len: int = 128,
    buffer_len: int = 4,
    kv_only_len: int = 24,
    tokens: int = 128,
    pools: dict[str, int] | None = None,
    draft_memory: int = 64 << 20,
    **options: Any,
) -> Engine:
    """A float32 engine of exactly so many state slots, rings, attention pages and tokens per step.

    ``pools`` are fields of the plan that are to be otherwise, ``draft_memory`` is the draft model's budget.
    """
    config = EngineConfig(
        str(folder), dtype="float32", max_num_batched_tokens=tokens, buffer_len=buffer_len, kv_only_len=kv_only_len,
        max_num_seqs=64, show_progress=False, **options,
    )  # fmt: skip
    model = ModelConfig.from_folder(folder, config.uses_mtp)
    lengths = {"max_model_len": max_model_len, "buffer_len": buffer_len, "kv_only_len": kv_only_len}
    dtypes = [STATE_DTYPES.get(name, torch.float32) for name in (config.state_dtype, config.record_dtype)]
    plan = plan_for(
        model.cache_shape,
        **lengths,
        state_dtype=dtypes[0],
        record_dtype=dtypes[1],
        num_draft_tokens=config.num_draft_tokens,
    )
    forms = FormPolicy.for_model(
        model.cache_shape.linear, *dtypes, buffer_len, kv_only_len, config.max_num_seqs, bool(config.num_draft_tokens)
    )
    plan = dataclasses.replace(_sized(plan, slots, pages), **pools or {})
    tokenizer, draft_model = Tokenizer(folder), None
    if config.speculative is not None and config.speculative.model is not None:
        found = DraftModel.find(config.speculative.model, model, tokenizer)
        draft_model = dataclasses.replace(found, budget=draft_memory)
    return Engine(config, folder, model, plan, forms, tokenizer, draft_model)


class Outputs:
    """What an engine has reported so far, per request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.text: dict[str, str] = {}
        self.last: dict[str, CompletionDelta] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprob]] = {}

    def add(self, deltas: Iterable[CompletionDelta]) -> None:
        """Append the deltas of a step."""
        for delta in deltas:
            self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            self.text[delta.request_id] = self.text.get(delta.request_id, "") + delta.text
            self.last[delta.request_id] = delta
            if delta.prompt_logprobs is not None:
                assert delta.request_id not in self.prompt_logprobs
                self.prompt_logprobs[delta.request_id] = delta.prompt_logprobs


def drain(engine: Engine) -> Outputs:
    """Step until nothing is left; the engine must end clean."""
    outputs = Outputs()
    while engine.has_work():
        outputs.add(engine.step())
    check_idle(engine)
    return outputs


def poison_free(engine: Engine) -> None:
    """Fill every block that no one holds with NaN, once the work that still reads some of them is done."""
    engine._runner.do_memory_work()
    for kind in POOL_KINDS:
        pool = engine._memory.pools.by_kind(kind)
        free = [block for block in range(pool.size) if not pool.references(block)]
        for tensor in block_tensors(engine._runner.caches, kind):
            tensor[free] = float("nan") if tensor.dtype.is_floating_point else 77


def check_idle(engine: Engine) -> None:
    """Nothing runs, waits or holds memory."""
    engine.check_integrity()
    stats = engine.stats
    assert stats.num_running == stats.num_waiting == 0
    assert all(pool.used == 0 for pool in stats.pools.values())
