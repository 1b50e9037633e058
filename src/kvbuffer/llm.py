"""Offline inference with vLLM's interface: ``LLM(model).generate(prompts, SamplingParams(...))``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import DEFAULT_OPTIONS, CompletionDelta, FinishReason, RequestOptions, TokenLogprob
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.errors import InvalidRequestError

#: A text, token ids, or vLLM's dictionaries with ``prompt`` or ``prompt_token_ids``, and perhaps ``cache_salt``.
Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the prompt's ``n`` completions.
        text: the output.
        token_ids: its tokens.
        logprobs: one entry per token, if asked for.
        finish_reason: why it ended.
        stop_reason: the stop string or stop token id that matched, if one did.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def add(self, delta: CompletionDelta) -> None:
        """Append what a step produced."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        prompt: the text, None when token ids were given.
        prompt_token_ids: its tokens.
        outputs: ``n`` completions.
        prompt_logprobs: one entry per token of the prompt, None for the first, if asked for.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None


class LLM:
    """A model in this process.

    Args:
        model: checkpoint folder, hub id, or ``demo``.
        options: the other fields of :class:`~kvbuffer.engine.config.EngineConfig`; here ``max_queue_len`` is None by
            default, as the caller waits for the whole list anyway.

    Raises:
        ModelError: the checkpoint cannot be loaded.
        ConfigError: an option is out of range.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.engine = Engine.from_config(EngineConfig(model=model, **{"max_queue_len": None, **options}))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; results come in the order of the prompts.

        Args:
            prompts: a prompt or a list of them.
            sampling_params: one for all prompts, or one each; the model's own defaults if not given.
            use_tqdm: draw a progress bar (vLLM's name for it).
            priority: one for all prompts, or one each; lower values are served first, 0 by default.

        Raises:
            InvalidRequestError: a prompt or a parameter cannot be served; nothing was run.
        """
        items = _as_list(prompts)
        priorities = [priority or 0] * len(items) if priority is None or isinstance(priority, int) else priority
        if len(priorities) != len(items):
            raise InvalidRequestError(f"{len(items)} prompts but {len(priorities)} priorities", "priority")
        options = [_options(prompt, urgency) for prompt, urgency in zip(items, priorities, strict=True)]
        return self._run([self._prompt(prompt) for prompt in items], options, sampling_params, use_tqdm)

    def close(self) -> None:
        """Save what is cached to ``cache_dir``, if there is one; nothing can be generated afterwards."""
        self.engine.close()

    def reset_prefix_cache(self) -> None:
        """Forget what earlier prompts left behind."""
        self.engine.reset_prefix_cache()

    def chat(
        self,
        messages: Sequence[dict[str, Any]] | Sequence[Sequence[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of messages with ``role`` and ``content``."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        batch: list[tuple[str | None, list[int]]] = [
            (None, self.engine.tokenizer.apply_chat_template(list(conversation), **template_options))  # type: ignore[arg-type]
            for conversation in conversations
        ]
        return self._run(batch, [DEFAULT_OPTIONS] * len(batch), sampling_params, use_tqdm)

    def _prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if not prompt.keys() & {"prompt", "prompt_token_ids"}:
                raise InvalidRequestError(f"a prompt needs prompt or prompt_token_ids, got {sorted(prompt)}", "prompt")
            text: str | None = prompt.get("prompt")
            ids: Sequence[int] | None = prompt.get("prompt_token_ids")
        else:
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        return text, self.engine.tokenizer.encode(text or "") if ids is None else list(ids)

    def _run(
        self,
        batch: list[tuple[str | None, list[int]]],
        options: Sequence[RequestOptions],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        show_progress: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = SamplingParams(**self.engine.generation_defaults)
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(batch)
        if len(sampling_params) != len(batch):
            raise InvalidRequestError(f"{len(batch)} prompts but {len(sampling_params)} sampling_params")
        results: list[RequestOutput] = []
        running: dict[str, tuple[RequestOutput, CompletionOutput]] = {}
        try:
            for number, ((text, ids), params) in enumerate(zip(batch, sampling_params, strict=True)):
                result = RequestOutput(text, ids, [CompletionOutput(i) for i in range(params.n)])
                results.append(result)
                for output in result.outputs:
                    request_id = f"{number}-{output.index}"
                    self.engine.add_request(request_id, ids, params.for_choice(output.index), options[number])
                    running[request_id] = (result, output)
            self._drain(running, show_progress)
        finally:
            for request_id in running:
                self.engine.abort_request(request_id)
        return results

    def _drain(self, running: dict[str, tuple[RequestOutput, CompletionOutput]], show_progress: bool) -> None:
        columns = (
            TextColumn("Generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, disable=not show_progress) as progress:
            task = progress.add_task("", total=len(running), rate="")
            tokens = 0
            while self.engine.has_work():
                deltas = self.engine.step()
                for delta in deltas:
                    result, output = running[delta.request_id]
                    output.add(delta)
                    if delta.prompt_logprobs is not None:
                        result.prompt_logprobs = [None, *delta.prompt_logprobs]
                tokens += sum(len(delta.token_ids) for delta in deltas)
                finished = sum(delta.finish_reason is not None for delta in deltas)
                elapsed = progress.tasks[task].elapsed or 0.0
                progress.update(task, advance=finished, rate=f"{tokens / elapsed:.0f} tok/s" if elapsed else "")


def _options(prompt: Prompt, priority: int) -> RequestOptions:
    return RequestOptions(priority, cache_salt=prompt.get("cache_salt") if isinstance(prompt, Mapping) else None)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int) else items
