"""An engine that repeats the prompt, byte by byte: what the protocol tests need, and nothing to compute.

The reply to a prompt is the prompt itself followed by the end of sequence; with ``ignore_eos`` it is the
prompt over and over. Hooks make it slow or make it fail.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from kvbuffer.cache.pools import POOL_KINDS
from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.request import DEFAULT_OPTIONS, CompletionDelta, FinishReason, RequestOptions, TokenLogprob
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.speculative.speculator import SpeculativeStats
from kvbuffer.engine.stats import EngineStats, PoolStats
from kvbuffer.engine.structured_outputs import StructuredOutputsParams
from kvbuffer.errors import InvalidRequestError, QueueFullError

EOS = 256


class ByteTokenizer:
    """One token per byte of UTF-8, and an end of sequence."""

    vocab_size = EOS + 1
    eos_token_ids = frozenset({EOS})
    has_chat_template = True
    chat_template = "{% if tools %}<tool_call>{% endif %}"

    def is_thinking(self, token_ids: list[int]) -> bool:
        return bytes(token_ids).endswith(b"<think>")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        pieces = bytes(token for token in ids if token != EOS).decode(errors="replace")
        return pieces + ("" if skip_special_tokens else "<eos>" * ids.count(EOS))

    def whole_text(self, token_id: int, skip_special_tokens: bool) -> None:
        """No token has a text of its own: single bytes of characters do not."""

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        if kwargs.get("fail"):
            raise InvalidRequestError("the template says no", "messages")
        text = "".join(f"[{message['role']}]{message['content']}" for message in messages)
        text += "".join(f"{{{tool['function']['name']}}}" for tool in tools or ())
        text += "".join(f"({name}={value})" for name, value in kwargs.items())
        return self.encode((chat_template or "") + text + ("[assistant]" if add_generation_prompt else ""))


@dataclass
class FakeRequest:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    detokenizer: IncrementalDetokenizer
    num_output_tokens: int = 0
    scheduled_at: float = 0.0


class FakeGrammars:
    """Compiles nothing, and finds fault with one regular expression."""

    def compile(self, params: StructuredOutputsParams) -> None:
        if params.regex == "(":
            raise InvalidRequestError("structured output cannot be used: the parenthesis is open", "structured_outputs")


@dataclass
class FakeEngine:
    """Implements the engine's interface; the first attributes are the hooks."""

    step_delay_s: float = 0.0
    fail_at_step: int | None = None
    bug_in_add: bool = False
    give_up_at_token: int | None = None
    queue_full: QueueFullError | None = None
    room: float = math.inf
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    max_num_seqs: int = 64
    max_model_len: int = 4096
    generation_defaults: dict[str, float | int] = field(default_factory=dict)
    config: Any = field(default_factory=lambda: SimpleNamespace(model="org/echo", served_model_name="echo"))
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    grammars: FakeGrammars = field(default_factory=lambda: FakeGrammars())
    requests: dict[str, FakeRequest] = field(default_factory=dict)
    seen: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    options: list[RequestOptions] = field(default_factory=list)
    speculative: SpeculativeStats | None = None
    num_steps: int = 0
    num_aborted: int = 0
    num_closed: int = 0

    @property
    def stats(self) -> EngineStats:
        running = min(len(self.requests), self.max_num_seqs)
        used = PoolStats(running, 5, self.max_num_seqs)
        return EngineStats(
            num_running=running,
            num_waiting=len(self.requests) - running,
            num_folds=7,
            pools=dict.fromkeys(POOL_KINDS, used),
            speculative=self.speculative,
        )

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        self.num_closed += 1

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> None:
        if self.bug_in_add:
            raise RuntimeError("a bug")
        if self.queue_full is not None:
            raise self.queue_full
        if len(self.requests) >= self.room:
            raise QueueFullError("no room", "queue_full", 1)
        if not prompt_token_ids:
            raise InvalidRequestError("The prompt is empty.", "prompt")
        if not all(0 <= token <= EOS for token in prompt_token_ids):
            raise InvalidRequestError("A token id of the prompt is outside the vocabulary.", "prompt")
        if len(prompt_token_ids) + (params.max_tokens or 1) > self.max_model_len:
            raise InvalidRequestError(f"The context holds {self.max_model_len} tokens.", "max_tokens")
        params.validate(self.tokenizer.vocab_size)
        detokenizer = IncrementalDetokenizer(self.tokenizer, params)
        self.requests[request_id] = FakeRequest(request_id, prompt_token_ids, params, detokenizer)
        self.seen.append((prompt_token_ids, params))
        self.options.append(options)

    def abort_request(self, request_id: str) -> None:
        if self.requests.pop(request_id, None) is not None:
            self.num_aborted += 1

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self, before_computing: Callable[[], None] | None = None) -> list[CompletionDelta]:
        if before_computing is not None:
            before_computing()
        self.num_steps += 1
        if self.num_steps == self.fail_at_step:
            raise RuntimeError("the engine broke")
        if self.step_delay_s:
            time.sleep(self.step_delay_s)
        running = [request for request, _ in zip(self.requests.values(), range(self.max_num_seqs), strict=False)]
        return [self._advance(request) for request in running]

    def _advance(self, request: FakeRequest) -> CompletionDelta:
        params, prompt = request.params, request.prompt
        position = request.num_output_tokens
        scored = None
        if params.prompt_logprobs is not None and not position:
            scored = [TokenLogprob(known, -0.25, 1, [(known, -0.25)][: params.prompt_logprobs]) for known in prompt[1:]]
        request.scheduled_at = request.scheduled_at or time.monotonic()
        request.num_output_tokens += 1
        finish_reason: FinishReason | None = None
        stop_reason: str | int | None = None
        text = ""
        if position == len(prompt) and not params.ignore_eos:
            token, finish_reason = EOS, FinishReason.STOP
        else:
            token = prompt[position % len(prompt)]
            text, stop_reason = request.detokenizer.append([token])
            if token in params.stop_token_ids:
                stop_reason = token
            if stop_reason is not None:
                finish_reason = FinishReason.STOP
            elif request.num_output_tokens == params.max_tokens:
                finish_reason = FinishReason.LENGTH
        if request.num_output_tokens == self.give_up_at_token:
            finish_reason, stop_reason = FinishReason.ABORT, "not a number"
        if finish_reason is not None:
            if stop_reason is None:
                text += request.detokenizer.flush()
            del self.requests[request.request_id]
        logprobs = None
        if params.logprobs is not None:
            top = [((token + i) % EOS, -0.5 - i) for i in range(params.logprobs)]
            logprobs = [TokenLogprob(token, -0.5, 1, top)]
        return CompletionDelta(
            request_id=request.request_id,
            text=text,
            token_ids=[token],
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=len(prompt),
            num_output_tokens=request.num_output_tokens,
            num_cached_tokens=self.num_cached_tokens,
            scheduled_at=request.scheduled_at,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            prompt_logprobs=scored,
        )
