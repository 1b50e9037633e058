"""The answers of ``/v1/completions``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as json_string
from typing import Any

from kvbuffer.engine.request import CompletionDelta, TokenLogprob
from kvbuffer.server.logprobs import text_logprobs
from kvbuffer.server.reply import Reply


class CompletionReply(Reply):
    """Answers ``/v1/completions``.

    Args:
        prompts: their tokens.
        echoes: the text of each prompt that is to be repeated, or "".
        echo_logprobs: whether log-probabilities are repeated, too.
    """

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(
        self,
        *args: Any,
        prompts: list[list[int]],
        echoes: list[str],
        echo_logprobs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, num_prompts=len(prompts), **kwargs)
        self._prompts = prompts
        self._echo_logprobs = echo_logprobs
        self._echoes = [echo for echo in echoes for _ in range(self._choices_per_prompt)]
        self._text_offsets = [0] * len(self._index)

    def choice_chunk(self, index: int, delta: CompletionDelta) -> str:
        """Return a chunk's choice; the first one of a choice repeats the prompt if that was asked for."""
        echo, self._echoes[index] = self._echoes[index], ""
        logprobs = "null"
        if delta.logprobs is not None:
            logprobs = json.dumps(self._text_logprobs(index, delta.prompt_logprobs, delta.logprobs))
        return (
            f'{{"index": {index}, "text": {json_string(echo + delta.text)}, '
            f'"logprobs": {logprobs}, {self._ending(index, delta)}'
        )

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any]:
        """Return the choice with its text."""
        choice = {
            "index": index,
            "text": self._echoes[index] + text,
            "logprobs": None,
        }
        if logprobs is not None:
            choice["logprobs"] = self._text_logprobs(index, self._prompt_logprobs[index], logprobs)
        if self._return_token_ids:
            choice["prompt_token_ids"] = self._prompt(index)
        if self._return_prompt_logprobs:
            choice["prompt_logprobs"] = self._prompt_entries(index)
        return choice

    def _prompt(self, index: int) -> list[int]:
        return self._prompts[index // self._choices_per_prompt]

    def _text_logprobs(
        self, index: int, of_prompt: Sequence[TokenLogprob] | None, of_output: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        first, shown = None, of_output
        if self._echo_logprobs and of_prompt is not None:
            first, shown = self._prompt(index)[0], [*of_prompt, *of_output]
        fields = text_logprobs(shown, self._token_text, self._text_offsets[index], first)
        self._text_offsets[index] += sum(map(len, fields["tokens"]))
        return fields
