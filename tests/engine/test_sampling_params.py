"""Sampling parameters: vLLM's defaults, and a message that names the field, the value and what is allowed."""

import math

import numpy as np
import pytest

from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.errors import InvalidRequestError

NAN, INF = math.nan, math.inf


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.seed, params.logit_bias, params.logprobs) == (None, None, None)
    assert (params.stop, params.stop_token_ids) == ((), ())
    assert (params.max_tokens, params.min_tokens) == (16, 0)
    assert (params.include_stop_str_in_output, params.ignore_eos, params.skip_special_tokens) == (
        False,
        False,
        True,
    )


@pytest.mark.parametrize(
    ("field", "given", "kept"),
    [
        ("stop", "###", ("###",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop_token_ids", [3, 4], (3, 4)),
        ("stop_token_ids", None, ()),
        ("top_k", -1, 0),
        ("temperature", 1, 1.0),
        ("temperature", np.float32(0.5), 0.5),
        ("temperature", 1e30, 1e30),
        ("top_k", np.int64(7), 7),
        ("seed", -(2**63), -(2**63)),
        ("seed", 2**63 - 1, 2**63 - 1),
        ("logprobs", 0, 0),
        ("logit_bias", {5: -100}, {5: -100.0}),
        ("max_tokens", None, None),
    ],
)
def test_values_are_normalised(field, given, kept):
    value = getattr(SamplingParams(**{field: given}), field)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *[("n", v, "an integer between 1 and 128") for v in (0, -1, 129, True, 1.0, "1", None)],
        *[("temperature", v, "a finite number >= 0") for v in (-0.1, NAN, INF, True, "1", None, 10**400)],
        *[("top_p", v, "a number in (0, 1]") for v in (0.0, -1, 1.0001, NAN, INF, "x")],
        *[("top_k", v, "an integer between -1") for v in (-2, 2**31, 0.5, NAN, True)],
        *[("min_p", v, "a number in [0, 1]") for v in (-0.01, 1.01, NAN)],
        *[("repetition_penalty", v, "a finite number > 0") for v in (0, -1.0, INF, NAN)],
        *[("presence_penalty", v, "a number in [-2, 2]") for v in (-2.1, 2.1, NAN, [1])],
        *[("frequency_penalty", v, "a number in [-2, 2]") for v in (-2.1, 2.1, INF, {})],
        *[("seed", v, "an integer between") for v in (2**63, -(2**63) - 1, 1.5, "7", False)],
        *[("logprobs", v, "an integer between 0 and 20") for v in (-1, 21, True, 1.5)],
        *[("max_tokens", v, "an integer between 1") for v in (0, -5, 2**31, 1.5, True)],
        *[("min_tokens", v, "an integer between 0 and max_tokens (16)") for v in (-1, 17, None)],
        *[("stop", v, "at most 16 strings, none empty") for v in ("", ["a", ""], ["a"] * 17, [1], 5, b"x")],
        *[("stop_token_ids", v, "list of token ids") for v in ("12", 5)],
        *[("stop_token_ids", v, "an integer between 0") for v in ([-1], [True], [1.0], ["1"])],
        *[("logit_bias", v, "an integer between 0") for v in ({-1: 0.0}, {"1": 0.0}, {True: 1.0})],
        *[("logit_bias", v, "a number in [-100, 100]") for v in ({1: 100.5}, {1: NAN}, {1: "1"}, {1: None})],
        ("logit_bias", [1, 2], "a mapping from token ids to numbers"),
        *[("ignore_eos", v, "true or false") for v in (0, None, "no")],
        ("include_stop_str_in_output", 1, "true or false"),
        ("skip_special_tokens", 0, "true or false"),
    ],
)
def test_a_bad_value_is_refused_with_its_field_and_what_is_allowed(field, value, allowed):
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**{field: value})
    assert error.value.param == field
    assert field in str(error.value)
    assert allowed in str(error.value)
    assert len(str(error.value)) < 250


def test_an_integer_too_long_to_print_is_refused_like_any_other():
    with pytest.raises(InvalidRequestError, match="max_tokens must be an integer between 1"):
        SamplingParams(max_tokens=10**5000)


def test_the_message_shows_the_value():
    with pytest.raises(InvalidRequestError, match=r"temperature must be a finite number >= 0, got -3"):
        SamplingParams(temperature=-3)


def test_min_tokens_may_reach_max_tokens_or_anything_without_one():
    assert SamplingParams(max_tokens=5, min_tokens=5).min_tokens == 5
    assert SamplingParams(max_tokens=None, min_tokens=10_000).min_tokens == 10_000


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_validate_refuses_token_ids_outside_the_vocabulary(field):
    def params(token_id):
        return SamplingParams(**{field: {token_id: 1.0} if field == "logit_bias" else [token_id]})

    params(99).validate(100)
    with pytest.raises(InvalidRequestError, match=f"token id of {field} .* between 0 and 99, got 100") as error:
        params(100).validate(100)
    assert error.value.param == field


def test_very_small_temperatures_are_greedy():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_each_choice_has_a_seed_of_its_own():
    params = SamplingParams(n=3, seed=2**63 - 2, top_k=5)
    assert [params.for_choice(i).seed for i in range(3)] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert all(params.for_choice(i).n == 1 and params.for_choice(i).top_k == 5 for i in range(3))
    assert SamplingParams(n=2).for_choice(1).seed is None


def test_the_caller_cannot_change_parameters_afterwards():
    bias, stop = {1: 2.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[1] = 1e9
    stop.append("")
    assert params.logit_bias == {1: 2.0}
    assert params.stop == ("a",)
    with pytest.raises(AttributeError):
        params.n = 2
