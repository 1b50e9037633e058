"""The demo model's chats: hand-written dialogues, and questions and answers made from what is written about Python's
functions, classes, modules and terms: by hand for the best known, in Python's documentation for all others.
"""

import random
import re
from pathlib import Path

from demo_corpus import CORE_MODULES, Record, doc_records, docstring_records

# The modules whose purpose the model should know.
KNOWN_MODULES = """
argparse array ast asyncio base64 bisect builtins calendar collections contextlib copy csv ctypes datetime
decimal dataclasses difflib email enum fractions functools getpass glob gzip hashlib heapq html http importlib
inspect io itertools json logging math multiprocessing operator os os.path pathlib pdb pickle platform pprint
queue random re secrets shelve shutil signal socket sqlite3 ssl statistics string struct subprocess sys tempfile
textwrap threading time timeit tkinter traceback turtle types typing unittest urllib uuid venv warnings weakref
xml zipfile zlib
"""
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are an expert Python programmer.",
    "You answer questions about Python.",
)

ANOTHER = ("And {}?", "What about {}?", "and {}?", "Now {}.")
MORE = ("Can you show me an example?", "Show me an example.", "An example, please.", "For example?", "How do I use it?")
METHOD_OWNERS = ("str", "list", "dict", "set")

Message = dict[str, str]


def dialogues() -> list[tuple[list[str], str]]:
    text = (Path(__file__).parent / "demo_dialogues.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^Q: (.+)\n((?:(?!Q: ).*\n?)+)", text, re.MULTILINE)
    return [([question.strip() for question in line.split("|")], answer.strip()) for line, answer in blocks]


def known_records() -> list[Record]:
    """The records of demo_records.md."""
    text = (Path(__file__).parent / "demo_records.md").read_text(encoding="utf-8")
    records = []
    for head, what, example in re.findall(r"^# (.+)\n(.+)\n((?:.+\n)*)", text, re.MULTILINE):
        name = head.removeprefix("import ").partition("(")[0]
        method = name.partition(".")[0] in METHOD_OWNERS
        kind = (
            "module"
            if head.startswith("import ")
            else "term"
            if "(" not in head
            else "method"
            if method
            else "function"
        )
        records.append(Record(name, head, kind, what, example.strip()))
    return records


def is_core(record: Record) -> bool:
    if record.kind == "module":
        return record.name in KNOWN_MODULES.split()
    owner = record.name.rpartition(".")[0]
    return record.kind == "term" or owner in {"", "str", "list", "dict", "set", *CORE_MODULES}


class ChatSampler:
    """Draws chats: hand-written dialogues, known records, core records (other well-known objects), and everything else.

    `dialogue_share` is the share of questions that come from the dialogues.
    """

    def __init__(self, folder: Path | None, rng: random.Random, dialogue_share: float) -> None:
        self.rng = rng
        self.dialogue_share = dialogue_share
        self.dialogues = dialogues()
        self.known = known_records()
        records = {record.name: record for record in docstring_records()}
        for record in doc_records(folder) if folder else ():
            records.setdefault(record.name, record)
            if record.kind != "module":
                records[record.name] = record
        for record in self.known:
            records.pop(record.name, None)
        asked = {question.lower().rstrip("?.") for questions, _ in self.dialogues for question in questions}
        self.core, self.rest = [], []
        for record in records.values():
            if not {f"what is a {record.name.lower()}", f"what is {record.name.lower()}"} & asked:
                (self.core if is_core(record) else self.rest).append(record)

    def sample(self) -> list[Message]:
        """One chat of one to three questions, some of which follow from the one before."""
        messages: list[Message] = []
        if self.rng.random() < 0.3:
            messages.append({"role": "system", "content": self.rng.choice(SYSTEM_PROMPTS)})
        record: Record | None = None
        example = ""
        for _ in range(self.rng.choice((1, 1, 2, 2, 3))):
            if example and self.rng.random() < 0.5:
                question = self.vary(self.rng.choice(MORE))
                answer, example = f"Here is an example:\n```python\n{example}\n```", ""
            elif record and record.kind in ("function", "method") and self.rng.random() < 0.5:
                record = self.rng.choice([other for other in self.known if other.kind == record.kind])
                question = self.rng.choice(ANOTHER).format(self.shown(record))
                answer, example = self.description(record), record.example
            elif self.rng.random() < self.dialogue_share:
                questions, answer = self.rng.choice(self.dialogues)
                question = self.vary(self.rng.choice(questions))
                code = re.search(r"```python\n(.*?)\n```", answer, re.DOTALL)
                record, example = None, code[1] if code else ""
            else:
                record = self.rng.choice(self.rng.choices((self.known, self.core, self.rest), (5, 4, 1))[0])
                question, answer = self.ask(record)
                example = "" if "```" in answer else record.example
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages

    def vary(self, question: str) -> str:
        draw = self.rng.random()
        if draw < 0.1:
            return question.lower()
        if draw < 0.2:
            return question.rstrip("?.")
        if draw < 0.25:
            return question.lower().rstrip("?.!")
        return question

    def shown(self, record: Record) -> str:
        """The record's name as people write it."""
        name = record.name.removeprefix("builtins.")
        callable_kind = record.kind in ("function", "method", "decorator")
        return self.rng.choice((name, name, name + "()", f"`{name}`")) if callable_kind else name

    def description(self, record: Record) -> str:
        """What a record is or does, in a sentence that begins with its name."""
        if record.kind == "term":
            return record.text
        if record.kind == "module":
            return f"The `{record.name}` module: {record.text}"
        callable_kind = record.kind in ("function", "method", "decorator")
        return f"`{record.name}()` {record.predicate()}" if callable_kind else f"`{record.name}` {record.predicate()}"

    def ask(self, record: Record) -> tuple[str, str]:
        """A question about one record and its answer."""
        choose, shown = self.rng.choice, self.shown(record)
        if record.example and self.rng.random() < 0.2:
            patterns = ("Show me an example of {}.", "Give me an example of {}.", "How do I use {}?", "{} example")
            return self.vary(choose(patterns).format(shown)), f"Here is an example:\n```python\n{record.example}\n```"
        answer = self.description(record)
        if record.kind == "term":
            article = "an" if record.name[0] in "aeiou" else "a"
            subject = choose((record.name, f"{article} {record.name}"))
            patterns = ("What is {}?", "Explain {}.", "What does {} mean?", "Define {}.", "Tell me about {}.", "{}")
            return self.vary(choose((*patterns, "What is {} in Python?")).format(subject)), answer
        if record.kind in ("function", "method") and record.is_imperative() and self.rng.random() > 0.8:
            first = re.split(r"(?<=\.) ", record.text)[0].rstrip(".")
            if len(first) < 90:
                question = f"How do I {first[0].lower()}{first[1:]}?".replace("`", "")
                return self.vary(question), f"Use `{record.signature}`. It {record.predicate()}"
        kind = "function" if record.kind == "decorator" else record.kind
        patterns = ("What does {} do?", "What does {} do?", "Explain {}.", "What is {}?", "Tell me about {}.", "{}")
        longer = (f"What does the {{}} {kind} do?", f"Explain the {{}} {kind}.", f"What is the {kind} {{}}?")
        usage = ("How does {} work?", "What is {} for?", "When do I use {}?", "Describe {}.")
        return self.vary(choose(patterns + longer + usage).format(shown)), answer
