"""Decoding in one call: for every architecture the bits of its layers called one by one, logits and memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvbuffer import LLM, SamplingParams
from kvbuffer.engine.forms import FormPolicy
from kvbuffer.models.decoder import Decoder
from kvbuffer.ops import dispatch
from tests.support.checkpoints import CHECKPOINTS, VOCAB_SIZE, make_checkpoint

pytestmark = pytest.mark.skipif(dispatch.cpu_kernels() is None, reason="there is one call only with the kernels")

PROMPT_LENGTHS = (1, 5, 40, 130)
NEW_TOKENS = 24


def decode(path: Path, dtype: str) -> tuple[list[Tensor], int]:
    """Return the logits of every step, and how many steps decoded in one call."""
    llm = LLM(str(path), dtype=dtype, memory=64 << 20, show_progress=False, buffer_len=4)
    model, logits = llm.engine._runner.model, []
    forward = model.forward
    model.forward = lambda *args: logits.append(forward(*args)) or logits[-1]  # type: ignore[method-assign]
    calls = 0
    decode_on = model._decode_on

    def counted(caches):  # type: ignore[no-untyped-def]
        nonlocal calls
        blocks = decode_on(caches)
        calls += blocks is not None
        return blocks

    model._decode_on = counted  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
    # Requests end one after the other, so that batches of every size are seen.
    params = [SamplingParams(temperature=0, max_tokens=NEW_TOKENS - n, ignore_eos=True) for n in range(len(prompts))]
    llm.generate(prompts, params, use_tqdm=False)
    return logits, calls


@pytest.mark.parametrize("form", ["recurrent", "buffered"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_one_call_gives_the_bits_of_the_layers(
    name: str, dtype: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "recurrent":
        monkeypatch.setattr(FormPolicy, "buffer_len", lambda self, batch: 0)
    path = make_checkpoint(tmp_path, name)
    at_once, calls = decode(path, dtype)
    assert calls >= NEW_TOKENS // 3  # where some have no state yet, a step decodes in two forms
    monkeypatch.setattr(Decoder, "_decode_on", lambda self, caches: None)
    one_by_one, calls = decode(path, dtype)
    assert calls == 0
    for step, other in zip(at_once, one_by_one, strict=True):
        assert torch.equal(step, other)
