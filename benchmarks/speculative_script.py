"""What engines are made to say, and the drafter that knows it.

The weights of the benchmark checkpoints are random, so what they say is laid down: every token is sampled as usual, and
then replaced by the next one of a given text. The drafters see real texts that way, and do or do not find what is
repeated in them. An oracle, whose guesses are right with a given probability each, stands for drafters of any quality.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from random import Random
from unittest import mock

from checkpoints import checkpoint
from kvbuffer import SamplingParams
from kvbuffer.engine import output
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import Draft, Drafter
from speculative_texts import Script

PROMPT_LEN, OUTPUT_LEN, NUM_DRAFTS = 192, 96, 8
#: What each request is going to say, by its sampling state.
SCRIPTS: dict[int, list[int]] = {}
_sample_row = output.sample_row


def laid_down() -> AbstractContextManager:
    """Let requests of :class:`Run` say their texts, while this is entered."""
    return mock.patch.object(output, "sample_row", _scripted)


def _scripted(logits, row, state):
    """Sample as usual, then say what is laid down."""
    sampled = _sample_row(logits, row, state)
    return sampled._replace(token_id=SCRIPTS[id(state)][state.num_output_tokens])


def make_engine(model: str, speculative_config: dict | None) -> Engine:
    """Return an engine for one of the benchmark checkpoints."""
    return Engine.from_config(EngineConfig(
        str(checkpoint(model)), max_model_len=512, max_num_seqs=32, memory=768 << 20, enable_prefix_caching=False,
        show_progress=False, speculative_config=speculative_config,
    ))  # fmt: skip


class Oracle(Drafter):
    """Knows the text, and gets each token right with a given probability.

    Args:
        acceptance: that probability.
        most: tokens of a draft at most.
    """

    def __init__(self, acceptance: float, most: int = NUM_DRAFTS) -> None:
        self.acceptance, self.most, self.random = acceptance, most, Random(0)

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Guess the next tokens."""
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            done = request.num_output_tokens
            guesses = SCRIPTS[id(request.sampling)][done : done + min(limit, self.most)]
            drafts.append(Draft([g if self.random.random() < self.acceptance else g ^ 1 for g in guesses]))
        return drafts


class Run:
    """Texts being said by an engine, all at once.

    Attributes:
        tokens: generated since all prompts had been computed.
        seconds: that took.
        ended: whether one of the texts has been said.
    """

    def __init__(self, engine: Engine, texts: Sequence[Script]) -> None:
        self.engine, self.names = engine, [str(number) for number in range(len(texts))]
        self.tokens, self.seconds, self.ended = 0, 0.0, False
        for name, (prompt, said) in zip(self.names, texts, strict=True):
            engine.add_request(name, prompt, SamplingParams(temperature=0.0, max_tokens=len(said), ignore_eos=True))
            SCRIPTS[id(engine._requests[name].sampling)] = said
        while engine.stats.num_waiting or any(request.is_prefilling for request in engine._scheduler.running):
            engine.step()

    def step(self) -> None:
        """Let each text go on."""
        began = time.perf_counter()
        deltas = self.engine.step()
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(delta.token_ids) for delta in deltas)
        self.ended |= any(delta.finish_reason is not None for delta in deltas)

    def end(self) -> None:
        """Forget the texts."""
        for name in self.names:
            self.engine.abort_request(name)
