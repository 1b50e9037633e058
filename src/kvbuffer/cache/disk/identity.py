"""What makes two models' caches interchangeable, as a short text."""

from __future__ import annotations

import sys
from hashlib import blake2b
from pathlib import Path

from kvbuffer.cache.transfer import Caches, block_layout

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def fingerprint(model: Path, caches: Caches, layer_groups: str = "") -> str:
    """Return the identity of a checkpoint together with the layout of the blocks, 32 hexadecimal digits.

    Times of change are part of it beside :func:`checkpoint_id`: time alone would not do, as packages and images may set
    all times to the same.

    Args:
        model: folder of a checkpoint.
        caches: memory of its layers: dtypes, kinds of layers and sizes of blocks.
        layer_groups: identity of the plan by which layers are computed at once: it changes what they remember.

    Raises:
        OSError: the checkpoint cannot be read.
    """
    times = [path.stat().st_mtime_ns for path in sorted(model.glob("*.safetensors"))]
    text = f"{sys.byteorder} {block_layout(caches)} {checkpoint_id(model)} {times} {layer_groups}"
    return blake2b(text.encode(), digest_size=16).hexdigest()


def checkpoint_id(model: Path) -> str:
    """Return the identity of a checkpoint wherever it lies, 32 hexadecimal digits.

    The weights are not read in full, which can take minutes. Their names, sizes and 64 samples of each file (its
    safetensors head is in the first) stand for them.

    Args:
        model: folder of a checkpoint.

    Raises:
        OSError: the checkpoint cannot be read.
    """
    digest = blake2b(digest_size=16)
    digest.update((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb", buffering=0) as file:
            for offset in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
