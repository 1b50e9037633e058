"""Sampling with drafts: the distribution is the model's, and every seed's text is the one obtained without drafts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvbuffer import SamplingParams
from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.output import extend_output
from kvbuffer.engine.request import Request
from kvbuffer.engine.sampler import Logits
from kvbuffer.engine.sampling_state import SamplingState
from kvbuffer.engine.speculative.drafter import Draft
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.drafters import OracleDrafter, fixed_length, sometimes, use_drafter
from tests.support.plans import drain, sized_engine

SMALL = 6
#: Draws per test, and the chi-square statistic that 30 degrees of freedom exceed once in 10,000 times.
DRAWS, LIMIT = 40_000, 68.0


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(97 + token) for token in ids)

    def whole_text(self, token_id: int, skip_special_tokens: bool) -> str:
        return chr(97 + token_id)


@pytest.fixture(scope="module")
def model() -> torch.Tensor:
    """Logits [last token, next token]."""
    return torch.randn(SMALL, SMALL, generator=torch.Generator().manual_seed(7))


def count_pairs(model: torch.Tensor, drafts: list[Draft]) -> np.ndarray:
    """How often each token followed each other one in a long text, drafts being those of the last token."""
    params = SamplingParams(temperature=0.8, seed=5, ignore_eos=True)
    state, detokenizer = SamplingState(params, [0], []), IncrementalDetokenizer(Letters(), params)
    request = Request("r", params, [0], 1, 2 * DRAWS, state, detokenizer)
    while request.num_output_tokens < DRAWS:
        last = request.token_ids[-1]
        extend_output(request, Logits(model[[last, *drafts[last].token_ids]]), 0, drafts[last], [])
    counts = np.zeros((SMALL, SMALL))
    np.add.at(counts, (request.token_ids[:-1], request.token_ids[1:]), 1)
    return counts


def chi_square(counts: np.ndarray, model: torch.Tensor) -> float:
    expected = (model.double() / 0.8).softmax(-1).numpy() * counts.sum(1, keepdims=True)
    return float(((counts - expected) ** 2 / expected).sum())


def chains(order: list[list[int]]) -> list[Draft]:
    """Chains of three that follow the first entry of each token's row."""
    return [Draft([a := order[last][0], b := order[a][0], order[b][0]]) for last in range(SMALL)]


DRAFTS = {
    "likely chains": lambda model: chains(model.argsort(descending=True).tolist()),
    "unlikely chains": lambda model: chains(model.argsort().tolist()),
    "trees": lambda _: [Draft([2, 4, 0, 1, 2, 5], [-1, -1, 0, 0, 1, -1])] * SMALL,
}


class TestDistribution:
    @pytest.mark.parametrize("kind", DRAFTS)
    def test_drafts_do_not_change_it(self, model: torch.Tensor, kind: str) -> None:
        assert chi_square(count_pairs(model, DRAFTS[kind](model)), model) < LIMIT

    def test_a_bias_of_one_per_cent_would_be_seen(self, model: torch.Tensor) -> None:
        """As that of a sampler which takes an unlikely draft in one of a hundred cases whatever the model says."""
        biased = 0.99 * (model.double() / 0.8).softmax(-1).numpy()
        for row, draft in zip(biased, DRAFTS["unlikely chains"](model), strict=True):
            row[draft.token_ids[0]] += 0.01
        rng = np.random.default_rng(1)
        counts = np.stack([rng.multinomial(DRAWS // SMALL, row / row.sum()) for row in biased])
        assert chi_square(counts, model) > LIMIT


PARAMS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    {"temperature": 1.5, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    {"temperature": 1.0, "logit_bias": {17: 4.0, 99: -100.0}, "logprobs": 3},
    {"temperature": 0.0, "frequency_penalty": 1.5, "logprobs": 0},
    {"temperature": 1.0, "min_tokens": 20, "stop_token_ids": list(range(3, 300)), "ignore_eos": False},
]


@pytest.mark.parametrize("options", PARAMS)
def test_a_seed_gives_the_same_text_with_and_without_drafts(tiny: Path, options: dict[str, Any]) -> None:
    prompts = [[5, 6, 7], list(range(3, 40)), list(range(40, 120))]

    def run(drafter: OracleDrafter | None) -> tuple[dict[str, list[int]], dict[str, list[Any]]]:
        speculative = None if drafter is None else fixed_length(4)
        engine = sized_engine(tiny, max_model_len=160, speculative_config=speculative)
        if drafter is not None:
            use_drafter(engine, drafter)
        for number, prompt in enumerate(prompts):
            params = SamplingParams(**{"max_tokens": 30, "seed": number, "ignore_eos": True, **options})
            engine.add_request(str(number), prompt, params)
        logprobs: dict[str, list[Any]] = {}
        tokens: dict[str, list[int]] = {}
        while engine.has_work():
            for delta in engine.step():
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                logprobs.setdefault(delta.request_id, []).extend(delta.logprobs or [])
        drain(engine)
        if drafter is not None:
            assert engine.stats.speculative.num_accepted_tokens > 0
        return tokens, logprobs

    tokens, logprobs = run(None)
    outputs = {tuple(prompt): [*tokens[str(number)], *[1] * 8] for number, prompt in enumerate(prompts)}
    with_drafts, their_logprobs = run(OracleDrafter(outputs, sometimes(0.7), VOCAB_SIZE))
    assert with_drafts == tokens
    for request_id, entries in logprobs.items():
        assert len(entries) == (len(tokens[request_id]) if "logprobs" in options else 0)
        for entry, other in zip(entries, their_logprobs[request_id], strict=True):
            assert (entry.token_id, entry.rank) == (other.token_id, other.rank)
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [token for token, _ in entry.top] == [token for token, _ in other.top]


def test_choices_of_one_prompt_differ_and_are_each_reproducible(tiny: Path) -> None:
    def run(**options: Any) -> list[list[int]]:
        engine = sized_engine(tiny, max_model_len=160, **options)
        params = SamplingParams(temperature=1.0, seed=3, n=4, max_tokens=20, ignore_eos=True)
        for index in range(4):
            engine.add_request(str(index), [1, 2, 3, 1, 2, 3, 1, 2], params.for_choice(index))
        return list(drain(engine).tokens.values())

    choices = run(speculative_config=fixed_length(3))
    assert choices == run()
    assert all(first != second for first, second in pairwise(choices))
