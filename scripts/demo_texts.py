"""Writes the demo model's corpus as a folder of texts, for `kvbuffer train prepare`.

    python scripts/demo_texts.py texts [--conversations 20000] [--documents 0.5]

Python's documentation and docstrings become one text file each, conversations a line of chats.jsonl each.
"""

import argparse
import json
import random
from pathlib import Path

from demo_chats import ChatSampler
from demo_corpus import fetch_docs, plain_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--dialogues", type=float, default=0.45, help="share of questions from demo_dialogues.md")
    parser.add_argument("--documents", type=float, default=1.0, help="share of the documents")
    parser.add_argument("--docs", type=Path, help="the documentation's _sources folder, instead of Debian's package")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/kvbuffer-demo")
    options = parser.parse_args()
    docs = options.docs or fetch_docs(options.cache)
    options.out.mkdir(parents=True)
    rng = random.Random(0)
    for number, text in enumerate(plain_text(docs)):
        if rng.random() < options.documents:
            (options.out / f"{number:05}.txt").write_text(text, encoding="utf-8")
    sampler = ChatSampler(docs, rng, options.dialogues)
    with (options.out / "chats.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(options.conversations):
            file.write(json.dumps({"messages": sampler.sample()}) + "\n")


if __name__ == "__main__":
    main()
