"""Texts and conversations to token ids, without holding up the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from kvbuffer.errors import InvalidRequestError
from kvbuffer.server.chat_protocol import ChatMessage, Conversation
from kvbuffer.server.tools import CallStyle, call_style

if TYPE_CHECKING:
    from kvbuffer.tokenizer import Tokenizer

T = TypeVar("T")

# Up to this many characters a text is tokenised on the spot: about a millisecond.
_INLINE_CHARS = 2048

# What this server passes to the chat template itself, or what would change the kind of the result.
_RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        "return_assistant_tokens_mask",
    }
)


class PromptEncoder:
    """Makes prompts with ``tokenizer``; long texts go to one worker thread.

    Attributes:
        chat_template: the template that replaces the model's own, or None.
        call_style: how the model writes calls of tools, None if its template has no tools.
        tells_thoughts: whether the model's thoughts are told from its answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None = None,
        style: CallStyle | None = None,
        tells_thoughts: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.call_style = style or call_style(tokenizer.chat_template if chat_template is None else chat_template)
        self.tells_thoughts = tells_thoughts
        # One thread, because a fast tokeniser must not be used from several at once.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvbuffer-tokenizer")

    def close(self) -> None:
        """End the worker thread."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """Return the token ids of each text."""
        encode = self._tokenizer.encode
        num_chars = sum(map(len, texts))
        return await self._call(num_chars, lambda: [encode(text, add_special_tokens) for text in texts])

    async def render(self, conversation: Conversation) -> list[int]:
        """Return the token ids of a conversation in the model's chat format.

        Raises:
            InvalidRequestError: the model has no chat template, or the template refuses the conversation.
        """
        kwargs: dict[str, Any] = dict(conversation.chat_template_kwargs or {})
        if reserved := kwargs.keys() & _RESERVED_TEMPLATE_KWARGS:
            raise InvalidRequestError(f"May not set {', '.join(sorted(reserved))}.", "chat_template_kwargs")
        if conversation.continue_final_message:
            kwargs["continue_final_message"] = True
        if self.chat_template is not None:
            kwargs["chat_template"] = self.chat_template
        messages = [_template_message(message) for message in conversation.messages]
        tools = [tool.model_dump(exclude_none=True) for tool in conversation.offered] or None
        if tools is not None and self.call_style is None:
            raise InvalidRequestError(
                "This model's chat template knows no tools that this server can read calls of; leave them out.", "tools"
            )
        num_chars = sum(len(message["content"]) for message in messages)

        def render() -> list[int]:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=conversation.add_generation_prompt, **kwargs
            )

        return await self._call(num_chars, render)

    async def _call(self, num_chars: int, function: Callable[[], T]) -> T:
        if num_chars <= _INLINE_CHARS:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)


def _template_message(message: ChatMessage) -> dict[str, Any]:
    """Return the message as chat templates expect it: text content, parsed tool arguments, no None."""
    fields = message.model_dump(exclude_none=True)
    fields["content"] = "\n".join(part.text for part in message.content or ())
    if message.role == "developer":  # OpenAI's newer name, which few templates know
        fields["role"] = "system"
    for call in fields.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        except ValueError as error:
            raise InvalidRequestError(f"The arguments of a tool call are not JSON: {error}", "messages") from error
    return fields
