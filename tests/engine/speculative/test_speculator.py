"""What a drafter gets to see."""

from __future__ import annotations

from pathlib import Path

import torch

from kvbuffer import SamplingParams
from kvbuffer.engine.request import Request
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.drafters import OracleDrafter, fixed_length, sometimes, use_drafter
from tests.support.plans import drain, sized_engine

PROMPTS = [[5, 6, 7], list(range(3, 103)), list(range(40, 100))]


class Watcher(OracleDrafter):
    """Checks that every token of a request is reported once, in order, with the hidden state that predicts the next."""

    needs_hidden = True

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.lm_head = None
        self.seen: dict[Request, int] = {}
        self.forgotten: list[Request] = []
        self.num_checked = 0

    def observe(self, committed, hidden) -> None:
        assert hidden.dtype == torch.float32
        for request, begin, rows in committed:
            assert begin == self.seen.get(request, 0)
            assert request.row is not None
            self.seen[request] = begin + len(rows)
            # The last token that was sampled is still to be computed.
            assert self.seen[request] == request.num_computed_tokens or request.is_prefilling
            predicted = self.lm_head(hidden[rows]).argmax(-1).tolist()
            for place, token in enumerate(predicted, begin + 1):
                if place >= request.num_prompt_tokens:
                    assert request.token_ids[place] == token
                    self.num_checked += 1

    def forget(self, request, publish) -> None:
        assert publish
        self.forgotten.append(request)


def test_a_drafter_sees_every_token_that_counts_with_its_hidden_state(tiny: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    outputs = {}
    for prompt in PROMPTS:
        plain = sized_engine(tiny, max_model_len=160)
        plain.add_request("r", prompt, params)
        outputs[tuple(prompt)] = drain(plain).tokens["r"]
    engine = sized_engine(tiny, max_model_len=160, speculative_config=fixed_length(4), enable_prefix_caching=False)
    drafter = Watcher(outputs, sometimes(0.6), VOCAB_SIZE)
    drafter.lm_head = engine._model.lm_head
    use_drafter(engine, drafter)
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), prompt, params)
    assert list(drain(engine).tokens.values()) == list(outputs.values())
    assert drafter.num_checked == 30 * len(PROMPTS)
    assert len(drafter.forgotten) == len(PROMPTS)
