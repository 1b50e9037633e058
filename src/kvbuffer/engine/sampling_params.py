"""What a request may say about how its tokens are chosen and when it ends."""

from __future__ import annotations

import dataclasses
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvbuffer.engine.structured_outputs import StructuredOutputsParams
from kvbuffer.errors import InvalidRequestError

#: Below this temperature the distribution is a single token in float32, so the arg max is taken instead.
GREEDY_TEMPERATURE = 1e-5
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
_MAX_COUNT = 2**31 - 1
_MIN_SEED, _MAX_SEED = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Names, defaults and meaning are vLLM's.

    Every value is checked on construction, except that token ids are compared with the vocabulary only by
    :meth:`validate`. None stands for an empty ``stop``, ``stop_token_ids`` or ``logit_bias`` too.

    Attributes:
        n: how many completions to make of the prompt, 1 to 128.
        temperature: divides the logits; below 1e-5 the most likely token is always taken (greedy).
        top_p: keep the fewest most likely tokens whose probabilities reach this sum, in (0, 1].
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        repetition_penalty: above 1 makes every token of the prompt and the output less likely, below 1 more.
        presence_penalty: subtracted once from the logit of every token in the output, in [-2, 2].
        frequency_penalty: subtracted from a token's logit once per occurrence in the output, in [-2, 2].
        seed: a signed 64-bit number that makes sampling reproducible; None draws a fresh one.
        logit_bias: added to the logits of the given token ids, each in [-100, 100].
        logprobs: how many of the most likely tokens to report with each sampled one, 0 to 20; None reports
            nothing.
        prompt_logprobs: the same for the tokens of the prompt, but the first, of which there is none. The prompt is
            then computed whole, whatever is cached of it.
        stop: strings that end the completion, at most 16; a single string is accepted. Kept as a tuple.
        stop_token_ids: token ids that end the completion. Kept as a tuple.
        include_stop_str_in_output: whether the text keeps the stop string that ended it.
        ignore_eos: whether to go on after the end-of-sequence token.
        max_tokens: at most this many output tokens; None goes on until the context is full. 0 with ``prompt_logprobs``
            only.
        min_tokens: end-of-sequence and stops are suppressed before this many output tokens.
        skip_special_tokens: whether special tokens are left out of the text.
        structured_outputs: the form of the output, which then also says when it ends.

    Raises:
        InvalidRequestError: a value of the wrong type or out of range; ``param`` names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            if (value := getattr(self, name)) is not _DEFAULTS[name]:  # as most are
                self._set(name, check(name, value))
        if self.max_tokens is not None:
            least = 1 if self.prompt_logprobs is None else 0
            self._set("max_tokens", _integer("max_tokens", self.max_tokens, least, _MAX_COUNT))
        most = _MAX_COUNT if self.max_tokens is None else self.max_tokens
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0, most, high_name="max_tokens"))
        if self.structured_outputs is not None and self.min_tokens:
            raise _invalid("min_tokens", "0 with structured outputs, whose form says when they end", self.min_tokens)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < GREEDY_TEMPERATURE

    def for_choice(self, index: int) -> SamplingParams:
        """Return the parameters of choice ``index`` of the ``n``: one completion, with a seed of its own."""
        seed = self.seed
        if seed is not None:
            seed = (seed + index - _MIN_SEED) % 2**64 + _MIN_SEED
        return dataclasses.replace(self, n=1, seed=seed)

    def validate(self, vocab_size: int) -> None:
        """Check the token ids against a vocabulary of ``vocab_size`` tokens.

        Raises:
            InvalidRequestError: an id of ``logit_bias`` or ``stop_token_ids`` is outside the vocabulary.
        """
        for name, ids in (("logit_bias", self.logit_bias or ()), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                _integer(name, token_id, 0, vocab_size - 1, item="token id")


def _invalid(name: str, allowed: str, value: object, item: str = "") -> InvalidRequestError:
    try:
        shown = reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        shown = "an integer of thousands of digits"
    of = f"a {item} of {name}" if item else name
    return InvalidRequestError(f"{of} must be {allowed}, got {shown}", param=name)


def _integer(name: str, value: object, low: int, high: int, *, item: str = "", high_name: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        shown_high = f"{high_name} ({high})" if high_name and high != _MAX_COUNT else str(high)
        raise _invalid(name, f"an integer between {low} and {shown_high}", value, item)
    return int(value)


def _number(
    name: str, value: object, low: float, high: float = math.inf, *, above_low: bool = False, item: str = ""
) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (above_low and number == low):
        if high < math.inf:
            allowed = f"a number in {'(' if above_low else '['}{low:g}, {high:g}]"
        else:
            allowed = f"a finite number {'>' if above_low else '>='} {low:g}"
        raise _invalid(name, allowed, value, item)
    return number


def _top_k(name: str, value: object) -> int:
    return max(0, _integer(name, value, -1, _MAX_COUNT))


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _invalid(name, "true or false", value)
    return value


def _structure(name: str, value: object) -> StructuredOutputsParams:
    if not isinstance(value, StructuredOutputsParams):
        raise _invalid(name, "StructuredOutputsParams", value)
    return value


def _stop_strings(name: str, value: object) -> tuple[str, ...]:
    allowed = f"a string or at most {MAX_STOP_STRINGS} strings, none empty"
    strings = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(strings, Sequence) or isinstance(strings, bytes) or len(strings) > MAX_STOP_STRINGS:
        raise _invalid(name, allowed, value)
    if not all(isinstance(string, str) and string for string in strings):
        raise _invalid(name, allowed, value)
    return tuple(strings)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _invalid(name, "a list of token ids", value)
    return tuple(_integer(name, token_id, 0, _MAX_COUNT, item="token id") for token_id in value)


def _logit_bias(name: str, value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _invalid(name, "a mapping from token ids to numbers", value)
    return {
        _integer(name, token_id, 0, _MAX_COUNT, item="token id"): _number(name, bias, -100.0, 100.0, item="value")
        for token_id, bias in value.items()
    }


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
#: What each field that depends on no other must be; its default is.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "n": partial(_integer, low=1, high=MAX_CHOICES),
    "temperature": partial(_number, low=0.0),
    "top_p": partial(_number, low=0.0, high=1.0, above_low=True),
    "top_k": _top_k,
    "min_p": partial(_number, low=0.0, high=1.0),
    "repetition_penalty": partial(_number, low=0.0, above_low=True),
    "presence_penalty": partial(_number, low=-2.0, high=2.0),
    "frequency_penalty": partial(_number, low=-2.0, high=2.0),
    "seed": partial(_integer, low=_MIN_SEED, high=_MAX_SEED),
    "logit_bias": _logit_bias,
    "logprobs": partial(_integer, low=0, high=MAX_LOGPROBS),
    "prompt_logprobs": partial(_integer, low=0, high=MAX_LOGPROBS),
    "stop": _stop_strings,
    "stop_token_ids": _token_ids,
    "include_stop_str_in_output": _boolean,
    "ignore_eos": _boolean,
    "skip_special_tokens": _boolean,
    "structured_outputs": _structure,
}
