"""Sampling: the plain definition, written out below in float64 with a full sort, and what callers rely on.

The sampler looks at a few large logits first; vocabularies and spreads here are chosen so that the first
look, the second and the full sort all decide some of the draws.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from kvbuffer.engine.sampler import InvalidLogits, Logits, SampledToken, sample_row
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState

EOS = 3


def state_of(params, prompt=(), output=(), eos=(EOS,)):
    state = SamplingState(params, list(prompt), frozenset(eos))
    for token_id in output:
        state.append(token_id)
    return state


def sample(logits, states):
    step = Logits(logits)
    return [sample_row(step, row, state) for row, state in enumerate(states)]


def sample_ids(logits, states):
    results = sample(logits, states)
    assert all(isinstance(result, SampledToken) for result in results)
    return [result.token_id for result in results]


def edited(row, params, prompt, output):
    """Penalties, then bias, then the min_tokens mask: [V] float32, one token at a time."""
    row = row.copy()
    for token_id in set(prompt) | set(output):
        factor = np.float32(params.repetition_penalty)
        row[token_id] = row[token_id] / factor if row[token_id] > 0 else row[token_id] * factor
    for token_id in set(output):
        row[token_id] -= np.float32(params.presence_penalty)
        row[token_id] -= np.float32(params.frequency_penalty) * np.float32(output.count(token_id))
    for token_id, bias in (params.logit_bias or {}).items():
        row[token_id] += np.float32(bias)
    if len(output) < params.min_tokens:
        row[[*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]] = -np.inf
    return row


def distribution(row, params):
    """Token ids from most to least likely, and the probability that each is sampled: [V] int64, float64."""
    order = np.lexsort((np.arange(row.size), -row))
    logits = row[order].astype(np.float64)
    if params.greedy:
        return order, np.eye(1, row.size)[0]
    probs = np.exp((logits - logits[0]) / params.temperature)
    probs[probs < params.min_p * probs[0]] = 0.0
    if params.top_k:
        probs[params.top_k :] = 0.0
    probs /= probs.sum()
    if params.top_p < 1.0:
        mass_before = np.cumsum(probs) - probs
        probs[mass_before >= params.top_p] = 0.0
        probs /= probs.sum()
    return order, probs


def expected_id(row, params, prompt, output, uniform):
    order, probs = distribution(edited(row, params, prompt, output), params)
    return int(order[np.searchsorted(np.cumsum(probs), uniform, side="right")])


PARAMS = {
    "default": {},
    "cold": {"temperature": 0.2},
    "hot": {"temperature": 5.0},
    "top_p": {"temperature": 0.7, "top_p": 0.95},
    "top_p small": {"top_p": 0.3},
    "top_k": {"top_k": 20},
    "top_k beyond the first look": {"top_k": 900},
    "top_k beyond the vocabulary": {"top_k": 10**6},
    "top_k and top_p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "min_p": {"min_p": 0.05},
    "min_p tiny": {"min_p": 1e-9, "temperature": 2.0},
    "everything": {"temperature": 1.3, "min_p": 0.001, "top_k": 300, "top_p": 0.8},
    "greedy": {"temperature": 0.0},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.7},
    "penalties, greedy": {"temperature": 0.0, "repetition_penalty": 0.7, "frequency_penalty": 1.5},
    "bias": {"logit_bias": {7: 4.0, 9: -100.0}, "top_p": 0.9},
    "min_tokens": {"min_tokens": 10, "stop_token_ids": [5, 6]},
}


@pytest.mark.parametrize("kwargs", PARAMS.values(), ids=PARAMS.keys())
def test_every_draw_is_that_of_the_plain_definition(kwargs):
    rng = np.random.default_rng(len(str(kwargs)))
    for vocab_size, spread in itertools.product((10, 3000, 40_000), (0.1, 3.0)):
        logits = torch.from_numpy(rng.normal(0, spread, (4, vocab_size)).astype(np.float32))
        prompts = rng.integers(0, vocab_size, (4, 30)).tolist()
        outputs = [rng.integers(0, min(vocab_size, 12), n).tolist() for n in (0, 1, 9, 70)]
        params = [SamplingParams(**kwargs, seed=int(rng.integers(2**63)), max_tokens=None) for _ in range(4)]
        states = [state_of(*parts) for parts in zip(params, prompts, outputs, strict=True)]
        expected = [
            expected_id(row, state.params, prompt, output, state.uniform(len(output)))
            for row, state, prompt, output in zip(logits.numpy(), states, prompts, outputs, strict=True)
        ]
        assert sample_ids(logits, states) == expected


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.9}],
    ids=str,
)
def test_samples_follow_the_distribution(kwargs):
    row = np.random.default_rng(1).normal(0, 1.5, 12).astype(np.float32)
    order, probs = distribution(row, SamplingParams(**kwargs))
    num_draws = 4000
    state = state_of(SamplingParams(**kwargs, seed=5, max_tokens=None))
    counts = np.zeros(12)
    for _ in range(num_draws):
        (token_id,) = sample_ids(torch.from_numpy(row)[None], [state])
        counts[token_id] += 1
        state.append(token_id)
    counts = counts[order]
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    chi_square = float(np.sum((counts[kept] - num_draws * probs[kept]) ** 2 / (num_draws * probs[kept])))
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_a_row_does_not_depend_on_its_batch_or_the_number_of_threads():
    logits = torch.randn(12, 50_000, generator=torch.Generator().manual_seed(0)) * 2
    kinds = [{}, {"top_p": 0.9}, {"top_k": 30, "logprobs": 3}, {"temperature": 0.0, "frequency_penalty": 1.0}]
    states = [state_of(SamplingParams(**kinds[i % 4], seed=i), [1, 2], [i, 4]) for i in range(12)]
    together = sample(logits, states)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [sample(logits[i : i + 1], [states[i]])[0] for i in range(12)]
    torch.set_num_threads(num_threads)
    backwards = sample(logits.flip(0), states[::-1])[::-1]
    assert together == alone == backwards


def test_a_seed_reproduces_the_tokens_and_no_seed_does_not():
    logits = torch.zeros(1, 1000)

    def tokens(params):
        state, ids = state_of(params), []
        for _ in range(20):
            ids += sample_ids(logits, [state])
            state.append(ids[-1])
        return ids

    assert tokens(SamplingParams(seed=7)) == tokens(SamplingParams(seed=7))
    assert tokens(SamplingParams(seed=7)) != tokens(SamplingParams(seed=-7))
    assert tokens(SamplingParams()) != tokens(SamplingParams())


def test_a_seed_gives_the_same_tokens_in_every_release():
    state = state_of(SamplingParams(seed=2024, max_tokens=None))
    ids = []
    for _ in range(6):
        ids += sample_ids(torch.zeros(1, 100), [state])
        state.append(ids[-1])
    assert ids == [75, 65, 83, 82, 51, 75]


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sample_ids(torch.zeros(1, 1000), [state_of(SamplingParams())])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample_ids(logits, [state_of(SamplingParams(temperature=0.0))] * 2) == [1, 0]


@pytest.mark.parametrize("kwargs", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}], ids=str)
def test_the_tightest_filters_keep_one_token(kwargs):
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(3))
    state = state_of(SamplingParams(**kwargs, temperature=10.0, max_tokens=None))
    for _ in range(50):
        assert sample_ids(logits, [state]) == [int(logits.argmax())]
        state.append(0)


def kept_ids(row, **kwargs):
    """The ids that 300 draws can give."""
    state = state_of(SamplingParams(**kwargs, seed=0, max_tokens=None))
    seen = set()
    for _ in range(300):
        (token_id,) = sample_ids(torch.tensor([row]), [state])
        seen.add(token_id)
        state.append(token_id)
    return seen


def test_equal_logits_are_cut_in_order_of_id():
    assert kept_ids([1.0] * 10, top_k=3) == {0, 1, 2}
    assert kept_ids([1.0] * 10, top_p=0.45) == {0, 1, 2, 3, 4}
    assert kept_ids([1.0] * 10, min_p=1.0) == set(range(10))
    assert kept_ids([0.0, 1.0] * 5, top_k=6) == {1, 3, 5, 7, 9, 0}


def test_top_p_measures_what_top_k_left():
    # Probabilities 0.4, 0.3, 0.2, 0.1; of the first two the first holds 57 %.
    row = np.log([0.4, 0.3, 0.2, 0.1]).astype(np.float32).tolist()
    assert kept_ids(row, top_p=0.5) == {0, 1}
    assert kept_ids(row, top_p=0.5, top_k=2) == {0}


def test_tokens_with_infinitely_low_logits_are_never_sampled():
    ninf = -math.inf
    assert kept_ids([ninf, 1.0, ninf, 1.0, ninf], temperature=100.0) == {1, 3}
    assert kept_ids([ninf, 1.0, ninf, 1.0, ninf], top_k=4) == {1, 3}
    assert kept_ids([0.0, -3e38, 0.0], temperature=1e300) == {0, 1, 2}
    assert kept_ids([ninf, 0.0, 0.0], temperature=1e300) == {1, 2}
    assert kept_ids([3e38, -3e38, 3e38], temperature=2e-5) == {0, 2}


@pytest.mark.filterwarnings("error")
def test_extreme_penalties_end_in_a_token_or_a_report():
    row = torch.tensor([[20.0, 0.0, -1.0, -math.inf]])
    huge = SamplingParams(temperature=0.0, repetition_penalty=1e300)
    assert sample_ids(row, [state_of(huge, prompt=[0, 1, 2, 3])]) == [0]
    tiny = SamplingParams(repetition_penalty=1e-300)
    (result,) = sample(row, [state_of(tiny, prompt=[0, 1, 2, 3])])
    assert isinstance(result, InvalidLogits)


def test_logit_bias_forces_and_bans():
    row = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    best = int(row.argmax())
    for temperature in (0.0, 1.0):
        forced = SamplingParams(temperature=temperature, logit_bias={42: 100})
        assert sample_ids(row, [state_of(forced)]) == [42]
        banned = SamplingParams(temperature=temperature, logit_bias={best: -100})
        assert sample_ids(row, [state_of(banned)])[0] != best


def test_end_of_sequence_and_stop_tokens_wait_for_min_tokens():
    row = torch.zeros(1, 10)
    row[0, [EOS, 5]] = torch.tensor([9.0, 8.0])
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[5])
    assert sample_ids(row, [state_of(params, output=[1])]) == [0]
    assert sample_ids(row, [state_of(params, output=[1, 1])]) == [EOS]
    ignoring = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=[5], ignore_eos=True)
    assert sample_ids(row, [state_of(ignoring, output=[1])]) == [EOS]


@pytest.mark.parametrize("kwargs", [{"temperature": 0.0}, {}, {"logit_bias": {1: -100.0}}, {"logprobs": 2}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_row_is_reported_and_the_others_are_served(kwargs, value):
    logits = torch.zeros(3, 300)
    logits[1, 200] = value
    logits[:, 7] = 60.0
    first, broken, last = sample(logits, [state_of(SamplingParams(**kwargs)) for _ in range(3)])
    assert isinstance(broken, InvalidLogits)
    assert "NaN or infinity" in broken.reason
    assert (first.token_id, last.token_id) == (7, 7)


def test_a_row_without_a_possible_token_is_reported():
    (result,) = sample(torch.full((1, 5), -math.inf), [state_of(SamplingParams())])
    assert isinstance(result, InvalidLogits)
    masked = SamplingParams(min_tokens=1, stop_token_ids=[0, 1])
    (result,) = sample(torch.zeros(1, 2), [state_of(masked)])
    assert isinstance(result, InvalidLogits)
    assert "min_tokens" in result.reason


def test_logprobs_are_those_of_the_model_before_any_change():
    logits = torch.randn(8, 5000, generator=torch.Generator().manual_seed(2)) * 3
    kwargs = {"temperature": 0.3, "top_k": 40, "logit_bias": {9: 100.0}, "repetition_penalty": 3.0}
    states = [state_of(SamplingParams(**kwargs, logprobs=i), [1, 2, 3]) for i in range(8)]
    exact = torch.log_softmax(logits.double(), dim=-1)
    for i, result in enumerate(sample(logits, states)):
        order = np.lexsort((np.arange(5000), -logits[i].double().numpy()))
        found = result.logprob
        assert (result.token_id, found.token_id) == (9, 9)
        assert found.logprob == pytest.approx(float(exact[i, 9]), abs=1e-5)
        assert order[found.rank - 1] == 9
        assert [token_id for token_id, _ in found.top] == order[:i].tolist()
        assert [p for _, p in found.top] == pytest.approx(exact[i, order[:i].copy()].tolist(), abs=1e-5)


def test_no_logprobs_unless_asked():
    (result,) = sample(torch.zeros(1, 5), [state_of(SamplingParams())])
    assert result.logprob is None


def test_sampling_changes_neither_logits_nor_states():
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    params = SamplingParams(logit_bias={1: 5.0}, presence_penalty=1.0, min_tokens=3, seed=1, logprobs=2)
    states = [state_of(params, [1], [2]) for _ in range(2)]
    assert sample(logits, states) == sample(logits, states)
    assert torch.equal(logits, before)
    assert states[0].num_output_tokens == 1
