"""The multi-token-prediction head: many drafts at every place at once are what drafting one by one gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvbuffer import LLM, SamplingParams
from kvbuffer.errors import ConfigError, ModelError
from kvbuffer.train import mtp
from kvbuffer.train.checkpoints import read_checkpoint
from kvbuffer.train.model import build
from kvbuffer.train.mtp import MtpHead, MtpOptions, train_mtp
from kvbuffer.train.optim import descend
from kvbuffer.train.run import run
from tests.support.checkpoints import VOCAB_SIZE
from tests.support.training import config_of, scattered, tiny_options


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
@torch.no_grad()
def test_passes_over_all_places_are_drafts_one_after_the_other(name: str) -> None:
    torch.manual_seed(0)
    model = scattered(build(config_of(name), seed=0).eval())
    head = MtpHead(model)
    tokens = torch.randint(VOCAB_SIZE, (1, 12))
    states = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    embedded = model.get_input_embeddings()(tokens[:, 1:])
    rotary = model.model.rotary_emb(states, torch.arange(11)[None])
    past, passes, hidden = DynamicCache(), [], states
    for _ in range(3):
        passes.append(head(embedded, hidden, rotary, past))
        hidden = passes[-1].roll(1, 1)
    for start in range(8):
        seen = states[:, : start + 1]
        for n in range(3):
            place = seen.shape[1] - 1
            at = slice(place + 1)
            out = head(embedded[:, at], seen, (rotary[0][:, at], rotary[1][:, at]), DynamicCache())[:, -1]
            torch.testing.assert_close(passes[n][:, place], out, rtol=1e-4, atol=1e-4)
            seen = torch.cat((seen, out[:, None]), 1)


def test_it_learns_to_draft_and_is_served(data: Path, tmp_path: Path) -> None:
    options = tiny_options(data, tmp_path / "run", "qwen3_next", method="scratch", steps=60)
    run(options, show_progress=False)
    source, out = options.out / "model", tmp_path / "with-head"
    short = MtpOptions(steps=1, batch_size=4, seq_len=32, lr=1e-2, eval_sequences=8)
    untrained = train_mtp(source, data, tmp_path / "untrained", short)
    shares = train_mtp(source, data, out, replace(short, steps=60))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > max(0.5, untrained[0])
    before, after = read_checkpoint(source).parameters, read_checkpoint(out).parameters
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    params = SamplingParams(max_tokens=24, temperature=0)
    texts = []
    for speculation in (None, {"method": "mtp", "num_speculative_tokens": 3}):
        llm = LLM(str(out), memory=32 << 20, show_progress=False, speculative_config=speculation)
        texts.append(llm.generate(["astate"], params, use_tqdm=False)[0].outputs[0].token_ids)
    assert texts[0] == texts[1]


def test_what_cannot_have_a_head_is_named(data: Path, tmp_path: Path) -> None:
    run(tiny_options(data, tmp_path / "run", "llama", method="scratch", steps=1), show_progress=False)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no multi-token-prediction head"):
        train_mtp(tmp_path / "run" / "model", data, tmp_path / "out", MtpOptions())
    with pytest.raises(ConfigError, match="exists already"):
        train_mtp(tmp_path / "run" / "model", data, tmp_path, MtpOptions())
    with pytest.raises(ConfigError, match="drafts"):
        train_mtp(tmp_path / "run" / "model", data, tmp_path / "out", MtpOptions(drafts=0))


def test_cut_off_it_goes_on_and_ends_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny_options(data, tmp_path / "run", "qwen3_next", method="scratch", steps=1), show_progress=False)
    source, out = tmp_path / "run" / "model", tmp_path / "cut-off"
    options = MtpOptions(steps=7, batch_size=2, seq_len=16, save_every=2, eval_sequences=4)
    whole = train_mtp(source, data, tmp_path / "whole", options)
    with monkeypatch.context() as patch:
        steps = iter(range(5))
        patch.setattr(mtp, "descend", lambda *args: (next(steps), descend(*args)))
        with pytest.raises(StopIteration):
            train_mtp(source, data, out, options)
    assert not out.exists()
    with pytest.raises(ConfigError, match="steps was 7, is 8; remove it to start over"):
        train_mtp(source, data, out, replace(options, steps=8))
    assert train_mtp(source, data, out, options) == whole
    expected, parameters = read_checkpoint(tmp_path / "whole").parameters, read_checkpoint(out).parameters
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut-off", "run", "whole"]
