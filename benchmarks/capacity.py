"""How many requests fit a fixed memory budget at once, against a float32 state preallocated for each.

    python benchmarks/capacity.py --out benchmarks/results/capacity.json

The engine's own planner, memory and scheduler run with the byte sizes of real models, but without the models: clients
send a request, let it decode to its end, and send the next; the result is the most clients for which no request ever
waits for memory or is preempted. The baseline allocates per request what vLLM and SGLang do: a float32 state, a
convolution state of W - 1 rows in the model's dtype, and attention pages for as many tokens as it has in the end,
without loss.

The server is the same for all cases: up to 32,768 tokens, with prefix caching. `on paper` is the ratio if every byte
went where it is needed at the moment: the baseline's bytes of a request over the mean of ours. `linear layers` is the
same without the pages of full attention, which are alike: for systems that give the states a budget of their own.
Whether the engine itself serves what the simulation says is tried on the demo model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch

from bare import bare_request, fixed_forms
from kvbuffer.bench import machine
from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import PROMPT_TAIL, MemoryPlan, plan_memory, record_pages
from kvbuffer.cache.shapes import CacheShape, LinearShape
from kvbuffer.engine.config import DTYPES, STATE_DTYPES, EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import Request
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.engine.scheduler import Scheduler
from kvbuffer.engine.speculative.drafter import Draft, Drafter
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.weights import resolve_model
from kvbuffer.ops.attention import PAGE_SIZE
from kvbuffer.tokenizer import Tokenizer

LONGEST = 32768
BUFFER_LEN = 16
COPIES = 8
#: (states, records)
TIERS = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("int8", "bfloat16"))


def _shape(linear_layers: int, attention_layers: int, value_heads: int, kv_heads: int) -> CacheShape:
    types = ("linear_attention",) * linear_layers + ("full_attention",) * attention_layers
    return CacheShape(types, LinearShape(16, value_heads, 128, 128, 4), kv_heads, 256, LONGEST)


#: Of the defaults of transformers' Qwen3NextConfig and Qwen3_5TextConfig. Qwen3.5-35B-A3B (Qwen3_5MoeTextConfig) has 30
#: and 10 of Qwen3-Next's layers, hence the same ratios.
SHAPES = {
    "Qwen3-Next-80B-A3B": _shape(36, 12, 32, 2),
    "Qwen3.5-9B": _shape(24, 8, 32, 4),
}


class Case(NamedTuple):
    """What clients send.

    Attributes:
        name: for the table.
        shortest, longest: tokens that a request has in the end, uniform between these.
        output: share of them that is generated.
        copies: requests that have a prompt in common, one client each.
    """

    name: str
    shortest: int
    longest: int
    output: float = 0.5
    copies: int = 1

    def lengths(self, rng: random.Random) -> tuple[int, int]:
        """Prompt and final length of the next request."""
        final = max(2, rng.randint(self.shortest, self.longest))
        if self.copies > 1:
            # Ends when the buffer, in which a prompt leaves its last tokens, is full.
            return final, final + BUFFER_LEN - PROMPT_TAIL
        return max(1, min(final - 1, round(final * (1 - self.output)))), final


CASES = (
    *(Case(f"{n} tokens", n, n) for n in (16, 32, 64, 128)),
    Case("1 to 128 tokens", 1, 128),
    Case("4,096 tokens", 4096, 4096, 1 / 64),
    Case("32,768 tokens", LONGEST, LONGEST, 1 / 512),
    Case(f"{COPIES} samples of 500 tokens", 488, 512, copies=COPIES),
)


def make_plan(
    shape: CacheShape, budget: int, tier: tuple[str, str], max_num_seqs: int, num_draft_tokens: int = 0
) -> MemoryPlan:
    """A plan beside bfloat16 weights, KV only for as long as records are smaller than a state."""
    state, record = STATE_DTYPES[tier[0]], DTYPES[tier[1]]
    linear = shape.linear
    rows = linear.num_value_heads * linear.key_head_dim
    state_bytes = rows * (linear.value_head_dim * state.itemsize + (4 if tier[0] == "int8" else 0))
    record_bytes = (linear.key_dim + linear.value_dim) * record.itemsize + 4 * linear.num_value_heads
    return plan_memory(
        shape, budget=budget, max_model_len=min(LONGEST, shape.max_position_embeddings), max_num_seqs=max_num_seqs,
        buffer_len=BUFFER_LEN, kv_only_len=min(128, state_bytes // record_bytes), dtype=torch.bfloat16,
        state_dtype=state, record_dtype=record, num_draft_tokens=num_draft_tokens,
    )  # fmt: skip


class Clients:
    """Clients that always have one request each at the server, at different places in it.

    Args:
        case: what they send.
        count: how many; a multiple of the copies.
    """

    def __init__(self, case: Case, count: int) -> None:
        self._case, self._rng, self._number = case, random.Random(0), 0
        self._groups = count // case.copies
        self._active: list[list[Request]] = []
        self._span = max(1, round(case.longest * case.output)) if case.copies == 1 else BUFFER_LEN - PROMPT_TAIL
        self.steps = 4 * self._span

    def arrivals(self, step: int) -> Iterator[Request]:
        """The requests to add before this step."""
        for group in self._active:
            # The first copy has been computed: the others find its prompt in the cache.
            if len(group) == 1 and self._case.copies > 1 and group[0].num_computed_tokens:
                first = group[0]
                prompt = first.token_ids[: first.num_prompt_tokens]
                for _ in range(self._case.copies - 1):
                    group.append(self._request(list(prompt), first.max_len))
                yield from group[1:]
        self._active = [g for g in self._active if not all(len(r.token_ids) >= r.max_len for r in g)]
        wanted = min(self._groups, 1 + step * self._groups // self._span)
        for _ in range(wanted - len(self._active)):
            prompt_len, final = self._case.lengths(self._rng)
            request = self._request([self._number] * prompt_len, final)
            self._active.append([request])
            yield request

    def _request(self, prompt: list[int], max_len: int) -> Request:
        self._number += 1
        return bare_request(str(self._number), prompt, max_len)


def serves(plan: MemoryPlan, case: Case, count: int) -> int | None:
    """Return the most requests that ran at once if ``count`` clients never have to wait for memory; None if they do.

    Where the plan has room for drafts, every request that decodes has one, of which any number of tokens is accepted.
    """
    memory = RequestMemory(dataclasses.replace(plan, max_num_seqs=count))
    # A fixed policy does not depend on the shape.
    forms = fixed_forms(LinearShape(1, 1, 128, 128, 4), BUFFER_LEN, plan.kv_only_len)
    scheduler = Scheduler(memory, forms, max_num_batched_tokens=1 << 30)
    clients, most, rng = Clients(case, count), 0, random.Random(1)
    for step in range(clients.steps):
        for request in clients.arrivals(step):
            scheduler.add(request)
        rooms = {r: min(plan.num_draft_tokens, r.max_len - len(r.token_ids) - 1) for r in scheduler.decoding}
        drafts = {request: Draft([0] * room) for request, room in rooms.items() if room > 0}
        batch = scheduler.schedule(drafts)
        most = max(most, len(scheduler.running))
        if (
            scheduler.waiting
            or scheduler.num_preemptions
            or any(s.draft != drafts.get(s.request, s.draft) for s in batch)
        ):
            return None
        for segment in [batch[place] for place in scheduler.commit(batch)]:
            request = segment.request
            if request.num_computed_tokens == request.num_prefill_tokens:
                scheduler.publish(request, "prompt")
            accepted = range(rng.randint(0, len(segment.draft.token_ids)))
            request.token_ids += [-int(request.request_id)] * (1 + len(accepted))
            if segment.draft.token_ids:
                scheduler.accept(request, accepted)
            if len(request.token_ids) >= request.max_len:
                scheduler.finish(request)
    memory.check_integrity()
    return most


def most_clients(case: Case, plan: MemoryPlan, guess: int) -> int:
    """Return the most requests at once, by bisection over the number of clients, within 2 %.

    Args:
        case: what the clients send.
        plan: of the server.
        guess: about how many requests that might be; where the search begins.
    """
    low, high, best = 0, max(1, guess // case.copies), 0
    while (most := serves(plan, case, high * case.copies)) is not None:
        low, high, best = high, high + max(1, high // 16), most
    while high - low > max(1, high // 50):
        middle = max(low + 1, high - max(1, high // 16)) if not low else (low + high) // 2
        most = serves(plan, case, middle * case.copies)
        if most is None:
            high = middle
        else:
            low, best = middle, most
    return best


def baseline_bytes(shape: CacheShape, case: Case, num_draft_tokens: int = 0) -> float:
    """Mean bytes of a request with a float32 state of its own, at its end; copies share whole pages of the prompt.

    For each draft token there is one more state.
    """
    return (1 + num_draft_tokens) * baseline_linear_bytes(shape) + _attention_bytes(shape, case)


def baseline_linear_bytes(shape: CacheShape) -> int:
    """What the linear-attention layers take of that."""
    linear = shape.linear
    state = linear.num_value_heads * linear.key_head_dim * linear.value_head_dim * 4
    conv = (linear.conv_kernel - 1) * linear.conv_dim * 2
    return shape.num_linear_layers * (state + conv)


def _attention_bytes(shape: CacheShape, case: Case) -> float:
    token = shape.num_attention_layers * 2 * shape.num_kv_heads * shape.head_dim * 2
    tokens = (case.shortest + case.longest) / 2
    if case.copies > 1:
        shared = tokens // PAGE_SIZE * PAGE_SIZE
        tokens = shared / case.copies + PAGE_SIZE
    return tokens * token


def our_bytes(shape: CacheShape, plan: MemoryPlan, case: Case) -> dict[str, float]:
    """Mean bytes of a request over its life, whole pages counted, by kind."""
    each, rng, slots, pages, count = plan.block_bytes, random.Random(0), 0.0, 0, 0
    for _ in range(200):
        prompt, final = case.lengths(rng)
        for tokens in range(prompt, final):
            count += 1
            if case.copies > 1:
                slots += 1 / case.copies
                pages += record_pages(PROMPT_TAIL + tokens - prompt)
            elif tokens <= plan.kv_only_len:
                pages += record_pages(tokens)
            else:
                slots += 1
                pages += record_pages(1 + tokens % BUFFER_LEN)
    return {
        "state": each.slot * slots / count,
        "records": each.record_page * pages / count,
        "ring": each.ring,
        "attention": _attention_bytes(shape, case),
    }


def measure(shape: CacheShape, budget: int, case: Case, tier: tuple[str, str], num_draft_tokens: int = 0) -> dict:
    """One row of the table."""
    per_request = baseline_bytes(shape, case, num_draft_tokens)
    baseline = int(budget / per_request)
    plan = make_plan(shape, budget, tier, 64 * baseline, num_draft_tokens)
    parts = our_bytes(shape, plan, case)
    count = most_clients(case, plan, int(budget / sum(parts.values())))
    return {
        "case": case.name,
        "states": tier[0],
        "records": tier[1],
        "baseline": baseline,
        "served": count,
        "ratio": round(count / baseline, 2),
        "on_paper": round(per_request / sum(parts.values()), 2),
        "linear_layers": round(
            (1 + num_draft_tokens) * baseline_linear_bytes(shape) / (sum(parts.values()) - parts["attention"]), 2
        ),
        "mib_per_request": {name: round(value / 2**20, 2) for name, value in parts.items()},
        "baseline_mib_per_request": round(per_request / 2**20, 2),
    }


class Guesses(Drafter):
    """Proposes as much as may be; what, does not matter."""

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Guess."""
        return [Draft(list(range(limit))) for limit in limits]


def run_engine(folder: Path, case: Case, tier: tuple[str, str], budget: int, num_draft_tokens: int = 0) -> dict:
    """The same with the engine itself and the checkpoint in ``folder``, for the clients found in simulation."""
    model = ModelConfig.from_folder(folder)
    shape = model.cache_shape
    baseline = int(budget / baseline_bytes(shape, case, num_draft_tokens))
    plan = make_plan(shape, budget, tier, 64 * baseline, num_draft_tokens)
    count = most_clients(case, plan, int(budget / sum(our_bytes(shape, plan, case).values())))
    speculative = {"method": "ngram", "num_speculative_tokens": num_draft_tokens, "adaptive": False}
    config = EngineConfig(
        str(folder), dtype="bfloat16", max_num_seqs=count, max_num_batched_tokens=1 << 16, show_progress=False,
        speculative_config=speculative if num_draft_tokens else None,
    )  # fmt: skip
    forms = fixed_forms(shape.linear, BUFFER_LEN, plan.kv_only_len)
    engine = Engine(config, folder, model, dataclasses.replace(plan, max_num_seqs=count), forms, Tokenizer(folder))
    if engine._speculator is not None:
        engine._speculator.drafter = Guesses()
    clients, most, finished = Clients(case, count), 0, 0
    requests: dict[str, Request] = {}
    for step in range(clients.steps):
        for request in clients.arrivals(step):
            requests[request.request_id] = request
            output = request.max_len - request.num_prompt_tokens
            params = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True)
            prompt = [token % model.vocab_size for token in request.token_ids]
            engine.add_request(request.request_id, prompt, params)
        deltas = engine.step()
        for delta in deltas:
            request = requests[delta.request_id]
            request.token_ids += delta.token_ids
            request.num_computed_tokens = len(request.token_ids) - 1
        ended = [delta for delta in deltas if delta.finish_reason is not None]
        finished += len(ended)
        # Those that have just finished ran, too.
        most = max(most, engine.stats.num_running + len(ended))
    engine.check_integrity()
    stats = engine.stats
    return {
        "case": case.name, "states": tier[0], "records": tier[1], "baseline": baseline, "simulated": count,
        "ran_at_once": most, "ratio": round(most / baseline, 2), "preemptions": stats.num_preemptions,
        "steps_with_requests_waiting": sum(stats.delays.values()), "finished": finished,
        "drafted": 0 if stats.speculative is None else stats.speculative.num_draft_tokens,
        "resident_mib": round(stats.resident_bytes / 2**20, 1),
    }  # fmt: skip


def markdown(result: dict) -> str:
    """The tables."""
    head = (
        "| case | states / records | baseline | served | on paper | linear layers "
        "| state + records + ring + attention, MiB |"
    )
    lines = []
    for name, rows in result["models"].items():
        lines += [f"### {name}\n", head, "|---|---|---:|---:|---:|---:|---|"]
        for row in rows:
            parts = " + ".join(f"{value:.1f}" for value in row["mib_per_request"].values())
            lines.append(
                f"| {row['case']} | {row['states']} / {row['records']} | {row['baseline']} "
                f"| {row['served']} ({row['ratio']:.2f}x) | {row['on_paper']:.2f}x | {row['linear_layers']:.2f}x "
                f"| {parts} against {row['baseline_mib_per_request']:.1f} |"
            )
        lines.append("")
    for row in result.get("engine", []):
        waiting = row["steps_with_requests_waiting"]
        lines.append(
            f"Demo model, engine, {row['case']}, {row['states']} / {row['records']}: {row['ran_at_once']} requests at "
            f"once ({row['simulated']} in simulation) against {row['baseline']} ({row['ratio']:.2f}x); "
            f"{row['finished']} finished, {row['preemptions']} preemptions, {waiting} steps with requests waiting.\n"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gib", type=float, default=16.0, help="budget of the simulated models")
    parser.add_argument("--models", choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--engine-mib", type=int, default=32, help="budget of the real engine; 0 leaves it out")
    parser.add_argument("--out", type=Path, help="JSON file, to which the models are added; tables go beside it")
    args = parser.parse_args()
    result: dict = {"models": {}}
    if args.out and args.out.exists():
        result = json.loads(args.out.read_text())
    result |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {"budget_gib": args.gib, "engine_mib": args.engine_mib, "buffer_len": BUFFER_LEN},
        "machine": {key: x for key, x in machine.describe().items() if not key.endswith(("_bandwidth", "_peak"))},
    }
    for name in args.models:
        budget = int(args.gib * 2**30)
        result["models"][name] = rows = []
        for case in CASES:
            for tier in TIERS:
                rows.append(measure(SHAPES[name], budget, case, tier))
                print(json.dumps(rows[-1]), flush=True)
    if args.engine_mib:
        cases = [(CASES[1], TIERS[1]), (CASES[4], TIERS[2]), (CASES[-1], TIERS[2])]
        demo = resolve_model("demo")
        result["engine"] = [run_engine(demo, case, tier, args.engine_mib << 20) for case, tier in cases]
    print(markdown(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result) + "\n")


if __name__ == "__main__":
    main()
