"""The option that turns speculative decoding on."""

from __future__ import annotations

from typing import Any

import pytest

from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.errors import ConfigError

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def test_text_dictionary_and_object_say_the_same() -> None:
    config = SpeculativeConfig("ngram", 4)
    assert SpeculativeConfig.parse('{"method": "ngram", "num_speculative_tokens": 4}') == config
    assert SpeculativeConfig.parse(NGRAM) == SpeculativeConfig.parse(config) == config


@pytest.mark.parametrize("name", ["qwen3_next_mtp", "qwen3_5_mtp"])
def test_names_that_vllm_has_for_mtp(name: str) -> None:
    assert SpeculativeConfig(name, 2) == SpeculativeConfig("mtp", 2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(None, None, (2, 4)), (3, None, (3, 4)), (7, None, (7, 7)), (None, 1, (1, 1)), (None, 6, (2, 6)), (1, 8, (1, 8))],
)
def test_ngrams_have_sensible_lengths(low: int | None, high: int | None, expected: tuple[int, int]) -> None:
    assert SpeculativeConfig("ngram", 4, prompt_lookup_min=low, prompt_lookup_max=high).ngram_range == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ({"method": "ngram"}, "num_speculative_tokens is missing"),
        ({"num_speculative_tokens": 4}, "method is missing"),
        ({**NGRAM, "method": "magic"}, "method must be .*ngram.*'magic'"),
        ({**NGRAM, "num_speculative_tokens": 0}, "from 1 to 63, got 0"),
        ({**NGRAM, "num_speculative_tokens": 64}, "from 1 to 63, got 64"),
        ({**NGRAM, "num_speculative_tokens": True}, "got True"),
        ({**NGRAM, "adaptive": 1}, "adaptive must be true or false"),
        ({**NGRAM, "prompt_lookup_min": "2"}, "prompt_lookup_min must be an integer"),
        ({**NGRAM, "prompt_lookup_min": 5, "prompt_lookup_max": 3}, "5 is more than prompt_lookup_max 3"),
        ({**NGRAM, "method": ["ngram"]}, "method must be"),
        ({**NGRAM, "suffix_decoding_max_tree_depth": 0}, "max_tree_depth must be an integer from 1 to 1024, got 0"),
        ({**NGRAM, "suffix_decoding_max_cached_tokens": -1}, "max_cached_tokens must be an integer from 0"),
        ({**NGRAM, "suffix_decoding_max_spec_factor": "2"}, "max_spec_factor must be a number from 0 to 64, got '2'"),
        ({**NGRAM, "suffix_decoding_min_token_prob": 1.5}, "min_token_prob must be a number from 0 to 1, got 1.5"),
        ({**NGRAM, "model": "demo"}, "is for no other method; got model 'demo' with method 'ngram'"),
        ({**NGRAM, "method": "draft_model"}, "must name the draft model's checkpoint"),
        ({**NGRAM, "draft_len": 3}, "unknown name 'draft_len'; it takes method"),
    ],
)
def test_a_mistake_is_named(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.parse(value)
