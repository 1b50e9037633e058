"""Where the time of one of our decode steps goes: a row per operator, beside the least time this machine allows it.

The engine runs in this process with every operator wrapped in a clock. Times are means over whole buffer cycles, so
that the cost of folds is spread as it is in service, and medians over cycles. The bound of an operator is the larger of
the bytes it cannot avoid moving over the measured read bandwidth, and its arithmetic over the measured peak.

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

from checkpoints import KINDS, checkpoint
from kvbuffer import LLM, SamplingParams
from kvbuffer.bench import machine
from kvbuffer.engine import engine as engine_module
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.runner import Runner
from kvbuffer.models import decoder, layers
from kvbuffer.ops.linear import Linear
from kvbuffer.ops.mlp import SwigluMlp
from peers import MAX_MODEL_LEN
from report import show_operators

_CYCLES = 3
_PROMPT_LEN = 64


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
            work = describe(result, *args, **kwargs)
            self.seconds[work.label] += elapsed - inner
            for place, amount in enumerate((1, work.num_bytes, work.num_flops)):
                self.work[work.label][place] += amount
            self._inside[-1] += time.perf_counter() - start  # describing is nobody's time
            return result

        return timed

    def take(self) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Returns what was gathered since the last call, and forgets it."""
        taken = dict(self.seconds), dict(self.work)
        self.seconds.clear()
        self.work.clear()
        return taken


def install(clock: Clock) -> None:
    """Wraps the operators where the model looks them up, and the engine's own stages."""
    for module, name, describe in (
        (layers, "buffered_decode", _buffered_decode),
        (layers, "paged_attention", _paged_attention),
        (layers, "moe_mlp", _moe_mlp),
        *((layers, name, _streaming(name)) for name in ("attention_inputs", "route", "add_rms_norm")),
        *((layers, name, _streaming(name)) for name in ("causal_conv", "gated_delta_inputs", "chunked_prefill")),
        (engine_module, "sample", _streaming("sample")),
        *((Linear, name, _linear) for name in ("__call__", "of_add_rms_norm", "of_gated_rms_norm")),
        *((SwigluMlp, name, _swiglu_mlp) for name in ("__call__", "of_add_rms_norm")),
        (decoder.Decoder, "forward", _stage("embedding and Python between operators")),
        (Runner, "_inputs", _stage("building the batch")),
        (Engine, "step", _stage("scheduling, committing, text")),
    ):
        setattr(module, name, clock.wrap(getattr(module, name), describe))


def profile(clock: Clock, kind: str, concurrency: int, limits: dict) -> list[dict]:
    """Per-operator rows of a decode step with this many requests, the slowest first.

    Args:
        clock: the installed clock.
        kind: dense or moe.
        concurrency: requests that decode together.
        limits: read_bandwidth and peaks of this machine, as machine.measure_limits gives them.
    """
    options = {"dtype": "bfloat16", "max_model_len": MAX_MODEL_LEN, "show_progress": False}
    llm = LLM(str(checkpoint(kind)), max_num_seqs=concurrency, **options)
    engine = llm.engine
    cycle = engine.plan.buffer_len
    params = SamplingParams(temperature=0, max_tokens=(_CYCLES + 1) * cycle + 2, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(concurrency):
        prompt = torch.randint(3, 32768, (_PROMPT_LEN,), generator=generator).tolist()
        engine.add_request(str(number), prompt, params)
    while not all(delta.num_output_tokens > 1 for delta in engine.step()):
        pass  # prefill, and the first decode step of everyone
    for _ in range(cycle):
        engine.step()
    clock.take()
    cycles = []
    for _ in range(_CYCLES):
        for _ in range(cycle):
            engine.step()
        cycles.append(clock.take())
    while engine.has_work():
        engine.step()
    return _rows(cycles, cycle, limits)


def _rows(cycles: list[tuple[dict, dict]], steps: int, limits: dict) -> list[dict]:
    flops_per_s = max(limits[name] for name in limits if name.endswith("_peak"))
    rows = []
    for label in cycles[0][0]:
        seconds = median(times[label] / steps for times, _ in cycles)
        calls, num_bytes, num_flops = (mean(work[label][place] / steps for _, work in cycles) for place in range(3))
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


def _moe_mlp(result, x, expert_ids, expert_weights, experts) -> Work:
    used = torch.unique(expert_ids).numel()
    weights = 3 * experts.hidden_size * experts.intermediate_size
    num_bytes = used * experts.nbytes // experts.num_experts + _nbytes(x, result)
    return Work("moe_mlp", num_bytes, 2 * expert_ids.numel() * weights)


def _paged_attention(result, q, pages, page_table, cu_seqlens, context_lens, gate=None) -> Work:
    tokens = int(context_lens.sum()) + q.shape[0]
    num_bytes = tokens * pages[0, :, :, 0].nbytes + _nbytes(q, result)
    return Work("paged_attention", num_bytes, 4 * tokens * q.shape[1] * q.shape[2])


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
    profiles = {str(count): profile(clock, args.model, count, limits) for count in args.concurrency}
    if args.json:
        json.dump(profiles, sys.stdout)
    else:
        show_operators(profiles, Console())
