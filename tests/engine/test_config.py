"""Options that cannot be served are refused, with what to do instead."""

from __future__ import annotations

import pytest

from kvbuffer.engine.config import EngineConfig
from kvbuffer.errors import ConfigError


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
def test_fp8_states_are_refused_in_favour_of_int8(name: str) -> None:
    with pytest.raises(ConfigError, match=r"int8 is as small, and its error 2 to 4 times smaller .*: use int8"):
        EngineConfig("demo", state_dtype=name)


def test_other_names_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="state_dtype must be auto, float32 or bfloat16 or int8, got 'int4'"):
        EngineConfig("demo", state_dtype="int4")
