"""Engines whose free memory is NaN at every step, and the outputs that caching must not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvbuffer import SamplingParams
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import RequestOptions
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.plans import Outputs, check_idle, poison_free, sized_engine

MAX_LEN = 256
#: A difference where the two best logits are closer than this is rounding.
TIE = 1e-4
#: (buffer_len, kv_only_len); buffer length 0 is the recurrence.
FORMS = [(0, 0), (0, 24), (1, 0), (4, 24), (16, 0), (16, 24)]


def text(seed: int, length: int) -> list[int]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=rng).tolist()


def greedy(max_tokens: int, **options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **options})


def engine_with(folder: Path, form: tuple[int, int], **options) -> Engine:
    buffer_len, kv_only_len = form
    engine = sized_engine(
        folder, buffer_len=max(1, buffer_len), kv_only_len=kv_only_len, max_model_len=MAX_LEN, **options
    )
    if not buffer_len:
        engine._scheduler.forms.buffer_len = lambda batch: 0  # type: ignore[method-assign]
    return engine


def step(engine: Engine, outputs: Outputs) -> None:
    poison_free(engine)
    outputs.add(engine.step())


def drain(engine: Engine, outputs: Outputs | None = None, limit: int = 2000) -> Outputs:
    outputs = Outputs() if outputs is None else outputs
    for _ in range(limit):
        if not engine.has_work():
            check_idle(engine)
            return outputs
        step(engine, outputs)
    raise AssertionError("the engine is stuck")


def run(engine: Engine, prompt: list[int], params: SamplingParams, **options) -> tuple[list[int], int]:
    """Return the output of one request by itself, and how many tokens of its prompt were cached."""
    engine.add_request("r", prompt, params, RequestOptions(**options))
    outputs = drain(engine)
    return outputs.tokens["r"], outputs.last["r"].num_cached_tokens


class Cold:
    """Outputs without prefix caching, one request at a time, with the margins of their choices."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._known: dict[tuple[int, ...], tuple[list[int], list[float], Tensor]] = {}
        self._logits: list[Tensor] = []
        engine._model.forward = recorded(engine, self._logits)  # type: ignore[method-assign]

    def __call__(self, prompt: list[int], max_tokens: int) -> tuple[list[int], list[float], Tensor]:
        """Return the output, how far each token was ahead of the next best, and the logits of the first."""
        known = self._known.get(tuple(prompt))
        if known is None or len(known[0]) < max_tokens:
            self._logits.clear()
            self.engine.add_request("cold", prompt, greedy(max_tokens))
            while self.engine.has_work():
                self.engine.step()
            rows = torch.cat(self._logits)[:, :VOCAB_SIZE]
            best = rows.topk(2)
            margins = (best.values[:, 0] - best.values[:, 1]).tolist()
            known = self._known[tuple(prompt)] = best.indices[:, 0].tolist(), margins, rows[0]
        return known[0][:max_tokens], known[1], known[2]

    def check(self, prompt: list[int], output: list[int], max_tokens: int) -> None:
        """The output is the one without caching, up to a tie."""
        expected, margins, _ = self(prompt, max_tokens)
        differing = [i for i, (a, b) in enumerate(zip(output, expected, strict=True)) if a != b]
        assert not differing or margins[differing[0]] < TIE, (output, expected)


def recorded(engine: Engine, logits: list[Tensor]) -> Callable[..., Tensor]:
    """The model's forward, which also notes the logits of every step that has some."""
    forward = engine._model.forward

    def recording(inputs, caches) -> Tensor:
        result = forward(inputs, caches)
        if len(result):
            logits.append(result.clone())
        return result

    return recording
