"""The demo model's chats: hand-written dialogues, and questions and answers made from Python's documentation."""

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

Message = dict[str, str]


def dialogues() -> list[tuple[list[str], str]]:
    text = (Path(__file__).parent / "demo_dialogues.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^Q: (.+)\n((?:(?!Q: ).*\n?)+)", text, re.MULTILINE)
    return [([question.strip() for question in line.split("|")], answer.strip()) for line, answer in blocks]


def is_core(record: Record) -> bool:
    if record.kind == "module":
        return record.name in KNOWN_MODULES.split()
    owner = record.name.rpartition(".")[0]
    return record.kind == "term" or owner in {"", "str", "list", "dict", "set", *CORE_MODULES}


class ChatSampler:
    """Draws chats: hand-written dialogues, core records (the best known objects), and everything else.

    `dialogue_share` is the share of questions that come from the dialogues; it may be changed between samples.
    """

    def __init__(self, folder: Path | None, rng: random.Random) -> None:
        self.rng = rng
        self.dialogue_share = 0.45
        self.dialogues = dialogues()
        records = {record.name: record for record in docstring_records()}
        for record in doc_records(folder) if folder else ():
            records.setdefault(record.name, record)
            if record.kind != "module":
                records[record.name] = record
        asked = {question.lower().rstrip("?.") for questions, _ in self.dialogues for question in questions}
        self.core, self.rest = [], []
        for record in records.values():
            if not {f"what is a {record.name.lower()}", f"what is {record.name.lower()}"} & asked:
                (self.core if is_core(record) else self.rest).append(record)

    def sample(self) -> list[Message]:
        """One chat of one to three questions, sometimes with a system prompt."""
        messages: list[Message] = []
        if self.rng.random() < 0.3:
            messages.append({"role": "system", "content": self.rng.choice(SYSTEM_PROMPTS)})
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            if self.rng.random() < self.dialogue_share:
                questions, answer = self.rng.choice(self.dialogues)
                question = self.vary(self.rng.choice(questions))
            else:
                question, answer = self.ask(self.rng.choice(self.core if self.rng.random() < 0.9 else self.rest))
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

    def ask(self, record: Record) -> tuple[str, str]:
        """A question about one record and its answer."""
        choose = self.rng.choice
        callable_kind = record.kind in ("function", "method", "decorator")
        code = f"`{record.name}()`" if callable_kind else f"`{record.name}`"
        if record.kind == "term":
            article = "an" if record.name[0] in "aeiou" else "a"
            subject = choose((record.name, f"{article} {record.name}"))
            patterns = ("What is {}?", "Explain {}.", "What does {} mean?", "Define {}.", "Tell me about {}.", "{}")
            return self.vary(choose((*patterns, "What is {} in Python?")).format(subject)), record.text
        shown = record.name.removeprefix("builtins.")
        shown = choose((shown, shown, shown + "()", f"`{shown}`")) if callable_kind else shown
        kind = "function" if record.kind == "decorator" else record.kind
        draw = self.rng.random()
        if record.example and draw < 0.2:
            patterns = ("Show me an example of {}.", "Give me an example of {}.", "How do I use {}?", "{} example")
            answer = f"Here is an example of {code}:\n```python\n{record.example}\n```"
            return self.vary(choose(patterns).format(shown)), answer
        answer = f"{code} {record.predicate()}"
        if record.kind == "module":
            answer = f"The `{record.name}` module: {record.text}"
        elif callable_kind and record.is_imperative() and draw > 0.8:
            first = re.split(r"(?<=\.) ", record.text)[0].rstrip(".")
            if len(first) < 90:
                question = f"How do I {first[0].lower()}{first[1:]}?".replace("`", "")
                return self.vary(question), f"Use `{record.signature}`. It {record.predicate()}"
        patterns = ("What does {} do?", "What does {} do?", "Explain {}.", "What is {}?", "Tell me about {}.", "{}")
        longer = (f"What does the {{}} {kind} do?", f"Explain the {{}} {kind}.", f"What is the {kind} {{}}?")
        usage = ("How does {} work?", "What is {} for?", "When do I use {}?", "Describe {}.")
        return self.vary(choose(patterns + longer + usage).format(shown)), answer
