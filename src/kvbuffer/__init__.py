"""kvbuffer: serve linear-attention language models with KV buffers."""

__version__ = "0.1.0"
