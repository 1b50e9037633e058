"""Requests come, step and go at random on very little memory; each greedy output is the one obtained alone.

Prompts share beginnings, prefixes are kept under several salts and evicted at any moment, and free memory is NaN.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from kvbuffer import SamplingParams
from kvbuffer.cache.pools import POOL_KINDS, PoolKind
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import RequestOptions
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.drafters import OracleDrafter, TreeDrafter, fixed_length, sometimes, use_drafter
from tests.support.plans import Outputs, check_idle, drain, poison_free, sized_engine

MAX_LEN = 96
OUTPUT_LEN = 24
PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (1, 2, 15, 16, 17, 33, 63, 64, 65, 72)
]
PROMPTS += [PROMPTS[-1][:shared] + PROMPTS[5][:own] for shared, own in ((3, 9), (15, 2), (16, 20), (48, 12), (70, 1))]


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    engine = sized_engine(tiny, max_model_len=MAX_LEN, enable_prefix_caching=False)
    outputs = []
    for prompt in PROMPTS:
        engine.add_request("r", prompt, params(OUTPUT_LEN))
        outputs.append(drain(engine).tokens["r"])
    return outputs


@pytest.mark.parametrize(
    ("num_drafts", "drafter", "disk"),
    [(0, OracleDrafter, False), (4, OracleDrafter, False), (7, TreeDrafter, False), (0, OracleDrafter, True)],
)
def test_any_order_of_events_gives_the_outputs_obtained_alone(
    tiny: Path, tmp_path: Path, expected: list[list[int]], num_drafts: int, drafter: type[OracleDrafter], disk: bool
) -> None:
    """With ``disk``, evicted prefixes and preempted requests are saved to files, and restored from them."""
    options: dict[str, Any] = {} if not num_drafts else {"speculative_config": fixed_length(num_drafts)}
    options |= {"cache_dir": tmp_path} if disk else {}
    engine = sized_engine(tiny, slots=4, pages=9, max_model_len=MAX_LEN, buffer_len=3, tokens=64, **options)
    if disk:
        engine._offload.tier.cheaper_to_load = lambda *_: True  # type: ignore[union-attr,method-assign]
    outputs = {tuple(prompt): output for prompt, output in zip(PROMPTS, expected, strict=True)}

    class Machine(EngineMachine):
        def __init__(self) -> None:
            super().__init__(engine, expected)
            if num_drafts:
                use_drafter(engine, drafter(outputs, sometimes(0.7), VOCAB_SIZE))

    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=50, deadline=None))
    assert engine.stats.num_preemptions > 0
    if num_drafts:
        assert engine.stats.speculative.num_draft_tokens > engine.stats.speculative.num_accepted_tokens > 0
    assert engine._memory.prefixes.counters.hits > 0
    if disk:
        assert engine.stats.disk is not None
        assert engine.stats.disk.loaded > 0
    engine.close()


class EngineMachine(RuleBasedStateMachine):
    """Adds, steps, aborts, evicts, saves and restores; the model is the table of outputs obtained alone."""

    def __init__(self, engine: Engine, expected: list[list[int]]) -> None:
        super().__init__()
        engine.reset_prefix_cache()  # examples do not depend on each other
        self.engine, self.expected = engine, expected
        self.outputs = Outputs()
        self.live: dict[str, list[int]] = {}
        self.count = 0

    @rule(
        which=st.integers(0, len(PROMPTS) - 1),
        max_tokens=st.integers(1, OUTPUT_LEN),
        salt=st.sampled_from([None, None, None, "a", "b"]),
    )
    def add(self, which: int, max_tokens: int, salt: str | None) -> None:
        request_id = str(self.count)
        self.count += 1
        self.engine.add_request(request_id, PROMPTS[which], params(max_tokens), RequestOptions(cache_salt=salt))
        self.live[request_id] = self.expected[which][:max_tokens]

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            poison_free(self.engine)
            deltas = self.engine.step()
            self.outputs.add(deltas)
            assert deltas or not self.engine.has_work() or self.engine.stats.num_running
            for delta in deltas:
                if delta.finish_reason is not None:
                    assert self.outputs.tokens[delta.request_id] == self.live.pop(delta.request_id)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.live:
            request_id = data.draw(st.sampled_from(sorted(self.live)))
            self.engine.abort_request(request_id)
            del self.live[request_id]

    @rule(kind=st.sampled_from(POOL_KINDS), count=st.integers(1, 4))
    def evict(self, kind: PoolKind, count: int) -> None:
        prefixes = self.engine._memory.prefixes
        assert prefixes is not None
        evictable = prefixes.num_evictable(kind)
        assert prefixes.evict(kind, count) >= min(count, evictable)

    @rule()
    def forget_all_prefixes(self) -> None:
        self.engine.reset_prefix_cache()

    @precondition(lambda self: self.engine._offload is not None)
    @rule()
    def save_everything(self) -> None:
        """Everything that can be is evicted, and written; requests to come restore it."""
        self.engine._memory.prefixes.evict("attention_pages", 99)
        self.engine._offload.tier.flush()

    @invariant()
    def memory_is_sound(self) -> None:
        self.engine.check_integrity()
        assert self.engine.stats.num_running + self.engine.stats.num_waiting == len(self.live)

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work():
                break
            self.step(1)
        assert not self.live
        check_idle(self.engine)
