"""The drafters by the names that ``--speculative-config`` has for them."""

from __future__ import annotations

from collections.abc import Sequence

from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.store import AttentionCache, LinearCache
from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.engine.speculative.drafter import Drafter
from kvbuffer.engine.speculative.mtp import MtpDrafter
from kvbuffer.engine.speculative.ngram import NgramDrafter
from kvbuffer.engine.speculative.suffix import SuffixDrafter
from kvbuffer.models.decoder import Decoder


def make_drafter(
    config: SpeculativeConfig, model: Decoder, caches: Sequence[LinearCache | AttentionCache], memory: RequestMemory
) -> Drafter:
    """Return the drafter that the configuration names.

    Args:
        config: it.
        model: what drafts are for, with its head if that is to draft.
        caches: the model's memory.
        memory: which of it belongs to whom.
    """
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
