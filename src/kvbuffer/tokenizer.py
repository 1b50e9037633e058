"""The checkpoint's tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer

from kvbuffer.errors import InvalidRequestError, ModelError

_THINKING, END_OF_THINKING = "<think>", "</think>"
#: A prompt that leaves the model thinking ends with so many tokens at the most: the tag and space.
_THINKING_TAIL = 4


class Tokenizer:
    """A thin wrapper of transformers' tokenizer.

    Args:
        folder: checkpoint folder.

    Attributes:
        pretrained: transformers' tokenizer.
        vocab_size: token ids are below this.
        eos_token_id: the tokenizer's own end of sequence, if it has one.
        end_of_thinking: the token that ends a model's thoughts, None if it has none.
        has_chat_template: whether :meth:`apply_chat_template` works without a template of the caller's.

    Raises:
        ModelError: the folder holds no tokenizer that transformers can load.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.pretrained: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"no usable tokenizer in {folder}: {error}") from None
        # transformers takes as long again to look at the ids as this does to decode them, and that once per token.
        self._backend: Any = getattr(self.pretrained, "backend_tokenizer", None)
        #: See :func:`whole_texts`.
        self.whole_text = whole_texts(self._backend)
        self.vocab_size: int = len(self.pretrained)
        self.eos_token_id: int | None = self.pretrained.eos_token_id
        self._thinking, self.end_of_thinking = map(self._added_token, (_THINKING, END_OF_THINKING))
        self.has_chat_template: bool = bool(self.pretrained.chat_template)

    @property
    def chat_template(self) -> str:
        """The source of the chat template, or of all there are; empty if there is none."""
        source = self.pretrained.chat_template or ""
        return source if isinstance(source, str) else "\n".join(source.values())

    def _added_token(self, text: str) -> int | None:
        token_id: int | None = self.pretrained.get_added_vocab().get(text)
        return token_id

    def is_thinking(self, token_ids: Sequence[int]) -> bool:
        """Return whether a prompt ends by letting the model think: what comes next are thoughts, then ``</think>``."""
        tail = token_ids[-_THINKING_TAIL:]
        return self._thinking is not None and self._thinking in tail and self.end_of_thinking not in tail

    def has_same_tokens(self, other: Tokenizer) -> bool:
        """Return whether the two have the same tokens under the same ids."""
        return bool(self.pretrained.get_vocab() == other.pretrained.get_vocab())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``."""
        ids: list[int] = self.pretrained.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``, unchanged by any clean-up of spaces; unknown ids are left out."""
        text: str
        if self._backend is not None:
            text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        else:
            text = self.pretrained.decode(
                ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        return text

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """Return the token ids of a conversation.

        Raises:
            InvalidRequestError: there is no template, or it refuses these messages.
        """
        if not self.has_chat_template and "chat_template" not in kwargs:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", "messages")
        try:
            ids: list[int] = self.pretrained.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
                **kwargs,
            )
        except Exception as error:  # a Jinja template may raise anything
            raise InvalidRequestError(f"the chat template refused the messages: {error}", "messages") from None
        return ids


def whole_texts(backend: Any) -> Callable[[int, bool], str | None]:
    """Return a function that tells the texts of single tokens.

    Args:
        backend: a tokenizer of the ``tokenizers`` library, or None.

    Returns:
        A function of a token id and of whether special tokens are skipped: the text that the token adds after any text
        of whole characters; None if that depends on the tokens around it. Only byte-level decoders put tokens together
        by their bytes alone; others have rules for spaces.
    """
    if not isinstance(getattr(backend, "decoder", None), ByteLevel):
        return lambda token_id, skip_special_tokens: None

    @lru_cache(maxsize=1 << 16)
    def whole_text(token_id: int, skip_special_tokens: bool) -> str | None:
        text: str = backend.decode([token_id], skip_special_tokens=skip_special_tokens)
        return None if "\ufffd" in text else text

    return whole_text
