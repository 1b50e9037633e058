"""Hugging Face folder -> GGUF, run inside llama.cpp's environment.

llama.cpp's converter recognises a tokenizer by a hash of its behaviour and refuses unknown ones. Ours is trained
locally, so that single look-up is answered here; everything else is the converter as it is.

    python convert_gguf.py LLAMA_CPP_SOURCES HF_FOLDER OUT.gguf bf16|f32|q8_0
"""

import runpy
import sys
from pathlib import Path

sources, folder, out, outtype = sys.argv[1:5]
sys.path[:0] = [sources, str(Path(sources) / "gguf-py")]

from conversion import base  # noqa: E402  (needs the path above)

for owner in vars(base).values():
    if isinstance(owner, type) and "get_vocab_base_pre" in vars(owner):
        owner.get_vocab_base_pre = lambda self, tokenizer: "qwen2"

converter = str(Path(sources) / "convert_hf_to_gguf.py")
sys.argv = [converter, folder, "--outfile", out, "--outtype", outtype, "--no-mtp"]
runpy.run_path(converter, run_name="__main__")
