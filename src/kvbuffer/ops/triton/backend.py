"""The linear-attention operators on the Triton kernels of this package: every family, dtype and shape, on GPUs."""

from __future__ import annotations

from importlib.util import find_spec

from kvbuffer.ops import dispatch

if find_spec("triton") is not None:
    from kvbuffer.ops.triton.chunked import chunked_prefill
    from kvbuffer.ops.triton.decode import buffered_decode
    from kvbuffer.ops.triton.fold import fold_records
    from kvbuffer.ops.triton.recurrent import recurrent_decode
    from kvbuffer.ops.triton.verify import buffered_verify

__all__ = ["buffered_decode", "buffered_verify", "chunked_prefill", "fold_records", "recurrent_decode", "supports"]

_MAX_DIM = 256


def supports(call: dispatch.Call) -> tuple[bool, str]:
    """Return whether the kernels cover a call, and if not, why."""
    if find_spec("triton") is None:
        return False, "triton is not installed"
    if max(call.key_dim, call.value_dim) > _MAX_DIM:
        return False, f"a head of {call.key_dim} x {call.value_dim} is larger than {_MAX_DIM}"
    return True, ""
