"""Triton's kernels run interpreted, on the CPU; Triton reads this when it is first imported, by whichever test."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
