"""Suffix decoding: drafts from the request's own text and from what was served before."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.request import Request, RequestOptions
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState
from kvbuffer.engine.speculative.drafter import Committed, Draft
from kvbuffer.engine.speculative.suffix import History, SuffixDrafter
from kvbuffer.engine.speculative.suffix_automaton import NO_MATCH
from tests.engine.speculative.test_verification import PROMPTS, greedy, run
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.plans import sized_engine

PARAMS = SamplingParams()


def request(prompt: list[int], output: list[int] | None = None, name: str = "r", salt: str | None = None) -> Request:
    state, detokenizer = SamplingState(PARAMS, [], []), IncrementalDetokenizer(None, PARAMS)  # type: ignore[arg-type]
    options = RequestOptions(cache_salt=salt)
    return Request(name, PARAMS, prompt + (output or []), len(prompt), 100, state, detokenizer, options)


def drafter(
    max_context: int = 8, max_spec_factor: float = 4.0, min_token_prob: float = 0.1, max_cached_tokens: int = 400
) -> SuffixDrafter:
    return SuffixDrafter(max_context, max_spec_factor, min_token_prob, max_cached_tokens)


def served(suffix: SuffixDrafter, output: list[int], salt: str | None = None) -> None:
    """Let a request run and end."""
    ended = request([90], output, "served", salt)
    suffix.propose([ended], [1])
    suffix.forget(ended, True)


def test_what_followed_the_last_tokens_before_is_proposed() -> None:
    assert drafter().propose([request([1, 2, 3, 4, 5, 9, 1, 2])], [3]) == [Draft([3, 4, 5])]


def test_nothing_is_proposed_after_a_token_that_is_new() -> None:
    assert drafter().propose([request([1, 2, 3])], [3]) == [Draft([])]


def test_the_longest_match_wins_over_more_frequent_ones() -> None:
    assert drafter().propose([request([7, 1, 2, 3, 8, 1, 2, 4, 8, 1, 2, 4, 7, 1, 2])], [1]) == [Draft([3])]


def test_a_period_goes_on() -> None:
    assert drafter().propose([request([5, 5, 5])], [4]) == [Draft([5, 5, 5, 5])]


#: After 1 came 2 in two cases of three, and then 3 in one of two.
BRANCHING = [1, 2, 3, 9, 1, 5, 8, 1, 2, 4, 7, 1]


@pytest.mark.parametrize(
    ("min_token_prob", "proposed"),
    [(0.7, Draft([])), (0.6, Draft([2])), (0.3, Draft([2, 5, 3, 4, 8], [-1, -1, 0, 0, 1]))],
)
def test_rare_continuations_are_left_out(min_token_prob: float, proposed: Draft) -> None:
    assert drafter(min_token_prob=min_token_prob, max_spec_factor=5.0).propose([request(BRANCHING)], [5]) == [proposed]


@pytest.mark.parametrize(
    ("limit", "proposed"), [(1, Draft([2])), (2, Draft([2, 5], [-1, -1])), (3, Draft([2, 5, 3], [-1, -1, 0]))]
)
def test_the_likeliest_tokens_share_the_budget(limit: int, proposed: Draft) -> None:
    """5 is as likely as 3 or 4 behind 2; of equals the one that was found first is proposed."""
    assert drafter().propose([request(BRANCHING)], [limit]) == [proposed]


def test_where_the_path_is_likelier_than_a_branch_the_draft_is_a_chain() -> None:
    text = [*[1, 2, 3, 4] * 4, 1, 5, 1, 2, 3, 4, 1]
    assert drafter().propose([request(text, [2])], [3]) == [Draft([3, 4, 1])]


@pytest.mark.parametrize(("factor", "proposed"), [(0.5, 1), (1.0, 2), (2.0, 4)])
def test_a_longer_match_lets_more_be_proposed(factor: float, proposed: int) -> None:
    (draft,) = drafter(max_spec_factor=factor).propose([request([1, 2, 3, 4, 5, 6, 7, 8, 1, 2])], [10])
    assert draft == Draft([3, 4, 5, 6][:proposed])


def test_a_request_goes_on_and_others_do_not_matter() -> None:
    suffix, one, other = drafter(), request([1, 2, 3, 1], name="one"), request([1, 5, 6, 1], name="other")
    assert suffix.propose([one, other], [1, 2]) == [Draft([2]), Draft([5, 6])]
    one.token_ids += [5, 1]
    assert suffix.propose([other, one], [1, 1]) == [Draft([5]), Draft([2])]


def test_a_prompt_is_read_as_it_is_computed() -> None:
    suffix, one = drafter(), request([1, 2, 3, 4, 1, 2])
    one.num_prefill_tokens = 6
    for begin in (0, 3):
        suffix.observe([Committed(one, begin, [0, 1, 2])], None)
        assert suffix._texts["r"].own.num_tokens == begin + 3
    assert suffix.propose([one], [2]) == [Draft([3, 4])]


def test_outputs_of_earlier_requests_are_followed_prompts_are_not() -> None:
    suffix = drafter()
    served(suffix, [1, 2, 3, 4])
    assert suffix.propose([request([8, 1, 2])], [3]) == [Draft([3, 4])]
    assert suffix.propose([request([8, 90], name="other")], [3]) == [Draft([])]


def test_a_draft_does_not_run_into_the_next_text() -> None:
    suffix = drafter()
    served(suffix, [1, 2, 3])
    served(suffix, [7, 8])
    assert suffix.propose([request([1, 2])], [5]) == [Draft([3])]


def test_history_that_grows_while_a_request_runs() -> None:
    suffix, one = drafter(), request([1, 2])
    assert suffix.propose([one], [2]) == [Draft([])]
    served(suffix, [1, 2, 3, 4, 5])
    one.token_ids.append(3)
    assert suffix.propose([one], [2]) == [Draft([4, 5])]


def test_the_more_probable_of_own_text_and_history_counts() -> None:
    suffix = drafter(max_spec_factor=1.0)
    served(suffix, [4, 1, 2, 7, 8])
    assert suffix.propose([request([1, 2, 3, 9, 4, 1, 2])], [3]) == [Draft([7, 8])]


@pytest.mark.parametrize(("salt", "proposed"), [("mine", [3]), ("yours", []), (None, [])])
def test_only_history_of_the_same_salt_is_seen(salt: str | None, proposed: list[int]) -> None:
    suffix = drafter()
    served(suffix, [1, 2, 3], salt="mine")
    assert suffix.propose([request([1, 2], salt=salt)], [1]) == [Draft(proposed)]


@pytest.mark.parametrize("buffer_len", [4, 16])
def test_the_model_says_what_it_says_without(tiny: Path, buffer_len: int) -> None:
    """Repetitive prompts in a ragged batch, twice: the second time there is history."""
    texts = [list(range(n, n + 9)) * 4 for n in (5, 20, 40)] + [[7], [9] * 33]
    plain = run(sized_engine(tiny, max_model_len=160, buffer_len=buffer_len), texts, greedy(40)).tokens
    config = {"method": "suffix", "num_speculative_tokens": 8, "adaptive": False}
    options = {"slots": 16, "pages": 128, "max_model_len": 160, "buffer_len": buffer_len}
    engine = sized_engine(tiny, speculative_config=config, **options)
    assert run(engine, texts, greedy(40)).tokens == plain
    stats = engine.stats.speculative
    drafted, accepted = stats.num_draft_tokens, stats.num_accepted_tokens
    assert accepted < drafted
    assert run(engine, texts, greedy(40)).tokens == plain
    assert stats.num_accepted_tokens - accepted > 100


@pytest.mark.parametrize("buffer_len", [1, 3, 16])
def test_the_model_says_what_it_says_without_trees(tiny: Path, buffer_len: int) -> None:
    """What was said before went on otherwise at every fifth place or so: drafts branch there, across all borders."""
    plain = run(sized_engine(tiny, max_model_len=160, buffer_len=buffer_len), PROMPTS, greedy()).tokens
    config = {"method": "suffix", "num_speculative_tokens": 12, "adaptive": False, "suffix_decoding_max_spec_factor": 4}
    options = {"slots": 16, "pages": 128, "max_model_len": 160, "buffer_len": buffer_len}
    engine = sized_engine(tiny, speculative_config=config, **options)
    suffix, random, drafts = engine._speculator.drafter, Random(0), []
    for output in 4 * list(plain.values()):
        said = [token if random.random() < 0.8 else random.randrange(VOCAB_SIZE) for token in output]
        suffix.history.add(said, None)
    propose = suffix.propose
    suffix.propose = lambda *args: drafts.extend(propose(*args)) or drafts[-len(args[0]) :]
    assert run(engine, PROMPTS, greedy()).tokens == plain
    trees = [draft for draft in drafts if draft.parents is not None]
    assert max(draft.depth for draft in trees) > 3
    stats = engine.stats.speculative
    assert stats.num_accepted_tokens > len(trees) > 20


def test_a_request_that_is_forgotten_before_its_first_draft_leaves_nothing() -> None:
    suffix = drafter()
    suffix.forget(request([1], [2, 3]), True)
    assert suffix.history.num_tokens == 0


def test_the_oldest_history_is_dropped() -> None:
    history = History(max_context=4, max_tokens=40)
    for text in range(100):
        history.add([text] * 4, "salt" if text % 3 else None)
        assert history.num_tokens <= 40
        assert history.num_tokens == sum(v.num_tokens for s in ("salt", None) for v in history.volumes(s))
    kept = {token for volume in history.volumes("salt") for token in volume.followers(volume.step(NO_MATCH, 98))}
    assert 98 in kept


def test_of_a_long_output_the_end_is_kept() -> None:
    history = History(max_context=4, max_tokens=40)
    history.add(list(range(100)), None)
    (volume,) = history.volumes(None)
    assert (history.num_tokens, volume.num_tokens) == (10, 10)
    assert volume.followers(volume.step(NO_MATCH, 98)) == {99: 1}


def test_no_history_is_kept_where_none_is_wanted() -> None:
    history = History(max_context=4, max_tokens=0)
    history.add([1, 2], None)
    assert history.num_tokens == 0
