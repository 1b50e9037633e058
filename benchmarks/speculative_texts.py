"""Texts to speculate on, as (prompt, output) in tokens: edited code, summaries with quotes, prose."""

from __future__ import annotations

import keyword
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

from kvbuffer.tokenizer import Tokenizer

Script = tuple[list[int], list[int]]

_DOCS = Path(__file__).parent.parent / "docs"


@cache
def _functions() -> list[str]:
    """Stretches of the standard library's sources, from one definition on."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]
    found = (re.search(r"^(?:def|class) .*", source, re.MULTILINE) for source in sources)
    return [source[match.start() :][:2400] for source, match in zip(sources, found, strict=True) if match]


@cache
def _prose() -> list[str]:
    """Stretches of this project's documentation."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(_DOCS.glob("*.md")))
    paragraphs = [p for p in text.split("\n\n") if p[:1].isalpha() and len(p) > 120]
    return ["\n\n".join(paragraphs[i : i + 8]) for i in range(0, len(paragraphs) - 8)]


def edited_code(number: int) -> tuple[str, str]:
    """A stretch of code, and the same with its most frequent name replaced."""
    sources = _functions()
    code = sources[number % len(sources)]
    names = Counter(name for name in re.findall(r"\b[a-z_]{4,}\b", code[:400]) if not keyword.iskeyword(name))
    name = names.most_common(1)[0][0]
    edited = re.sub(rf"\b{name}\b", f"new_{name}", code)
    return f"Rename {name} to new_{name} in this code.\n\n{code}\n\n", edited


def quoting_summary(number: int) -> tuple[str, str]:
    """Prose, and a text that quotes every other sentence of it."""
    texts = _prose()
    text = texts[3 * number % len(texts)]
    sentences = re.split(r"(?<=[.:]) ", text)
    openings = ("It begins with this: ", "Further on we read: ", "A point worth noting is ", "In its own words, ")
    quotes = [f'{openings[i % len(openings)]}"{sentence}" ' for i, sentence in enumerate(sentences[::2])]
    return f"Summarise, with quotes.\n\n{text}\n\n", "".join(quotes)


def prose(number: int) -> tuple[str, str]:
    """The beginning of a text, and how it goes on."""
    texts = _prose()
    text = texts[3 * number % len(texts)]
    return text[: len(text) // 2], text[len(text) // 2 :]


TEXTS: dict[str, Callable[[int], tuple[str, str]]] = {
    "editing code": edited_code,
    "summary with quotes": quoting_summary,
    "prose": prose,
}


def scripts(kind: str, count: int, tokenizer: Tokenizer, prompt_len: int, output_len: int) -> list[Script]:
    """Return ``count`` different texts of a kind, cut to ``prompt_len`` and ``output_len`` tokens."""
    chosen: list[Script] = []
    number = 0
    while len(chosen) < count:
        prompt, output = (tokenizer.encode(text) for text in TEXTS[kind](number))
        if len(output) >= output_len:
            chosen.append((prompt[:prompt_len], output[:output_len]))
        number += 1
    return chosen
