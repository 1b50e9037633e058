"""The training text of the demo model: Python's documentation, as plain text and as records of what it describes.

Sources, all under the Python Software Foundation License: the reStructuredText sources in Debian's `python3.11-doc`
package (fetched with `apt-get download`, or given as a folder), the docstrings of the standard library, and
`pydoc_data.topics`.
"""

import importlib
import inspect
import pydoc_data.topics
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "python3.11-doc"
FOLDERS = ("library", "tutorial", "faq", "reference", "howto")
UNSEEN_FOLDERS = ("whatsnew", "using", "extending", "installing", "distributing")
"""No model is trained on these: what it makes of them is measured."""
CORE_MODULES = ["builtins", "math", "os.path", "random", "itertools", "json", "time", "copy", "functools"]
"""The modules whose functions the model should know best, by their names in the documentation."""
# Words that begin a description and are not a verb that says what a function does.
NOT_VERBS = """
The This A An If In It Same Like When For Equivalent On At As These Those There Some All Any Each Its With Note
Is Deprecated Similar Alias One Two Base Class Abstract Called By To From Given After Before Only Every Most
True False None Not You Unlike Instances Objects Has Was Raised Synonym Does Always Sometimes Yes Thus Use Used
Default Common Context
"""
DIRECTIVE = re.compile(
    r"^( *)\.\. (?:py:)?(function|method|class|exception|decorator|classmethod|staticmethod|coroutinefunction"
    r"|module|currentmodule):: *(.+)$"
)


@dataclass(frozen=True)
class Record:
    """One documented object: what it is called, how it is called, what it does, and perhaps an example."""

    name: str
    signature: str
    kind: str
    text: str
    example: str = ""

    def predicate(self) -> str:
        """The text as the rest of a sentence that begins with the name: `Return x.` becomes `returns x.`"""
        first, _, rest = self.text.partition(" ")
        if first == "Raised":
            return f"is raised {rest}"
        if re.fullmatch(r"[A-Z][a-z]+[a-rt-z]s", first) and first not in NOT_VERBS.split():
            return f"{first.lower()} {rest}"
        if first in ("A", "An", "The"):
            return f"is {first.lower()} {rest}"
        if self.kind in ("function", "method", "decorator") and self.is_imperative():
            return f"{third_person(first.lower())} {rest}"
        return f"is described as follows: {self.text}"

    def is_imperative(self) -> bool:
        first = self.text.partition(" ")[0]
        return bool(re.fullmatch(r"[A-Z][a-z]+", first)) and first not in NOT_VERBS.split() and not first.endswith("ed")


def third_person(verb: str) -> str:
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "sh", "ch", "x", "z", "o")) else "s")


def fetch_docs(cache: Path) -> Path | None:
    """Downloads and unpacks Debian's documentation package into `cache`; None where apt-get cannot provide it."""
    folder = cache / "docs" / f"usr/share/doc/{PACKAGE.removesuffix('-doc')}/html/_sources"
    if folder.is_dir():
        return folder
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return None
    cache.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["apt-get", "download", PACKAGE], cwd=cache, check=False).returncode:
        return None
    archive = next(cache.glob(f"{PACKAGE}_*.deb"))
    subprocess.run(["dpkg", "-x", archive, cache / "docs"], check=True)
    return folder if folder.is_dir() else None


def clean(text: str) -> str:
    """reStructuredText without its inline markup; code stays between single backticks."""
    text = re.sub(r":(?:term|ref|doc|dfn|abbr):`([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
    text = re.sub(r":pep:`(\d+)`", r"PEP \1", text)
    text = re.sub(r":[\w:+-]+:`[!~]?([^`<]*?)(?:\s*<[^`]*>)?`", r"`\1`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"`([^`<>]+) <[^`>]+>`__?", r"\1", text)
    text = re.sub(r"(?<![\w*`])\*{1,2}([^*`\s][^*`]*?)\*{1,2}(?![\w*])", r"\1", text)
    return text.replace("\\*", "*").replace("\\", "")


def summary(body: str, limit: int = 230) -> str:
    """The first sentences of the first paragraph of prose, up to about `limit` characters."""
    paragraph = next((p for p in re.split(r"\n\s*\n", body) if p.strip() and not p.strip().startswith(("..", ":"))), "")
    flat = " ".join(clean(paragraph).split())
    result = ""
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z`])", flat):
        if result and len(result) + len(sentence) > limit:
            break
        result = f"{result} {sentence}".strip()
    dangling = re.search(r"\b(a|an|the|of|or|and|by|to|with|for|in|from|as)$", result.rstrip(".:;, "))
    cut_short = result.count("`") % 2 or dangling
    if cut_short or not 12 <= len(result) <= 2 * limit:
        return ""
    return re.sub(r"[:;,]+$", ".", result) if result[-1] in ".:;,!?" else result + "."


def example(body: str) -> str:
    """The first interactive example of a body, at most eight lines."""
    lines: list[str] = []
    for line in textwrap.dedent(body).splitlines():
        stripped = line.strip()
        if lines and (not stripped or stripped.startswith(("#", ".."))):
            break
        if lines or stripped.startswith(">>>"):
            lines.append(line)
    code = textwrap.dedent("\n".join(lines))
    return code if 0 < len(lines) <= 8 and len(code) < 300 else ""


def doc_records(folder: Path) -> Iterator[Record]:
    """The objects documented under library/, the entries of the glossary and the module synopses."""
    for path in sorted((folder / "library").glob("*.rst*")):
        yield from file_records(path.read_text(encoding="utf-8").splitlines())
    glossary = (folder / "glossary.rst.txt").read_text(encoding="utf-8")
    for term, body in re.findall(r"^   (\S.*)\n((?:      .*\n|\s*\n)+)", glossary, re.MULTILINE):
        text = summary(textwrap.dedent(body), 260)
        if text and not term.startswith((":", "`", ">", ".")):
            yield Record(term, term, "term", text, example(body))


def file_records(lines: list[str]) -> Iterator[Record]:
    module, owner, owner_indent = "builtins", "", 0
    for number, line in enumerate(lines):
        match = DIRECTIVE.match(line)
        if not match:
            continue
        indent, kind, signature = len(match[1]), match[2], clean(match[3]).strip()
        end = number + 1
        while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
            end += 1
        body = [text for text in lines[number + 1 : end] if not re.match(r"^\s*:[\w-]+:", text)]
        while body and body[0].strip():  # further signatures stand directly below the first
            body.pop(0)
        block = "\n".join(body)
        if kind in ("module", "currentmodule"):
            module = signature
            synopsis = re.search(r":synopsis: (.+)", "\n".join(lines[number + 1 : number + 4]))
            if kind == "module" and synopsis:
                text = clean(synopsis[1]).strip().rstrip(".") + "."
                yield Record(module, f"import {module}", "module", text)
            continue
        name = signature.partition("(")[0].strip()
        if indent > owner_indent and owner:
            name = f"{owner}.{name}"
        elif module != "builtins" and "." not in name:
            name = f"{module}.{name}"
        if kind in ("class", "exception"):
            owner, owner_indent = name, indent
        elif indent <= owner_indent:
            owner = ""
        kind = {"classmethod": "method", "staticmethod": "method", "coroutinefunction": "function"}.get(kind, kind)
        text = summary(textwrap.dedent(block))
        if text and re.fullmatch(r"[\w.]+", name):
            arguments = signature[signature.index("(") :] if "(" in signature else ""
            yield Record(name, name + arguments, kind, text, example(block))


def docstring_records() -> Iterator[Record]:
    """The public functions, classes and methods of the core modules, as their docstrings describe them."""
    for module_name in CORE_MODULES:
        module = importlib.import_module(module_name)
        prefix = "" if module_name == "builtins" else f"{module_name}."
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            kind = "function" if inspect.isroutine(value) else "class"
            members = [(prefix + name, value, kind)]
            if kind == "class" and module_name == "builtins":
                members += [(f"{name}.{key}", item, "method") for key, item in vars(value).items() if key[0] != "_"]
            for full_name, item, item_kind in members:
                text = summary(inspect.getdoc(item) or "")
                if text and "->" not in text and "(" not in text.split(" ")[0]:
                    yield Record(full_name, f"{full_name}()", item_kind, text)


def plain_text(folder: Path | None) -> Iterator[str]:
    """Documents for plain language modelling."""
    yield from pydoc_data.topics.topics.values()
    if folder:
        yield from pages(folder, FOLDERS)


def pages(folder: Path, names: tuple[str, ...]) -> Iterator[str]:
    """The documentation's pages in these of its folders, as plain text."""
    for path in sorted(path for name in names for path in (folder / name).glob("*.rst*")):
        text = clean(path.read_text(encoding="utf-8"))
        text = re.sub(r"^\s*(\.\. |:\w+:|[-=*^~#]{4,}\s*$).*\n", "", text, flags=re.MULTILINE)
        yield re.sub(r"\n{3,}", "\n\n", text).replace("::\n", ":\n")
