"""The operators in plain PyTorch: every family, dtype and shape; what runs when no faster backend covers a call."""

from kvbuffer.ops.portable.buffered import buffered_decode, buffered_verify, fold_records, recurrent_decode
from kvbuffer.ops.portable.chunked import chunked_prefill

__all__ = ["buffered_decode", "buffered_verify", "chunked_prefill", "fold_records", "recurrent_decode"]
