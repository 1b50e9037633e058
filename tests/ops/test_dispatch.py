"""The choice of a backend: the first that covers a call, portable PyTorch for the rest, and the reason for it."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from torch import Generator

from kvbuffer.ops import dispatch, portable
from kvbuffer.ops.buffered import recurrent_decode
from kvbuffer.ops.rule import FAMILIES, GATED_DELTANET, GLA, KDA, UpdateRule
from tests.support.operators import Pool, make_tokens

FORMS = ["recurrent", "prefill", "decode", "verify", "fold"]


@pytest.fixture(autouse=True)
def only_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A backend that covers Gated DeltaNet, with a kernel for decoding and a verification that it leaves to others."""
    backend = ModuleType("kvbuffer.ops.fast.backend")

    def supports(call: dispatch.Call) -> tuple[bool, str]:
        return call.rule == GATED_DELTANET, f"no kernel for {call.rule.name}"

    for name in ("recurrent_decode", "chunked_prefill", "buffered_decode", "fold_records"):
        setattr(backend, name, lambda *arguments, name=name: name)
    backend.supports = supports  # type: ignore[attr-defined]
    backend.buffered_verify = portable.buffered_verify  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    monkeypatch.setattr(dispatch, "_BACKENDS", {"cpu": (backend.__name__,)})
    dispatch._choose.cache_clear()
    dispatch._log_fallback.cache_clear()
    return backend


def decode(rng: Generator, rule: UpdateRule, width: int = 16) -> torch.Tensor:
    pool = Pool(rule, 1, 1, 2, 16, width, 1, 16, rng)
    return recurrent_decode(rule, make_tokens(rng, rule, 1, 1, 2, 16, width), pool.states, pool.slots)


def test_the_first_backend_that_covers_a_call_runs_it(rng: Generator, only_backend: ModuleType) -> None:
    assert decode(rng, GATED_DELTANET) == "recurrent_decode"
    assert isinstance(decode(rng, KDA), torch.Tensor)


def test_each_kind_of_fall_back_is_logged_once(rng: Generator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kvbuffer.ops.dispatch"):
        for _ in range(3):
            decode(rng, KDA)
            decode(rng, GLA)
            decode(rng, GLA, width=32)
            decode(rng, GATED_DELTANET)
    messages = [record.message for record in caplog.records]
    assert len(messages) == len(set(messages)) == 3
    assert "no kernel for kda" in messages[0]


def test_the_table_names_the_backend_of_every_family_and_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    header, *rows = dispatch.explain_operators().splitlines()
    assert header.split()[2:8] == ["cpu", *FORMS]
    assert [row.split()[0] for row in rows] == list(FAMILIES)
    table = {row.split()[0]: row.split(maxsplit=6)[1:] for row in rows}
    assert table["gated_deltanet"] == ["fast", "fast", "fast", "portable", "fast", "no fast kernel for verify"]
    assert table["kda"] == ["portable"] * 5 + ["no kernel for kda"]


def test_a_machine_with_a_gpu_has_a_second_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lines = dispatch.explain_operators().splitlines()
    assert [line.split()[2] for line in lines if line.startswith("operators on")] == ["cpu", "cuda"]
    assert lines[-1].endswith("no kernels for cuda")


def test_the_columns_line_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    header, *rows = dispatch.explain_operators().splitlines()
    for row in rows:
        for form in FORMS:
            assert row[header.index(form) - 1] == " " != row[header.index(form)]
