"""What the sampler remembers of a request: its random stream and the tokens seen."""

import numpy as np
import pytest

from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState


@pytest.mark.parametrize("seed", [0, 12345, -1, 2**63 - 1])
def test_the_random_stream_is_philox_and_can_be_read_anywhere(seed):
    stream = np.random.Philox(key=seed % 2**64).random_raw(500)
    state = SamplingState(SamplingParams(seed=seed), [], ())
    for position in (0, 1, 63, 64, 65, 499, 2, 300):
        assert state.uniform(position) == (int(stream[position]) >> 11) / 2**53


def test_uniforms_fill_the_unit_interval():
    state = SamplingState(SamplingParams(seed=1), [], ())
    values = np.array([state.uniform(position) for position in range(5000)])
    assert values.min() >= 0.0
    assert values.max() < 1.0
    counts = np.histogram(values, 10, (0.0, 1.0))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 28  # chi-square with 9 degrees of freedom, p = 0.001


def test_logits_are_left_alone_unless_something_asks_for_a_change():
    assert not SamplingState(SamplingParams(top_p=0.5), [1], (0,)).edits_logits
    assert not SamplingState(SamplingParams(min_tokens=3, ignore_eos=True), [1], (0,)).edits_logits
    assert SamplingState(SamplingParams(logit_bias={1: 1.0}), [1], (0,)).edits_logits
    assert SamplingState(SamplingParams(frequency_penalty=0.1), [1], (0,)).edits_logits
    state = SamplingState(SamplingParams(min_tokens=1), [1], (0,))
    assert state.edits_logits
    state.append(5)
    assert not state.edits_logits


def test_penalties_count_output_tokens_only_however_many():
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(0, 500, 50).tolist(), rng.integers(0, 500, 700).tolist()
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, max_tokens=None)
    state = SamplingState(params, prompt, ())
    for token_id in output:
        state.append(token_id)
    logits = np.zeros(500, np.float32)
    state.edit_logits(logits)
    counts = np.bincount(output, minlength=500)
    assert np.array_equal(logits, (-0.5 * (counts > 0) - 0.25 * counts).astype(np.float32))


def test_the_repetition_penalty_weakens_prompt_and_output_tokens_of_either_sign():
    state = SamplingState(SamplingParams(repetition_penalty=2.0), [0, 1, 1], ())
    state.append(2)
    logits = np.array([4.0, -4.0, 1.0, 5.0, -np.inf], np.float32)
    state.edit_logits(logits)
    assert logits.tolist() == [2.0, -8.0, 0.5, 5.0, -np.inf]
