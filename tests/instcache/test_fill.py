"""Filling: the store holds what the engine answers, whatever interrupted the work, and again when anything changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import CompletionDelta
from kvbuffer.errors import StoreError
from kvbuffer.instcache.fill import Filler
from kvbuffer.instcache.identity import Identity, conversation
from kvbuffer.instcache.store import Store
from tests.support.caching import greedy
from tests.support.checkpoints import make_checkpoint
from tests.support.plans import check_idle, drain, sized_engine

TEXTS = [f"the state of {letter} " for letter in "abcdefghijklmnop"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = ["linear_attention", "full_attention"]
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_5", num_hidden_layers=2, layer_types=layers)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return sized_engine(folder, slots=32, pages=200)


@pytest.fixture
def filler(folder: Path, engine: Engine) -> Filler:
    return Filler(engine, Identity.of(folder, engine.tokenizer), "tiny", max_tokens=12)


def expected(engine: Engine, text: str, system_prompt: str | None = None, max_tokens: int = 12) -> list[int]:
    prompt = engine.tokenizer.apply_chat_template(conversation(text.strip(), system_prompt))
    params = dataclasses.replace(greedy(max_tokens), ignore_eos=False)
    engine.add_request("alone", prompt, params)
    return drain(engine).tokens["alone"]


def note_added(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    added: list[str] = []
    add = engine.add_request

    def counting(request_id: str, *args: object) -> None:
        added.append(request_id)
        add(request_id, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "add_request", counting)
    return added


def test_the_store_holds_what_the_engine_answers(tmp_path: Path, filler: Filler) -> None:
    progress = []
    count = filler.fill(tmp_path / "s", [*TEXTS, TEXTS[0].strip(), "  "], lambda *done: progress.append(done))
    assert count == len(TEXTS)
    assert progress[0] == (0, len(TEXTS))
    assert progress[-1] == (len(TEXTS), len(TEXTS))
    check_idle(filler.engine)
    store = Store(tmp_path / "s")
    store.check_identity(filler.identity)
    for text in TEXTS:
        answer = store.get(text)
        assert answer is not None
        assert answer.token_ids == expected(filler.engine, text)
        assert answer.ended == (answer.token_ids[-1] in filler.engine.eos_token_ids)
        assert answer.ended or len(answer.token_ids) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, filler: Filler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbuffer.instcache.fill._BATCH", 4)
    added, step = note_added(filler.engine, monkeypatch), filler.engine.step
    finished = 0

    def dying() -> list[CompletionDelta]:
        nonlocal finished
        if finished >= 8:
            raise KeyboardInterrupt
        deltas = step()
        finished += sum(delta.finish_reason is not None for delta in deltas)
        return deltas

    monkeypatch.setattr(filler.engine, "step", dying)
    monkeypatch.setattr(filler.engine, "config", dataclasses.replace(filler.engine.config, max_num_seqs=2))
    with pytest.raises(KeyboardInterrupt):
        filler.fill(tmp_path / "s", TEXTS)
    assert not (tmp_path / "s").exists()
    check_idle(filler.engine)
    monkeypatch.setattr(filler.engine, "step", step)
    added.clear()
    assert filler.fill(tmp_path / "s", TEXTS) == len(TEXTS)
    assert 0 < len(added) <= len(TEXTS) - 8
    store = Store(tmp_path / "s")
    assert [store.get(text).token_ids for text in TEXTS] == [expected(filler.engine, text) for text in TEXTS]  # type: ignore[union-attr]


def test_only_what_changed_is_answered_again(tmp_path: Path, filler: Filler, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s"
    filler.fill(path, TEXTS[:4])
    added = note_added(filler.engine, monkeypatch)
    filler.fill(path, TEXTS[1:6])
    assert len(added) == 2
    added.clear()
    other = dataclasses.replace(filler.identity, model="another revision")
    assert dataclasses.replace(filler, identity=other).fill(path, TEXTS[1:6]) == 5
    assert len(added) == 5
    with pytest.raises(StoreError, match="another model"):
        Store(path).check_identity(filler.identity)


def test_answers_that_were_cut_are_answered_again_when_they_may_be_longer(tmp_path: Path, filler: Filler) -> None:
    path = tmp_path / "s"
    dataclasses.replace(filler, max_tokens=3).fill(path, TEXTS)
    filler.fill(path, TEXTS)
    store = Store(path)
    assert [store.get(text).token_ids for text in TEXTS] == [expected(filler.engine, text) for text in TEXTS]  # type: ignore[union-attr]


def test_the_system_prompt_is_part_of_prompt_and_identity(tmp_path: Path, folder: Path, engine: Engine) -> None:
    identity = Identity.of(folder, engine.tokenizer, "the key")
    Filler(engine, identity, "tiny", "the key", max_tokens=12).fill(tmp_path / "s", TEXTS[:2])
    store = Store(tmp_path / "s")
    assert store.get(TEXTS[0]).token_ids == expected(engine, TEXTS[0], "the key")  # type: ignore[union-attr]
    assert store.header.identity.differences(Identity.of(folder, engine.tokenizer)) == ["template", "system prompt"]


def test_the_identity_follows_weights_templates_and_settings(tmp_path: Path, folder: Path, engine: Engine) -> None:
    base = Identity.of(folder, engine.tokenizer)
    assert Identity.of(folder, engine.tokenizer) == base
    custom = Identity.of(folder, engine.tokenizer, chat_template="{{ messages[0].content }}")
    assert custom.differences(base) == ["template"]
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert Identity.of(copy, engine.tokenizer) == base
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert Identity.of(copy, engine.tokenizer).differences(base) == ["model"]


def test_instructions_too_long_for_the_context_are_left_out(tmp_path: Path, filler: Filler) -> None:
    assert filler.fill(tmp_path / "s", ["a b c d e f g h " * 40, TEXTS[0]]) == 1
