"""Steps in one call: for every architecture and form the bits of all operators called one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvbuffer import LLM, SamplingParams
from kvbuffer.engine.forms import FormPolicy
from kvbuffer.models.decoder import Decoder
from kvbuffer.ops import dispatch
from kvbuffer.ops.gated_delta import GatedDeltaHeads
from tests.support.checkpoints import CHECKPOINTS, VOCAB_SIZE, make_checkpoint

pytestmark = pytest.mark.skipif(dispatch.cpu_kernels() is None, reason="there is one call only with the kernels")

PROMPT_LENGTHS = (1, 5, 40, 130)
NEW_TOKENS = 24


def decode(path: Path, dtype: str, drafts: bool) -> tuple[list[Tensor], int]:
    """Return the logits of every step, and how many steps were one call."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "adaptive": False}
    options = {"speculative_config": speculation} if drafts else {}
    llm = LLM(str(path), dtype=dtype, memory=64 << 20, show_progress=False, buffer_len=4, **options)
    model, logits, calls = llm.engine._runner.model, [], 0
    forward, at_once = model.forward, model._at_once
    model.forward = lambda *args: logits.append(forward(*args)) or logits[-1]  # type: ignore[method-assign]

    def counted(caches):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += at_once(caches) is not None
        return at_once(caches)

    model._at_once = counted  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    # Requests end one after the other, so that batches of every size are seen.
    params = [SamplingParams(temperature=0, max_tokens=NEW_TOKENS - n, ignore_eos=True) for n in range(len(prompts))]
    llm.generate(prompts, params, use_tqdm=False)
    return logits, calls


@pytest.mark.parametrize("form", ["recurrent", "buffered", "drafts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_call_gives_the_bits_of_the_layers(
    name: str, dtype: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "recurrent":
        monkeypatch.setattr(FormPolicy, "buffer_len", lambda self, batch: 0)
    path = make_checkpoint(tmp_path, name)
    at_once, calls = decode(path, dtype, form == "drafts")
    assert calls == len(at_once)
    monkeypatch.setattr(Decoder, "_at_once", lambda self, caches: None)
    monkeypatch.setattr(GatedDeltaHeads, "covers", lambda *args: False)
    one_by_one, calls = decode(path, dtype, form == "drafts")
    assert calls == 0
    for step, other in zip(at_once, one_by_one, strict=True):
        assert torch.equal(step, other)
