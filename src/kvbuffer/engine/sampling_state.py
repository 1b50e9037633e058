"""What the sampler remembers of one request between steps."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from kvbuffer.engine.grammar import Grammar
from kvbuffer.engine.sampling_params import SamplingParams

#: Uniforms drawn from the Philox stream at a time; four come from one counter value.
_BLOCK = 64
_FLOAT32 = np.finfo(np.float32)


class SamplingState:
    """What sampling needs to know of one request. Created once per request, it outlives preemption.

    Attributes:
        params: the request's parameters; ``n`` is ignored.
        num_output_tokens: output tokens appended so far.
        grammar: the form of the output, None where it is free.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Collection[int],
        grammar: Grammar | None = None,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.num_output_tokens = 0
        self._seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        self._block_index = -1
        self._block: npt.NDArray[np.float64] = np.empty(0)
        bias = params.logit_bias or {}
        self._bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        ending = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        self._ending_ids = np.fromiter(ending, np.int64, len(ending))
        self._penalties: _Penalties | None = None
        if params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty:
            self._penalties = _Penalties(params, prompt_token_ids)

    def append(self, token_id: int) -> None:
        """Record that ``token_id`` became the next output token."""
        self.num_output_tokens += 1
        if self._penalties is not None:
            self._penalties.append(token_id)
        if self.grammar is not None:
            self.grammar.append(token_id)

    def uniform(self, position: int) -> float:
        """Return element ``position`` of the request's random stream, uniform in [0, 1)."""
        index, offset = divmod(position, _BLOCK)
        if index != self._block_index:
            stream = np.random.Philox(key=self._seed, counter=index * (_BLOCK // 4))
            self._block = np.ldexp((stream.random_raw(_BLOCK) >> np.uint64(11)).astype(np.float64), -53)
            self._block_index = index
        return float(self._block[offset])

    @property
    def edits_logits(self) -> bool:
        """Whether :meth:`edit_logits` would change anything at this point of the output."""
        return self._penalties is not None or self.grammar is not None or self._bias_ids.size > 0 or self._must_go_on

    @property
    def _must_go_on(self) -> bool:
        return self.num_output_tokens < self.params.min_tokens and self._ending_ids.size > 0

    def edit_logits(self, logits: npt.NDArray[np.float32]) -> None:
        """Apply penalties, logit bias and the masks of grammar and ``min_tokens`` to ``logits`` [V] in place."""
        if self._penalties is not None:
            self._penalties.apply(logits)
        logits[self._bias_ids] += self._bias
        if self._must_go_on:
            logits[self._ending_ids[self._ending_ids < logits.size]] = -np.inf
        if self.grammar is not None:
            self.grammar.mask(logits)


class _Penalties:
    """The distinct tokens of a prompt and its output, their counts in the output, and the penalties on them.

    Kept sparse: a step touches only the tokens seen, not the vocabulary.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._params = params
        self._ids = np.unique(np.asarray(prompt_token_ids, np.int64))
        self._num_seen = self._ids.size
        self._counts = np.zeros(self._num_seen, np.float32)
        self._slots = {int(token_id): slot for slot, token_id in enumerate(self._ids)}

    def append(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, self._num_seen)
        if slot == self._num_seen:
            if slot == self._ids.size:
                grown = max(64, 2 * slot)
                self._ids = np.resize(self._ids, grown)
                self._counts = np.resize(self._counts, grown)
            self._ids[slot] = token_id
            self._counts[slot] = 0.0
            self._num_seen += 1
        self._counts[slot] += 1.0

    def apply(self, logits: npt.NDArray[np.float32]) -> None:
        params = self._params
        ids, counts = self._ids[: self._num_seen], self._counts[: self._num_seen]
        values = logits[ids]
        factor = np.float32(np.clip(params.repetition_penalty, _FLOAT32.tiny, _FLOAT32.max))
        with np.errstate(over="ignore"):  # the sampler refuses a row whose maximum became infinite
            values = np.where(values > 0.0, values / factor, values * factor)
        values -= np.float32(params.presence_penalty) * (counts > 0.0)
        values -= np.float32(params.frequency_penalty) * counts
        logits[ids] = values
