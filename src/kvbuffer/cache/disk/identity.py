"""What makes two models' caches interchangeable, as a short text."""

from __future__ import annotations

import sys
from hashlib import blake2b
from pathlib import Path

from kvbuffer.cache.transfer import Caches, block_layout

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def fingerprint(model: Path, caches: Caches) -> str:
    """Return the identity of a checkpoint together with the layout of the blocks, 32 hexadecimal digits.

    The weights are not read in full, which can take minutes. Their names, sizes, times of change, and 64 samples of
    each file (its safetensors head is in the first) stand for them: time alone would not do, as packages and images may
    set all times to the same.

    Args:
        model: folder of a checkpoint.
        caches: memory of its layers: dtypes, kinds of layers and sizes of blocks.

    Raises:
        OSError: the checkpoint cannot be read.
    """
    digest = blake2b(digest_size=16)
    digest.update(f"{sys.byteorder} {block_layout(caches)}".encode())
    digest.update((model / "config.json").read_bytes())
    for path in sorted(model.glob("*.safetensors")):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}".encode())
        with path.open("rb", buffering=0) as file:
            for offset in range(0, status.st_size, max(_SAMPLE_BYTES, status.st_size // _SAMPLES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
