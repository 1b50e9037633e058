"""The drafters by the names that ``--speculative-config`` has for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.engine.speculative.draft_model import DraftModel, DraftModelDrafter
from kvbuffer.engine.speculative.drafter import Drafter
from kvbuffer.engine.speculative.mtp import MtpDrafter
from kvbuffer.engine.speculative.ngram import NgramDrafter
from kvbuffer.engine.speculative.suffix import SuffixDrafter
from kvbuffer.models.decoder import Decoder

logger = logging.getLogger(__name__)


def make_drafter(
    options: EngineConfig,
    config: SpeculativeConfig,
    model: Decoder,
    caches: Sequence[LinearCache | AttentionCache],
    memory: RequestMemory,
    draft_model: DraftModel | None,
) -> Drafter:
    """Return the drafter that the configuration names.

    Args:
        options: the engine's.
        config: the part of them that is about drafts.
        model: what drafts are for, with its head if that is to draft.
        caches: the model's memory.
        memory: which of it belongs to whom.
        draft_model: what drafts if that is a separate model.

    Raises:
        ModelError: the draft model's weights do not fit its configuration.
        CapacityError: its share of memory is too small.
    """
    if draft_model is not None:
        plan = draft_model.plan(memory.plan)
        logger.info("Memory of the draft model: %s", plan.describe())
        decoder = Decoder(draft_model.folder, draft_model.config, plan.dtype, plan.max_model_len, options.show_progress)
        return DraftModelDrafter(decoder, plan, options.enable_prefix_caching, options.max_num_batched_tokens)
    if config.method == "mtp":
        cache = caches[-1]
        assert isinstance(cache, AttentionCache)
        return MtpDrafter(model, cache, memory)
    if config.method == "suffix":
        return SuffixDrafter(
            config.suffix_decoding_max_tree_depth,
            config.suffix_decoding_max_spec_factor,
            config.suffix_decoding_min_token_prob,
            config.suffix_decoding_max_cached_tokens,
        )
    return NgramDrafter(*config.ngram_range)
