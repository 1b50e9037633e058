"""Measures the demo model, or another: bits per byte on pages that it was not trained on, and answers to questions.

    python scripts/demo_report.py [--model src/kvbuffer/demo_model] --texts texts

Beside the model's bits per byte stand those of `xz -9` and, with `pip install pyppmd`, of PPMd (variant H, order 8),
each after reading --texts, the corpus of demo_texts.py. Questions are those of demo_questions.txt (or of
demo_questions_new.txt, written after all texts that the model learned from), a chat per line with its turns separated
by `||`, answered greedily; whether the answers are right is for people to say.
"""

import argparse
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_corpus import UNSEEN_FOLDERS, fetch_docs, pages
from kvbuffer import LLM, SamplingParams

CONTEXT = 1024
"""Tokens that the model sees at once."""
BYTES_PER_PAGE = 20_000


@torch.inference_mode()
def model_bits(folder: Path, texts: list[str]) -> float:
    """Bits per byte; the first token of each context, which nothing stands before, costs as much as any token may."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bits = 0.0
    for text in texts:
        for ids in torch.tensor(tokenizer.encode(text)).split(CONTEXT):
            logits = model(input_ids=ids[None, :-1]).logits[0] if len(ids) > 1 else torch.empty(0, len(tokenizer))
            bits += float(F.cross_entropy(logits, ids[1:], reduction="sum")) / math.log(2) + math.log2(len(tokenizer))
    return bits / sum(len(text.encode()) for text in texts)


def compressor_bits(compress: Callable[[bytes], bytes], known: bytes, texts: list[str]) -> float:
    """Bits per byte that texts add to what is known."""
    new = "".join(texts).encode()
    return 8 * (len(compress(known + new)) - len(compress(known))) / len(new)


def answer(folder: Path, chats: list[list[str]]) -> list[list[str]]:
    """The answers to each chat's questions."""
    llm, params = LLM(str(folder), max_model_len=CONTEXT), SamplingParams(temperature=0, max_tokens=120)
    messages: list[list[dict[str, str]]] = [[] for _ in chats]
    for turn in range(max(map(len, chats))):
        live = [i for i, chat in enumerate(chats) if turn < len(chat)]
        for i in live:
            messages[i].append({"role": "user", "content": chats[i][turn]})
        for i, output in zip(live, llm.chat([messages[i] for i in live], params, use_tqdm=False), strict=True):
            messages[i].append({"role": "assistant", "content": output.outputs[0].text})
    return [[message["content"] for message in chat[1::2]] for chat in messages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("src/kvbuffer/demo_model"))
    parser.add_argument("--texts", type=Path, help="what the compressors read first; without it they are left out")
    parser.add_argument("--questions", type=Path, default=Path(__file__).parent / "demo_questions.txt")
    parser.add_argument("--docs", type=Path, help="the documentation's _sources folder, instead of Debian's package")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/kvbuffer-demo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    docs = options.docs or fetch_docs(options.cache)
    if docs is None:
        parser.error("no documentation found; give its _sources folder as --docs")
    unseen = [text.encode()[:BYTES_PER_PAGE].decode(errors="ignore") for text in pages(docs, UNSEEN_FOLDERS)]
    print(f"{sum(len(text.encode()) for text in unseen):,} bytes of {len(unseen)} pages, bits per byte")
    print(f"  model   {model_bits(options.model, unseen):.3f}")
    if options.texts is not None:
        known = b"\n".join(path.read_bytes() for path in sorted(options.texts.iterdir()))
        print(f"  xz -9   {compressor_bits(lambda data: lzma.compress(data, preset=9), known, unseen):.3f}")
        try:
            import pyppmd
        except ImportError:
            print("  PPMd    (pip install pyppmd)")
        else:
            ppmd = compressor_bits(lambda data: pyppmd.compress(data, max_order=8, mem_size=1 << 29), known, unseen)
            print(f"  PPMd    {ppmd:.3f}")
    lines = options.questions.read_text(encoding="utf-8").splitlines()
    chats = [line.split(" || ") for line in lines]
    for chat, answers in zip(chats, answer(options.model, chats), strict=True):
        print()
        for question, said in zip(chat, answers, strict=True):
            print(f"Q: {question}\nA: {said}")


if __name__ == "__main__":
    main()
