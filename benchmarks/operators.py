"""Where the time of one of our steps goes: a row per operator, beside the least time this machine allows it.

The engine runs in this process with every operator wrapped in a clock, as it is served in serve.py, but that memory
has been used before: what a machine takes to hand out new pages is no operator's time. All requests are in every step
of decode that counts. Times are means over windows of whole buffer cycles, so that folds weigh what they weigh in
service, and medians over windows. The bound of an operator is the larger of the bytes it cannot avoid moving over the
measured read bandwidth, and its arithmetic over the measured peak.

    python benchmarks/operators.py [--model dense] [--concurrency 1 8 32]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from statistics import mean, median
from typing import NamedTuple

import torch
from rich.console import Console

from checkpoints import KINDS, VOCAB_SIZE, checkpoint
from kvbuffer import LLM, SamplingParams
from kvbuffer.bench import machine
from kvbuffer.engine import engine as engine_module
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.forms import LONGEST_BUFFER
from kvbuffer.engine.runner import Runner
from kvbuffer.models import decoder, layers
from kvbuffer.ops.batch import LinearForm
from kvbuffer.ops.blocks import AttentionStruct, Block, Blocks, GatedDeltaStruct, SwigluMlpStruct
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.mlp import SwigluMlp
from kvbuffer.ops.sparse_moe import SparseMoeMlp
from peers import MAX_MODEL_LEN
from report import PREFILL, show_operators

_WINDOWS = 3
_WINDOW_STEPS = LONGEST_BUFFER  # whole cycles of every buffer, whose lengths are powers of two
_PROMPT_LEN = 64
_PREFILL_PROMPTS, _PREFILL_LEN = 8, 512


class Work(NamedTuple):
    """What one call has to do at least."""

    label: str
    num_bytes: int = 0
    num_flops: int = 0


class Clock:
    """Time per label of the current step, each call counted without the wrapped calls inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.work: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])  # calls, bytes, flops
        self._inside = [0.0]  # time of wrapped calls within the running one, per nesting level

    def wrap(self, function: Callable, describe: Callable[..., Work]) -> Callable:
        @wraps(function)
        def timed(*args, **kwargs):
            self._inside.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            elapsed = time.perf_counter() - start
            inner = self._inside.pop()
            self._count(elapsed - inner, describe(result, *args, **kwargs))
            self._inside[-1] += time.perf_counter() - start  # describing is nobody's time
            return result

        return timed

    def split(self, function: Callable, describe: Callable[..., list[tuple[float, Work]]]) -> Callable:
        """As wrap, for a call that is several operators: the time and the work of each."""

        @wraps(function)
        def timed(*args, **kwargs):
            result = function(*args, **kwargs)
            start = time.perf_counter()
            for seconds, work in describe(result, *args, **kwargs):
                self._count(seconds, work)
                self._inside[-1] += seconds
            self._inside[-1] += time.perf_counter() - start
            return result

        return timed

    def _count(self, seconds: float, work: Work) -> None:
        self.seconds[work.label] += seconds
        for place, amount in enumerate((1, work.num_bytes, work.num_flops)):
            self.work[work.label][place] += amount

    def take(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Returns what was gathered since the last call, and forgets it."""
        taken = dict(self.seconds), dict(self.work)
        self.seconds.clear()
        self.work.clear()
        return taken


def install(clock: Clock) -> None:
    """Wraps the operators where the model looks them up, and the engine's own stages."""
    for module, name, describe in (
        (layers, "recurrent_decode", _recurrent_decode),
        (layers, "buffered_decode", _buffered_decode),
        (layers, "buffered_verify", _buffered_verify),
        (layers, "chunked_prefill", _chunked_prefill),
        (layers, "paged_attention", _paged_attention),
        *((layers, name, _streaming(name)) for name in ("attention_inputs", "causal_conv", "gated_delta_inputs")),
        *((engine_module, name, _stage("sample")) for name in ("Logits", "extend_output")),
        *((Linear, name, _linear) for name in ("__call__", "of_add_rms_norm", "of_gated_rms_norm")),
        *((SwigluMlp, name, _swiglu_mlp) for name in ("__call__", "of_add_rms_norm")),
        (decoder.Decoder, "forward", _stage("embedding and Python between operators")),
        (Runner, "do_memory_work", _stage("copies and folds between requests")),
        (Runner, "_inputs", _stage("building the batch")),
        (Engine, "step", _stage("scheduling, committing, text")),
    ):
        setattr(module, name, clock.wrap(getattr(module, name), describe))
    Blocks.__call__ = clock.split(Blocks.__call__, _blocks)
    SparseMoeMlp.__call__ = clock.split(SparseMoeMlp.__call__, lambda result, moe, *_: _sparse_moe(result, moe))


def profile_decode(clock: Clock, engine: Engine, concurrency: int, limits: dict) -> list[dict]:
    """Per-operator rows of a decode step with this many requests, the slowest first.

    Args:
        clock: the installed clock.
        engine: an idle one, for at least so many requests.
        concurrency: requests that decode together.
        limits: read_bandwidth and peaks of this machine, as machine.measure_limits gives them.
    """
    for _ in range(2):
        _submit(engine, concurrency, _PROMPT_LEN, _WINDOW_STEPS)
        while engine.has_work():
            engine.step()
    _submit(engine, concurrency, _PROMPT_LEN, MAX_MODEL_LEN - _PROMPT_LEN)
    while len(engine.step()) < concurrency:
        pass  # prefill, until all decode
    windows = []
    for window in range(-1, _WINDOWS):
        for _ in range(_WINDOW_STEPS):
            if len(engine.step()) != concurrency:
                raise RuntimeError(f"a step did not hold all {concurrency} requests")
        taken = clock.take()
        if window >= 0:
            windows.append(taken)
    for number in range(concurrency):
        engine.abort_request(str(number))
    return _rows(windows, _WINDOW_STEPS, limits)


def profile_prefill(clock: Clock, engine: Engine, limits: dict) -> list[dict]:
    """Per-operator rows of a step of prefill; for the arguments see profile_decode."""
    windows, steps = [], 0
    for window in range(-1, _WINDOWS):
        _submit(engine, _PREFILL_PROMPTS, _PREFILL_LEN, 1)
        steps = 0
        while engine.has_work():
            engine.step()
            steps += 1
        taken = clock.take()
        if window >= 0:
            windows.append(taken)
    return _rows(windows, steps, limits)


def _submit(engine: Engine, count: int, prompt_len: int, output_len: int) -> None:
    generator = torch.Generator().manual_seed(count)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    for number in range(count):
        prompt = torch.randint(3, VOCAB_SIZE, (prompt_len,), generator=generator).tolist()
        engine.add_request(str(number), prompt, params)


def _rows(windows: list[tuple[dict, dict]], steps: int, limits: dict) -> list[dict]:
    flops_per_s = max(limits[name] for name in limits if name.endswith("_peak"))
    rows = []
    for label in {label: None for times, _ in windows for label in times}:
        seconds = median(times.get(label, 0.0) / steps for times, _ in windows)
        works = [work.get(label, (0, 0, 0)) for _, work in windows]
        calls, num_bytes, num_flops = (mean(work[place] / steps for work in works) for place in range(3))
        bound = max(num_bytes / limits["read_bandwidth"], num_flops / flops_per_s)
        row = {"operator": label, "calls": calls, "seconds": seconds}
        rows.append({**row, "bytes": num_bytes, "flops": num_flops, "bound_s": bound})
    return sorted(rows, key=lambda row: -row["seconds"])


# What each operator cannot avoid: weights, states and caches are read once, activations read and written once.


def _nbytes(*values: object) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _stage(label: str) -> Callable[..., Work]:
    return lambda *args, **kwargs: Work(label)


def _streaming(label: str) -> Callable[..., Work]:
    """An operator whose only traffic is its activations: as much in as out."""
    return lambda result, *args, **kwargs: Work(
        label, 2 * _nbytes(*(result if isinstance(result, tuple | list) else [result]))
    )


def _linear(result, linear, *arguments, **_) -> Work:
    """A dense layer, with the norm in front of it if there is one."""
    label = f"linear {linear.in_features} -> {linear.out_features}"
    num_flops = 2 * result.shape[0] * linear.in_features * linear.out_features
    return Work(label, linear.nbytes + _nbytes(*arguments, result), num_flops)


def _swiglu_mlp(result, mlp, *arguments) -> Work:
    weights = mlp.weights
    num_flops = 6 * result.shape[0] * weights.hidden_size * weights.intermediate_size
    return Work("mlp", weights.nbytes + _nbytes(*arguments, result), num_flops)


def _sparse_moe(result, moe) -> list[tuple[float, Work]]:
    experts, tokens, streamed = moe.experts, len(result), _nbytes(result)
    # As many as random tokens choose; which these have chosen is not known here.
    used = experts.num_experts * (1 - (1 - moe.top_k / experts.num_experts) ** tokens)
    flops = 6 * tokens * moe.top_k * experts.hidden_size * experts.intermediate_size
    works = (
        _linear(result[:, :1].expand(-1, experts.num_experts), moe.router, result)._replace(label="norm and routing"),
        _swiglu_mlp(result, moe.shared)._replace(label="shared expert"),
        Work("experts", int(used / experts.num_experts * experts.nbytes) + 2 * streamed, flops),
        Work("sum of experts", 3 * streamed),
    )
    return list(zip(moe.struct.seconds, works, strict=True))


def _paged_attention(result, q, pages, page_table, cu_seqlens, context_lens, gate=None, parents=None) -> Work:
    tokens = int(context_lens.sum()) + q.shape[0]
    num_bytes = tokens * pages[0, :, :, 0].nbytes + _nbytes(q, result)
    lengths = cu_seqlens.diff()
    pairs = int((lengths * context_lens + lengths * (lengths + 1) // 2).sum())  # of a query and a key it sees
    return Work("paged_attention", num_bytes, 4 * pairs * q.shape[1] * q.shape[2])


def _recurrent_decode(result, rule, tokens, states, slots) -> Work:
    heads, key_dim, value_dim = states.data.shape[1:]
    state_bytes = 2 * slots.numel() * states.data[0].nbytes  # read and written
    return Work(
        "recurrent_decode",
        state_bytes + _nbytes(*tokens[:3], result),
        6 * slots.numel() * heads * key_dim * value_dim,
    )


def _chunked_prefill(result, rule, tokens, states, slots, cu_seqlens, fresh) -> Work:
    # Of the arithmetic, only what does not depend on how tokens are taken together: the products with the state.
    heads, key_dim, value_dim = states.data.shape[1:]
    state_bytes = (2 * slots.numel() - int(fresh.sum())) * states.data[0].nbytes
    num_flops = 6 * result.shape[0] * heads * key_dim * value_dim
    return Work("chunked_prefill", state_bytes + _nbytes(*tokens[:3], result), num_flops)


def _buffered_verify(result, rule, tokens, states, slots, records, page_table, fill, cu_seqlens, parents=None) -> Work:
    with_state = slots >= 0
    heads, key_dim, value_dim = states.data.shape[1:]
    state_bytes = int(with_state.sum()) * states.data[0].nbytes
    record_bytes = (int(fill.sum()) + result.shape[0]) * sum(pool[0, :, 0].nbytes for pool in records)
    num_flops = 4 * int((cu_seqlens.diff() * with_state).sum()) * heads * key_dim * value_dim
    return Work("buffered_verify", state_bytes + record_bytes + _nbytes(*tokens[:3], result), num_flops)


def _blocks(result, blocks, inputs):
    parts = []
    for block, seconds in zip(blocks.blocks, blocks.seconds, strict=True):
        if isinstance(block.struct, GatedDeltaStruct):
            parts += _gated_delta_block(block, seconds, result[0], inputs)
        elif isinstance(block.struct, AttentionStruct):
            parts += _attention_block(block, seconds, result[0], inputs.cu_seqlens, inputs.context_lens)
        elif isinstance(block.struct, SwigluMlpStruct):
            parts.append((seconds, _swiglu_mlp(result[0], block.keeps[0], *result)))
        else:
            parts += _sparse_moe(result[0], block.keeps[0])
    return parts


def _gated_delta_block(block: Block, seconds: float, x, inputs) -> list[tuple[float, Work]]:
    layer, _, out_proj = block.keeps
    tokens, value_heads, value_dim = len(x), layer.states.data.shape[1], layer.states.data.shape[3]
    qkv, b, a = x.new_empty(tokens, block.struct.channels), *(x.new_empty(tokens, value_heads) for _ in range(2))
    projected, heads = x.new_empty(tokens, layer.in_proj.out_features), x.new_empty(tokens, value_heads, value_dim)
    forms = [_form(layer, part, [each[part.tokens] for each in (qkv, b, a, heads)]) for part in inputs.sections]
    works = (
        _linear(projected, layer.in_proj, x, x),
        _streaming("causal_conv")(qkv),
        _streaming("gated_delta_inputs")((b, a)),
        Work(" and ".join(work.label for work in forms), *(sum(work[i] for work in forms) for i in (1, 2))),
        _linear(x, out_proj, heads),
    )
    return list(zip([*layer.seconds, seconds - sum(layer.seconds)], works, strict=True))


def _form(layer, part, tensors) -> Work:
    *tokens, heads = tensors
    buffer = (layer.states, part.slots, layer.records, part.page_table, part.fill)
    if part.form is LinearForm.RECURRENT:
        return _recurrent_decode(heads, None, tokens, layer.states, part.slots)
    if part.form is LinearForm.BUFFERED:
        return _buffered_decode(heads, None, tokens, *buffer, part.fold)
    if part.form is LinearForm.CHUNKED:
        return _chunked_prefill(heads, None, tokens, layer.states, part.slots, part.cu_seqlens, part.fresh)
    return _buffered_verify(heads, None, tokens, *buffer, part.cu_seqlens)


def _attention_block(block: Block, seconds: float, x, cu_seqlens, context_lens) -> list[tuple[float, Work]]:
    qkv_proj, *_, pages, out_proj = block.keeps
    tokens, own = len(x), block.struct
    q, projected = x.new_empty(tokens, own.heads, own.dim), x.new_empty(tokens, qkv_proj.out_features)
    works = (
        _linear(projected, qkv_proj, x, x),
        _streaming("attention_inputs")(q),
        _paged_attention(q.flatten(1), q, pages, None, cu_seqlens, context_lens),
        _linear(x, out_proj, q),
    )
    return list(zip([*own.seconds, seconds - sum(own.seconds)], works, strict=True))


def _buffered_decode(result, rule, tokens, states, slots, records, page_table, fill, fold) -> Work:
    requests, folds, recorded = slots.numel(), int(fold.sum()), int(fill.sum())
    # Reading the state for the products with k and q needs it once; a fold writes it once more.
    state_bytes = (requests + folds) * states.data[0].nbytes
    record_bytes = (recorded + requests) * sum(pool[0, :, 0].nbytes for pool in records)
    heads, key_dim, value_dim = states.data.shape[1:]
    folded = int((fill * fold).sum())
    # Two products with the state and, per record, two with its key and two with its value; a fold adds one outer
    # product per record.
    flops = 4 * requests * heads * key_dim * value_dim
    flops += 4 * (recorded - folded + requests) * heads * (key_dim + value_dim)
    flops += 2 * folded * heads * key_dim * value_dim
    return Work("buffered_decode", state_bytes + record_bytes + _nbytes(*tokens[:3], result), flops)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=KINDS, default="dense")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--limits", type=json.loads, help="machine limits as JSON; measured when not given")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    limits = args.limits or machine.measure_limits()
    clock = Clock()
    install(clock)
    options = {"dtype": "bfloat16", "max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": False}
    llm = LLM(str(checkpoint(args.model)), max_num_seqs=max(args.concurrency), show_progress=False, **options)
    profiles = {str(count): profile_decode(clock, llm.engine, count, limits) for count in args.concurrency}
    profiles[PREFILL] = profile_prefill(clock, llm.engine, limits)
    if args.json:
        json.dump(profiles, sys.stdout)
    else:
        show_operators(profiles, Console())
