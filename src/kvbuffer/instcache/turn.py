"""The user's turn of a chat template: what stands before an instruction, and the token that ends it."""

from __future__ import annotations

from collections.abc import Sequence

from kvbuffer.errors import ModelError
from kvbuffer.instcache.identity import normalise, template_options
from kvbuffer.tokenizer import Tokenizer

# Contents that share neither their first nor their last token, and one that shows whether the template changes text.
_PROBES = ("Queen", "7!")
_VERBATIM = "Where is\n  it, 12 of 30?"


class UserTurn:
    """Turns instructions into tokens and back as a first turn's user message holds them.

    A text has one tokenisation here, the tokenizer's own; other token sequences that spell the same text do not count.

    Args:
        tokenizer: the model's tokenizer.
        chat_template: Jinja source that replaces the model's own template.

    Attributes:
        head: tokens before the instruction.
        end: the token after it.

    Raises:
        ModelError: the template rewrites instructions, or ends them with text, so that their tokens cannot be told.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer

        def render(text: str) -> list[int]:
            messages = [{"role": "user", "content": text}]
            options = template_options(chat_template)
            return tokenizer.apply_chat_template(messages, add_generation_prompt=False, **options)

        first, second = map(render, _PROBES)
        self.head = _common_prefix(first, second)
        tail = _common_prefix(first[::-1], second[::-1])[::-1]
        if not self.head or not tail or tokenizer.decode(tail[:1]):
            raise ModelError("the chat template does not put user messages between special tokens: nothing to predict")
        self.end = tail[0]
        self._before, self._after = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (self.head, tail[:1]))
        if (ids := self.encode(_VERBATIM)) is None or render(_VERBATIM) != [*self.head, *ids, *tail]:
            raise ModelError("the chat template rewrites user messages: the tokens of an instruction cannot be told")

    def encode(self, text: str) -> list[int] | None:
        """Return the tokens of an instruction; None if it has special tokens in it or melts into what surrounds it."""
        ids = self._tokenizer.encode(f"{self._before}{text}{self._after}", add_special_tokens=False)
        start = len(self.head)
        if ids[:start] != self.head or ids[-1] != self.end:
            return None
        inner = ids[start:-1]
        return None if self.end in inner else inner

    def text(self, ids: Sequence[int]) -> str | None:
        """Return the text of an instruction's tokens; None unless it is in normal form and these are its own tokens."""
        ids = list(ids)
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text if text and normalise(text) == text and self.encode(text) == ids else None

    def allowed_tokens(self, vocab_size: int) -> list[bool]:
        """Return for each token of the model's vocabulary whether an instruction may hold it: it must show as text."""
        known = min(vocab_size, self._tokenizer.vocab_size)
        shown = [self._tokenizer.decode([token]) != "" for token in range(known)]
        return shown + [False] * (vocab_size - known)


def _common_prefix(a: list[int], b: list[int]) -> list[int]:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
