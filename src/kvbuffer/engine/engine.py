"""The engine: requests in, deltas out, one step at a time on one thread."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from kvbuffer.cache.disk import DiskTier, fingerprint
from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.offload import Offload
from kvbuffer.cache.plan import MemoryPlan, default_budget, plan_memory
from kvbuffer.cache.store import reserve
from kvbuffer.engine.config import DTYPES, STATE_DTYPES, EngineConfig
from kvbuffer.engine.detokenizer import IncrementalDetokenizer
from kvbuffer.engine.forms import FormPolicy
from kvbuffer.engine.grammar import GrammarCompiler
from kvbuffer.engine.loading import build_model, load_plan
from kvbuffer.engine.output import Extension, extend_output, score_prompt
from kvbuffer.engine.ranks import LeadingRunner, ProcessRanks
from kvbuffer.engine.request import DEFAULT_OPTIONS, CompletionDelta, FinishReason, Request, RequestOptions
from kvbuffer.engine.runner import Runner
from kvbuffer.engine.sampler import Logits
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.sampling_state import SamplingState
from kvbuffer.engine.scheduler import Scheduler, Segment
from kvbuffer.engine.speculative.draft_model import DraftModel
from kvbuffer.engine.speculative.methods import make_drafter
from kvbuffer.engine.speculative.speculator import Speculator
from kvbuffer.engine.stats import EngineStats, read_stats
from kvbuffer.errors import InvalidRequestError
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.parallel import shard_config
from kvbuffer.models.weights import resolve_model
from kvbuffer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

#: Sampling defaults that a checkpoint's ``generation_config.json`` may set.
_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Engine:
    """Serves one model. Not thread-safe: everything happens on the thread that calls :meth:`step`.

    Attributes:
        config: the options it was built with.
        model_config: the model's shape.
        tokenizer: the model's tokenizer.
        plan: the memory budget and what it serves.
        cqil: which layers are computed at once.
        max_model_len: longest request in tokens, prompt and output.
        eos_token_ids: tokens that end a request unless it ignores them.
        generation_defaults: the model's own sampling defaults, for requests that do not say.
        grammars: compiles the grammars of structured outputs; for any thread.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        model_config: ModelConfig,
        plan: MemoryPlan,
        forms: FormPolicy,
        tokenizer: Tokenizer,
        draft_model: DraftModel | None = None,
        ranks: ProcessRanks | None = None,
    ) -> None:
        self.cqil = cqil = load_plan(config.cqil, folder, model_config)
        shape = model_config.cache_shape
        if ranks is not None:
            # Other ranks do not follow memory from pool to pool.
            shape, plan = shard_config(model_config, ranks.size).cache_shape, plan.with_fixed_pools()
        plan, caches = reserve(dataclasses.replace(shape, groups=cqil.groups), plan)
        self.config, self.model_config, self.plan, self.tokenizer = config, model_config, plan, tokenizer
        self.max_model_len = plan.max_model_len
        generation = _read_generation_config(folder)
        self.generation_defaults = {k: generation[k] for k in _GENERATION_DEFAULTS if generation.get(k) is not None}
        if generation.get("do_sample") is False:
            self.generation_defaults = {"temperature": 0.0}
        self.eos_token_ids = _eos_token_ids(generation, model_config, tokenizer)
        self.grammars = GrammarCompiler(tokenizer, model_config.vocab_size, self.eos_token_ids)
        self._ranks = ranks
        if ranks is not None:
            ranks.send(plan)
        self._model = build_model(config, folder, model_config, cqil, plan, ranks)
        self._memory = RequestMemory(plan, config.enable_prefix_caching)
        speculative = config.speculative
        self._speculator: Speculator | None = None
        if speculative is not None:
            drafter = make_drafter(config, speculative, self._model, caches, self._memory, draft_model)
            self._speculator = Speculator(speculative, drafter, config.max_num_batched_tokens)
        needs_hidden = self._speculator is not None and self._speculator.drafter.needs_hidden
        if ranks is None:
            self._runner = Runner(self._model, caches, self._memory, needs_hidden)
        else:
            self._runner = LeadingRunner(self._model, caches, self._memory)
        self._offload: Offload | None = None
        if config.cache_dir is not None and self._memory.prefixes is not None:
            tier = DiskTier(config.cache_dir, config.cache_dir_bytes, fingerprint(folder, caches, cqil.identity))
            self._offload = Offload(self._memory, self._memory.prefixes, caches, tier)
        self._scheduler = Scheduler(self._memory, forms, config.max_num_batched_tokens, config.max_queue_len)
        self._requests: dict[str, Request] = {}

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Find the checkpoint, plan the memory, load the weights.

        Raises:
            ModelError: the checkpoint is missing, broken or of an unsupported kind.
            ConfigError: the CQIL plan does not fit it.
            CapacityError: the memory budget is too small.
        """
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        folder = resolve_model(config.model)
        model_config = ModelConfig.from_folder(folder, config.uses_mtp)
        dtype = DTYPES.get(config.dtype)
        if dtype is None:
            dtype = torch.float32 if model_config.dtype == torch.float32 else torch.bfloat16
        ranks, shape = None, model_config.cache_shape
        if config.tensor_parallel_size > 1:
            shape = shard_config(model_config, config.tensor_parallel_size).cache_shape
            load_plan(config.cqil, folder, model_config)  # what is wrong with it is said before others are waited for
            ranks = ProcessRanks(config.tensor_parallel_size)
        state_dtype = STATE_DTYPES.get(config.state_dtype, torch.float32)
        exact = torch.float32 if state_dtype == torch.float32 else torch.bfloat16
        record_dtype = DTYPES.get(config.record_dtype, exact)
        forms = FormPolicy.for_model(
            shape.linear, state_dtype, record_dtype, config.buffer_len, config.kv_only_len, config.max_num_seqs,
            speculative=config.speculative is not None,
        )  # fmt: skip
        tokenizer, draft_model = Tokenizer(folder), None
        if config.speculative is not None and config.speculative.model is not None:
            draft_model = DraftModel.find(config.speculative.model, model_config, tokenizer)
        folders = [folder] if draft_model is None else [folder, draft_model.folder]
        weight_bytes = sum(path.stat().st_size for each in folders for path in each.glob("*.safetensors"))
        budget = default_budget(weight_bytes, config.tensor_parallel_size) if config.memory is None else config.memory
        if draft_model is not None:
            draft_model = draft_model.with_share(
                budget, shape, max_model_len=config.max_model_len, buffer_len=forms.longest_buffer, dtype=dtype,
                state_dtype=state_dtype, record_dtype=record_dtype,
            )  # fmt: skip
            budget -= draft_model.budget
        plan = plan_memory(
            shape,
            budget=budget,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            buffer_len=forms.longest_buffer,
            kv_only_len=forms.kv_only_len,
            dtype=dtype,
            state_dtype=state_dtype,
            record_dtype=record_dtype,
            num_draft_tokens=config.num_draft_tokens,
        )
        return cls(config, folder, model_config, plan, forms, tokenizer, draft_model, ranks)

    @property
    def stats(self) -> EngineStats:
        """The counters and pools as they are now; may be read from any thread."""
        disk = None if self._offload is None else self._offload.tier.stats
        return read_stats(self._scheduler, self._memory, self._runner.residency, self._speculator, disk)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        options: RequestOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Queue a request.

        Raises:
            InvalidRequestError: the prompt or a parameter cannot be served; nothing was queued.
            QueueFullError: too many requests wait; nothing was queued.
        """
        if request_id in self._requests:
            raise InvalidRequestError(f"a request with id {request_id!r} is already running", "request_id")
        max_len = self._check_lengths(len(prompt_token_ids), params.max_tokens)
        vocab_size = self.model_config.vocab_size
        for token_id in prompt_token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"token id {token_id} is outside the vocabulary (0 to {vocab_size - 1})", "prompt"
                )
        params.validate(vocab_size)
        structure = params.structured_outputs
        grammar = None if structure is None else self.grammars.compile(structure, prompt_token_ids)
        request = Request(
            request_id,
            params,
            list(prompt_token_ids),
            len(prompt_token_ids),
            max_len,
            SamplingState(params, prompt_token_ids, self.eos_token_ids, grammar),
            IncrementalDetokenizer(self.tokenizer, params),
            options,
        )
        self._scheduler.add(request)
        self._requests[request_id] = request

    def _check_lengths(self, prompt_len: int, max_tokens: int | None) -> int:
        """Return the length at which a request ends."""
        if prompt_len == 0:
            raise InvalidRequestError("the prompt is empty: it must hold at least one token", "prompt")
        if prompt_len >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {prompt_len} tokens; the context holds {self.max_model_len}, output included: "
                f"shorten the prompt to {self.max_model_len - 1} tokens or less",
                "prompt",
            )
        room = self.max_model_len - prompt_len
        if max_tokens is not None and max_tokens > room:
            raise InvalidRequestError(
                f"max_tokens is {max_tokens}, but a prompt of {prompt_len} tokens leaves {room} of the context of "
                f"{self.max_model_len}: ask for {room} or less",
                "max_tokens",
            )
        return prompt_len + (room if max_tokens is None else max_tokens)

    def abort_request(self, request_id: str) -> None:
        """Forget a request and free its memory; an unknown id is ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._finish(request)

    def reset_prefix_cache(self) -> None:
        """Forget what earlier requests left behind; running requests keep what they use."""
        if self._memory.prefixes is not None:
            self._memory.prefixes.clear()

    def prepare(self) -> bool:
        """Use a moment without work, a few milliseconds, for what later steps need; return whether there is more."""
        return self._runner.residency.take_ahead()

    def take_memory(self) -> None:
        """Take the whole memory budget from the system now, so that no step has to wait for it."""
        self._runner.residency.take_all()

    def close(self) -> None:
        """Save what is cached, if there is a folder for it; end other ranks. The engine cannot be used afterwards."""
        if self._offload is not None:
            self._offload.close()
        if self._ranks is not None:
            self._ranks.close()

    def has_work(self) -> bool:
        """Return whether a step would do anything."""
        return bool(self._requests)

    def step(self, before_computing: Callable[[], None] | None = None) -> list[CompletionDelta]:
        """Schedule, run, commit; return what each request that got a token gained.

        If that fails, all requests and prefixes are forgotten, for nobody knows what has been written, and the
        exception is raised.

        Args:
            before_computing: is called when what follows is long and leaves the interpreter to other threads.
        """
        try:
            return self._step(before_computing or _nothing)
        except BaseException:
            for request in self._requests.values():
                self._finish(request, publish=False)
            self._requests.clear()
            self.reset_prefix_cache()
            raise

    def _step(self, before_computing: Callable[[], None]) -> list[CompletionDelta]:
        drafts = None
        if self._speculator is not None:
            # Drafters may write to pages that are taken for them, so nothing may still have to be read from there.
            self._runner.do_memory_work()
            before_computing()
            drafts = self._speculator.draft(self._scheduler.decoding)
        began = time.perf_counter()
        batch = self._scheduler.schedule(drafts)
        if self._speculator is None:
            before_computing()
        if not batch:
            return []
        ran = time.perf_counter()
        output = self._runner.run(batch)
        if self._offload is not None:
            self._offload.observe(sum(segment.num_tokens for segment in batch), time.perf_counter() - ran)
        logits, ends = Logits(output.logits), list(accumulate(output.num_logits))
        for segment, count, end in zip(batch, output.num_logits, ends, strict=True):
            if segment.request.scores_prompt:
                score_prompt(segment.request, logits.rows[end - count : end])
        places = self._scheduler.commit(batch)
        complete = [batch[place] for place in places]
        extensions = [self._extend(batch[place], logits, ends[place]) for place in places]
        if self._speculator is not None:
            accepted = {s.request: e.accepted for s, e in zip(complete, extensions, strict=True)}
            self._speculator.observe(batch, accepted, output.hidden, time.perf_counter() - began)
        return [self._report(s.request, extension) for s, extension in zip(complete, extensions, strict=True)]

    def _extend(self, segment: Segment, logits: Logits, end: int) -> Extension:
        """Append to a request's output what its rows, which end at ``end``, give; keep what its drafts brought."""
        request, draft = segment.request, segment.draft
        row = end - 1 - len(draft.token_ids)
        extension = extend_output(request, logits, row, draft, self.eos_token_ids)
        if request.num_computed_tokens == request.num_prefill_tokens and extension.token_ids:
            self._scheduler.publish(request, "prompt")
        self._scheduler.waiting.charge(request, output=len(extension.token_ids))
        if draft.token_ids:
            self._scheduler.accept(request, extension.accepted)
        return extension

    def _report(self, request: Request, extension: Extension) -> CompletionDelta:
        """Return what a request gained, and free its memory if it ends."""
        finish, stop_reason = extension.finish_reason, extension.stop_reason
        if finish is not None:
            if finish is FinishReason.ABORT:
                logger.error("request %s: %s", request.request_id, stop_reason)
            self._finish(request, publish=finish is not FinishReason.ABORT)
            del self._requests[request.request_id]
        scored = None if request.params.prompt_logprobs is None else request.prompt_logprobs
        return CompletionDelta(
            request.request_id,
            extension.text,
            extension.token_ids,
            extension.logprobs,
            finish,
            stop_reason,
            request.num_prompt_tokens,
            request.num_output_tokens,
            request.num_cached_tokens,
            request.scheduled_at,
            request.num_draft_tokens,
            request.num_accepted_tokens,
            scored if len(extension.token_ids) == request.num_output_tokens else None,
        )

    def _finish(self, request: Request, publish: bool = True) -> None:
        if self._speculator is not None:
            self._speculator.forget(request, publish)
        self._scheduler.finish(request, publish=publish)

    def check_integrity(self) -> None:
        """Check that memory and requests agree; for tests and for an idle server.

        Raises:
            RuntimeError: something is lost or held twice.
        """
        self._memory.check_integrity()
        self._scheduler.waiting.check_integrity()
        if self._memory.rows.num_used != len(self._scheduler.running):
            raise RuntimeError("rows in use are not the ones of the running requests")
        if len(self._requests) != len(self._scheduler.running) + len(self._scheduler.waiting):
            raise RuntimeError("a request is neither running nor waiting")


def _nothing() -> None:
    pass


def _read_generation_config(folder: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("ignoring %s/generation_config.json, which is not valid JSON: %s", folder, error)
        return {}
    return values


def _eos_token_ids(generation: dict[str, Any], config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    listed = generation.get("eos_token_id", [])
    ids = {*config.eos_token_ids, *([listed] if isinstance(listed, int) else listed or ())}
    return frozenset(ids if tokenizer.eos_token_id is None else {*ids, tokenizer.eos_token_id})
