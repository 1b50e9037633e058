"""What a request may say about the form of its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbuffer.errors import InvalidRequestError

#: Characters of space between two tokens of JSON: a model that has lost its way would write space for ever.
MAX_SPACE = 64
_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form of a request's output, by exactly one of these. Names and meaning are vLLM's.

    Attributes:
        json: a JSON schema, as an object or as text. Properties and items that it does not name are not written.
        regex: a regular expression that the whole output matches.
        choice: the output is one of these strings.
        grammar: a context-free grammar in EBNF, whose rule ``root`` is the output.
        json_object: any JSON object.
        structural_tag: free text in which tags have contents of given forms, as xgrammar's JSON describes it.

    Raises:
        InvalidRequestError: none or several are given, or one has the wrong type.
    """

    json: str | bool | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            raise invalid_structure(f"needs exactly one of {', '.join(_KINDS)}, got {' and '.join(given) or 'none'}")
        for name in ("regex", "grammar", "structural_tag"):
            if not isinstance(getattr(self, name), str | None):
                raise invalid_structure(f"needs {name} as a string, got {type(getattr(self, name)).__name__}")
        choice = self.choice
        if choice is not None:
            strings = not isinstance(choice, str) and isinstance(choice, Sequence)
            if not (strings and choice and all(isinstance(text, str) and text for text in choice)):
                raise invalid_structure("needs choice as a list of strings, none empty")
            object.__setattr__(self, "choice", tuple(choice))
        if not isinstance(self.json_object, bool | None):
            raise invalid_structure("needs json_object as true or false")


def invalid_structure(message: str) -> InvalidRequestError:
    """Return the error of structured outputs that cannot be."""
    return InvalidRequestError(f"structured output {message}", "structured_outputs")
