"""The examples and the snippets of the documentation run as they are, and the tests that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(script: str) -> str:
    """Return what a script prints, run as a user would."""
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_custom_layer_decodes_as_its_recurrence() -> None:
    said = run("examples/custom_layer.py")
    error = re.search(r"relative error against the recurrence: (\S+)", said)
    assert error is not None, said
    assert float(error[1]) < 1e-6


def test_offline_completion() -> None:
    said = run("examples/offline.py")
    assert len(re.findall(r"^['\"].+['\"] -> ['\"].+['\"]$", said, re.MULTILINE)) == 3, said


def test_the_snippets_on_operators_run_in_order() -> None:
    snippets = re.findall(r"^```python\n(.+?)^```", (ROOT / "docs/operators.md").read_text(), re.MULTILINE | re.DOTALL)
    assert snippets
    exec("\n".join(snippets), {})


def test_the_tests_that_the_page_on_operators_names_exist() -> None:
    named = re.findall(r"`(test_\w+)\.py::(\w+)`", (ROOT / "docs/operators.md").read_text())
    assert named
    for file, test in named:
        source = (ROOT / "tests" / "ops" / f"{file}.py").read_text()
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}.py::{test}"
