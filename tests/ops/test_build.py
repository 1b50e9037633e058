"""Compiling the kernels: once, for this machine, and never a reason not to start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kvbuffer.ops import dispatch
from kvbuffer.ops.cpu import build


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVBUFFER_CACHE_DIR", str(tmp_path))
    return tmp_path


def fresh_library() -> build.CpuLibrary:
    return build.library.__wrapped__()


def test_the_kernels_build_wherever_there_is_a_compiler() -> None:
    """Tests of the kernels are skipped without them; this one fails instead when it is the sources that are broken."""
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    if os.environ.get("KVBUFFER_DISABLE_CPU_KERNELS") == "1":
        pytest.skip("the kernels are off on purpose")
    lib, detail = build.library()
    assert lib is not None, detail


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    lib, detail = fresh_library()
    assert lib is None
    assert "no C++ compiler" in detail
    assert "install g++" in detail


def test_named_compiler_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    lib, detail = fresh_library()
    assert lib is None
    assert "no-such-compiler" in detail


def test_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho it broke >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    lib, detail = fresh_library()
    assert lib is None
    assert "it broke" in detail


def test_disabled_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUFFER_DISABLE_CPU_KERNELS", "1")
    assert fresh_library().lib is None


def test_the_absence_is_logged_once_and_explained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "library", lambda: build.CpuLibrary(None, "no compiler here"))
    choose = dispatch.cpu_kernels.__wrapped__
    assert choose() is None
    assert "no compiler here" in caplog.text
    assert dispatch.explain() == "portable PyTorch: no compiler here"
