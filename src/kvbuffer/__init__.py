"""kvbuffer: serve linear-attention language models with KV buffers.

``from kvbuffer import LLM, SamplingParams`` is the offline interface; ``kvbuffer serve MODEL`` the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbuffer.engine.sampling_params import SamplingParams
    from kvbuffer.engine.structured_outputs import StructuredOutputsParams
    from kvbuffer.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutputsParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing PyTorch and transformers takes seconds that `kvbuffer --help` does not have.
    if name == "LLM":
        from kvbuffer.llm import LLM

        return LLM
    if name == "SamplingParams":
        from kvbuffer.engine.sampling_params import SamplingParams

        return SamplingParams
    if name == "StructuredOutputsParams":
        from kvbuffer.engine.structured_outputs import StructuredOutputsParams

        return StructuredOutputsParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
