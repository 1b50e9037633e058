"""From a checked request body to the engine and back."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Mapping
from functools import cache
from typing import Any

from fastapi import Request, Response

from kvbuffer.engine.async_engine import AsyncEngine, EngineInput
from kvbuffer.engine.request import RequestOptions
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.structured_outputs import StructuredOutputsParams
from kvbuffer.errors import InvalidRequestError
from kvbuffer.server.chat_protocol import ChatCompletionRequest
from kvbuffer.server.chat_reply import ChatReply
from kvbuffer.server.completion_reply import CompletionReply
from kvbuffer.server.errors import APIError
from kvbuffer.server.instcache import InstCache, stored_response
from kvbuffer.server.prompts import PromptEncoder
from kvbuffer.server.protocol import CompletionRequest, SamplingBody
from kvbuffer.server.reply import Reply
from kvbuffer.server.stream import EventStream, whole_answer
from kvbuffer.server.tools import Toolbox
from kvbuffer.tokenizer import END_OF_THINKING

#: OpenAI's default of ``max_tokens`` in completions; chats may run until the context is full.
COMPLETION_MAX_TOKENS = 16

# Fields with the same name and meaning in a body and in SamplingParams.
_SAMPLING_FIELDS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens"),
    *("skip_special_tokens", "prompt_logprobs"),
)


class Serving:
    """What the endpoints share.

    Attributes:
        engine: runs the requests.
        prompts: makes token ids of texts and conversations.
        model_name: the name that requests call the model by.
        token_text: text of one token id, special tokens included.
        instcache: answers that were predicted, or None.
    """

    def __init__(self, engine: AsyncEngine, prompts: PromptEncoder, instcache: InstCache | None = None) -> None:
        tokenizer = engine.engine.tokenizer
        config = engine.engine.config
        self.engine, self.instcache = engine, instcache
        self.prompts = prompts
        self.model_name: str = config.served_model_name or config.model
        self.token_text = cache(lambda token_id: tokenizer.decode([token_id], skip_special_tokens=False))

    def check_model(self, name: str | None) -> None:
        """Raise 404 when a request names another model; it may name none."""
        if name is not None and name != self.model_name:
            message = f"The model {name!r} does not exist; this server serves {self.model_name!r}."
            raise APIError(404, message, "model", "model_not_found")

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer ``/v1/chat/completions``."""
        self.check_model(body.model)
        params = chat_sampling_params(body, self.engine.engine.generation_defaults)
        tools, style = None, self.prompts.call_style
        if body.offered and style is not None:  # without a style, rendering the prompt says that there are no tools
            tools = Toolbox(style, body.offered)
            structure = tools.structure(body.tool_choice, parallel=body.parallel_tool_calls is not False)
            params = dataclasses.replace(params, structured_outputs=structure)
        reply = ChatReply(
            request_id("chatcmpl", body),
            self.model_name,
            num_prompts=1,
            choices_per_prompt=params.n,
            token_text=self.token_text,
            tools=tools,
            include_reasoning=body.include_reasoning is not False,
            **reply_options(body),
        )
        if self.instcache is not None:
            delta = self.instcache.answer(body, params, f"{reply.request_id}-0")
            if delta is not None:
                reply.is_thinking = self.prompts.tells_thoughts and END_OF_THINKING in delta.text
                return stored_response(delta, reply, bool(body.stream))
        prompt = await self.prompts.render(body)
        reply.is_thinking = self.prompts.tells_thoughts and self.engine.engine.tokenizer.is_thinking(prompt)
        return await self._answer(body, request, [prompt], params, reply)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer ``/v1/completions``."""
        self.check_model(body.model)
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        encoded = iter(await self.prompts.encode(texts, body.add_special_tokens))
        prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in body.prompt]
        params = completion_sampling_params(body, self.engine.engine.generation_defaults)
        reply = CompletionReply(
            request_id("cmpl", body),
            self.model_name,
            choices_per_prompt=params.n,
            token_text=self.token_text,
            prompts=prompts,
            echoes=[self._echo(body, prompt) for prompt in body.prompt],
            echo_logprobs=body.echo and body.logprobs is not None,
            **reply_options(body),
        )
        return await self._answer(body, request, prompts, params, reply)

    async def _compile(self, structure: StructuredOutputsParams, param: str) -> None:
        """Compile a grammar, which can take seconds, so that it is at hand when the engine asks for it."""
        try:
            await asyncio.to_thread(self.engine.engine.grammars.compile, structure)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param) from error

    def _echo(self, body: CompletionRequest, prompt: str | list[int]) -> str:
        if not body.echo:
            return ""
        if isinstance(prompt, str):
            return prompt
        self.check_token_ids(prompt, "prompt")
        return self.engine.engine.tokenizer.decode(prompt, skip_special_tokens=body.skip_special_tokens)

    def check_token_ids(self, token_ids: list[int], param: str) -> None:
        """Raise 400 when an id is outside the vocabulary; decoding it would fail in the tokeniser."""
        vocab_size = self.engine.engine.tokenizer.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise APIError(400, f"Token id {token_id} is outside the vocabulary (0 to {vocab_size - 1}).", param)

    async def _answer(
        self,
        body: SamplingBody,
        request: Request,
        prompts: list[list[int]],
        params: SamplingParams,
        reply: Reply,
    ) -> Response:
        if params.structured_outputs is not None:
            param = "structured_outputs"
            if body.structured_outputs is None:
                param = "response_format" if body.response_format is not None else "tools"
            await self._compile(params.structured_outputs, param)
        pairs = [(prompt, params.for_choice(i)) for prompt in prompts for i in range(params.n)]
        options = RequestOptions(body.priority or 0, body.user or "", body.cache_salt, body.cache_ttl or 0.0)
        inputs = [
            EngineInput(f"{reply.request_id}-{i}", prompt, choice, options) for i, (prompt, choice) in enumerate(pairs)
        ]
        deltas = await self.engine.submit(inputs)
        if body.stream:
            return EventStream(deltas, reply)
        return await whole_answer(request, deltas, reply, with_logprobs=params.logprobs is not None)


def chat_sampling_params(body: ChatCompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """Return a conversation's parameters: the request's, else the model's own defaults, else the usual ones.

    Raises:
        InvalidRequestError: one is out of range.
    """
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return _sampling_params(body, defaults, max_tokens, (body.top_logprobs or 0) if body.logprobs else None)


def completion_sampling_params(body: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """Return a completion's parameters: the request's, else the model's own defaults, else the usual ones.

    Raises:
        InvalidRequestError: one is out of range.
    """
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and (body.logprobs is not None or max_tokens == 0):
        # The prompt is scored for what is repeated of it; without a token of output, it is all there is to compute.
        scored = max(body.prompt_logprobs or 0, body.logprobs or 0)
        return _sampling_params(
            body.model_copy(update={"prompt_logprobs": scored}), defaults, max_tokens, body.logprobs
        )
    return _sampling_params(body, defaults, max_tokens, body.logprobs)


def _sampling_params(
    body: SamplingBody, defaults: Mapping[str, Any], max_tokens: int | None, num_logprobs: int | None
) -> SamplingParams:
    fields = dict(defaults)
    fields |= {name: value for name in _SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    fields |= {"max_tokens": max_tokens, "logprobs": num_logprobs, "structured_outputs": _structure(body)}
    return SamplingParams(**fields)


def _structure(body: SamplingBody) -> StructuredOutputsParams | None:
    """Return the form that a request gives for its answer."""
    if body.structured_outputs is not None:
        return StructuredOutputsParams(**body.structured_outputs.model_dump(by_alias=True))
    if body.response_format is None or body.response_format.type == "text":
        return None
    if body.response_format.json_schema is None:
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=body.response_format.json_schema.schema_)


def request_id(prefix: str, body: SamplingBody) -> str:
    """Return the id of an answer: the request's own, or a fresh one."""
    return f"{prefix}-{body.request_id or uuid.uuid4().hex}"


def reply_options(body: SamplingBody) -> dict[str, Any]:
    """Return what a request says about the form of its answer, as options of ``Reply``."""
    options = {
        "return_token_ids": bool(body.return_token_ids),
        "return_prompt_logprobs": body.prompt_logprobs is not None,
    }
    if body.stream_options is not None:
        options["include_usage"] = bool(body.stream_options.include_usage)
        options["continuous_usage"] = bool(body.stream_options.continuous_usage_stats)
    return options
