"""Grammars of structured outputs: which tokens may come next. xgrammar works that out, the sampler keeps to it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from kvbuffer.engine.structured_outputs import MAX_SPACE, StructuredOutputsParams, invalid_structure

if TYPE_CHECKING:
    import xgrammar

    from kvbuffer.tokenizer import Tokenizer

#: Bytes of compiled grammars that are kept for later requests.
_CACHE_BYTES = 128 << 20
_ANY_OBJECT = '{"type": "object", "additionalProperties": true}'
#: What xgrammar reads in a JSON schema, and then does not enforce.
_UNENFORCED = ("not", "if", "dependentRequired", "dependentSchemas", "contains", "uniqueItems")


class GrammarCompiler:
    """Compiles grammars for one model's tokens; any thread may do so, and what was compiled is kept.

    Args:
        tokenizer: of the model.
        vocab_size: of the model, which may have more tokens than the tokenizer.
        eos_token_ids: tokens that end the output, once it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, sorted(eos_token_ids)
        self._compiler: xgrammar.GrammarCompiler | None = None

    def compile(self, params: StructuredOutputsParams, prompt_token_ids: Sequence[int] = ()) -> Grammar:
        """Return a grammar at its beginning. The first time, this may take seconds.

        Where the prompt leaves the model thinking, the grammar is for what comes after its thoughts.

        Raises:
            InvalidRequestError: xgrammar cannot read it, or would not enforce all of it.
        """
        import xgrammar  # takes half a second, which most servers never need

        if self._compiler is None:
            info = xgrammar.TokenizerInfo.from_huggingface(
                self._tokenizer.pretrained, vocab_size=self._vocab_size, stop_token_ids=self._eos_token_ids or None
            )
            self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=_CACHE_BYTES)
        try:
            matcher = xgrammar.GrammarMatcher(_compile(self._compiler, params))
        except (RuntimeError, ValueError) as error:
            # Without the place in xgrammar's source.
            reason = re.sub(r"^\[[\d:]+\] \S+: ", "", str(error)).strip()
            raise invalid_structure(f"cannot be used: {reason}") from error
        is_thinking = self._tokenizer.is_thinking(prompt_token_ids)
        return Grammar(matcher, self._vocab_size, self._tokenizer.end_of_thinking if is_thinking else None)


def _compile(compiler: xgrammar.GrammarCompiler, params: StructuredOutputsParams) -> xgrammar.CompiledGrammar:
    if params.json is not None:
        schema = params.json
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(schema)
        except (ValueError, TypeError, RecursionError) as error:
            raise invalid_structure(f"has a schema that is not JSON: {error}") from error
        for keyword in _unenforced(schema):
            raise invalid_structure(f"has a schema with {keyword!r}, which cannot be enforced; leave it out")
        return compiler.compile_json_schema(text, max_whitespace_cnt=MAX_SPACE)
    if params.regex is not None:
        return compiler.compile_regex(params.regex)
    if params.choice is not None:
        # A JSON string is a string of the grammar, too.
        return compiler.compile_grammar("root ::= " + " | ".join(json.dumps(text) for text in params.choice))
    if params.grammar is not None:
        return compiler.compile_grammar(params.grammar)
    if params.structural_tag is not None:
        return compiler.compile_structural_tag(params.structural_tag)
    return compiler.compile_json_schema(_ANY_OBJECT, max_whitespace_cnt=MAX_SPACE)


def _unenforced(schema: object) -> Iterator[str]:
    """Yield the keywords of a schema that would silently not be kept to."""
    if isinstance(schema, list):
        for item in schema:
            yield from _unenforced(item)
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        if key in _UNENFORCED and value is not False:
            yield key
        elif key == "allOf" and isinstance(value, list) and len(value) > 1:
            yield "allOf"
        elif key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            yield from _unenforced(list(value.values()))
        elif key not in ("const", "enum", "default", "examples"):
            yield from _unenforced(value)


class Grammar:
    """How far one request's output has come in its grammar.

    Args:
        matcher: xgrammar's.
        vocab_size: of the model.
        begins_after: the token after which it begins; None for at once.
    """

    def __init__(self, matcher: xgrammar.GrammarMatcher, vocab_size: int, begins_after: int | None = None) -> None:
        self._matcher, self._vocab_size, self._begins_after = matcher, vocab_size, begins_after
        self._bits = torch.empty(1, -(-vocab_size // 32), dtype=torch.int32)

    @property
    def is_complete(self) -> bool:
        """Whether an end-of-sequence token has ended it."""
        return bool(self._matcher.is_terminated())

    def append(self, token_id: int) -> None:
        """Go on with a token that the last mask has allowed."""
        if self._begins_after is None:
            self._matcher.accept_token(token_id)
        elif token_id == self._begins_after:
            self._begins_after = None

    def mask(self, logits: npt.NDArray[np.float32]) -> None:
        """Set the ``logits`` [V] of tokens that cannot come next to minus infinity, in place."""
        if self._begins_after is None and self._matcher.fill_next_token_bitmask(self._bits):
            allowed = np.unpackbits(self._bits.numpy().view(np.uint8), bitorder="little")
            np.putmask(logits[: self._vocab_size], allowed[: self._vocab_size] == 0, -np.inf)
