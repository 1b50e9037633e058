"""The option ``--speculative-config``: which drafter, and how much it may propose. Names are vLLM's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvbuffer.errors import ConfigError

METHODS = ("ngram", "suffix", "mtp", "draft_model")
_ALIASES = {"qwen3_next_mtp": "mtp", "qwen3_5_mtp": "mtp"}
#: Most draft tokens of a request in one step: the trees' masks are 64 bits wide, and the known token is one of them.
MAX_DRAFT_TOKENS = 63
_DEFAULT_NGRAM = (2, 4)


@dataclass(frozen=True)
class SpeculativeConfig:
    """How the next tokens are guessed.

    Attributes:
        method: ``ngram`` (prompt lookup), ``suffix`` (suffix decoding), ``mtp`` (the model's own
            multi-token-prediction head) or ``draft_model`` (a separate, smaller model).
        num_speculative_tokens: most draft tokens of a request in one step, all branches of a tree together, 1 to 63.
        model: the draft model: checkpoint folder, hub id, or ``demo``.
        adaptive: propose fewer, down to none, where the measured cost of checking them is more than they bring.
        prompt_lookup_min: shortest n-gram that is looked up; by default 2, or ``prompt_lookup_max`` if that is less.
        prompt_lookup_max: longest; by default 4, or ``prompt_lookup_min`` if that is more.
        suffix_decoding_max_tree_depth: most tokens that are matched by suffix decoding.
        suffix_decoding_max_spec_factor: a match of n tokens lets at most so many times n be proposed.
        suffix_decoding_min_token_prob: the least share of cases in which a proposed token followed the match.
        suffix_decoding_max_cached_tokens: tokens of earlier outputs that are kept to match; 0 for none.

    Raises:
        ConfigError: a value is missing or out of range.
    """

    method: str
    num_speculative_tokens: int
    model: str | None = None
    adaptive: bool = True
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1
    suffix_decoding_max_cached_tokens: int = 1 << 17

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", _ALIASES.get(str(self.method), self.method))
        if self.method not in METHODS:
            raise ConfigError(f"speculative_config: method must be {_either(METHODS)}, got {self.method!r}")
        if (self.method == "draft_model") != isinstance(self.model, str):
            raise ConfigError(
                "speculative_config: model must name the draft model's checkpoint with method draft_model, and is for "
                f"no other method; got model {self.model!r} with method {self.method!r}"
            )
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"speculative_config: adaptive must be true or false, got {self.adaptive!r}")
        self._check("num_speculative_tokens", MAX_DRAFT_TOKENS)
        for name in ("prompt_lookup_min", "prompt_lookup_max"):
            if getattr(self, name) is not None:
                self._check(name, 1024)
        self._check("suffix_decoding_max_tree_depth", 1024)
        self._check("suffix_decoding_max_cached_tokens", 1 << 30, low=0)
        self._check_number("suffix_decoding_max_spec_factor", 64.0)
        self._check_number("suffix_decoding_min_token_prob", 1.0)
        low, high = self.ngram_range
        if low > high:
            raise ConfigError(f"speculative_config: prompt_lookup_min {low} is more than prompt_lookup_max {high}")

    def _check(self, name: str, high: int, low: int = 1) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"speculative_config: {name} must be an integer from {low} to {high}, got {value!r}")

    def _check_number(self, name: str, high: float) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise ConfigError(f"speculative_config: {name} must be a number from 0 to {high:g}, got {value!r}")

    @property
    def ngram_range(self) -> tuple[int, int]:
        """The shortest and the longest n-gram that is looked up."""
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is None:
            low = _DEFAULT_NGRAM[0] if high is None else min(_DEFAULT_NGRAM[0], high)
        return low, max(_DEFAULT_NGRAM[1], low) if high is None else high

    @classmethod
    def parse(cls, value: SpeculativeConfig | Mapping[str, Any] | str) -> SpeculativeConfig:
        """Make one from itself, a dictionary or JSON text.

        Raises:
            ConfigError: it is none of these, a name is unknown, or a value is missing or out of range.
        """
        if isinstance(value, SpeculativeConfig):
            return value
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ConfigError(f"speculative_config is not valid JSON: {error}") from error
        if not isinstance(value, Mapping):
            raise ConfigError(f"speculative_config must be a JSON object, got {value!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(value) - set(known)):
            raise ConfigError(f"speculative_config: unknown name {unknown[0]!r}; it takes {', '.join(known)}")
        for name in ("method", "num_speculative_tokens"):
            if name not in value:
                raise ConfigError(f"speculative_config: {name} is missing")
        return cls(**value)


def _either(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
