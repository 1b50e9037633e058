"""What speculative decoding brings: throughput with and without it, requests that fit, time of verification.

    python benchmarks/speculative.py --out benchmarks/results/speculative.json     # on a quiet machine

The engine is compared with itself, in one process, rounds with and without drafts in turn, on the dense
benchmark checkpoint. Its weights are random, so what it says is laid down: every token is sampled as usual, and then
replaced by the next one of a given text. The drafters see real texts that way, and do or do not find what is repeated
in them: code with a name replaced, summaries that quote, prose. An oracle, whose guesses are right with a given
probability each, stands for drafters of any quality. Timed is decoding alone, from when all prompts have been computed
until the first request ends, so that all steps have the same number of requests.

Capacity is that of capacity.py with four drafts in every step, against five float32 states and convolution states per
request. Verification of eight drafts, folds included, is timed against nine steps of the recurrence, which is what a
system that stores a state for each draft has to do at least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from unittest import mock

import torch

import capacity
import speculative_peers
from checkpoints import checkpoint
from kvbuffer import SamplingParams
from kvbuffer.bench import machine
from kvbuffer.bench.forms import recurrent, verify
from kvbuffer.bench.measure import measure
from kvbuffer.engine import output
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.drafter import Draft, Drafter
from kvbuffer.engine.speculative.speculator import SpeculativeStats
from kvbuffer.ops.cost import LayerShape
from kvbuffer.ops.rule import GATED_DELTANET
from kvbuffer.tokenizer import Tokenizer
from speculative_texts import TEXTS, Script, scripts

PROMPT_LEN, OUTPUT_LEN, NUM_DRAFTS = 192, 96, 8
#: So many texts are run one after the other where fewer are to run at once.
LEAST_TEXTS = 4
ACCEPTANCE = (0.5, 0.7, 0.9)
CASES = [*(f"{text}, ngram" for text in TEXTS), *(f"prose, oracle {acceptance}" for acceptance in ACCEPTANCE)]
PARTS = ("throughput", "operator", "peers", "capacity")
CAPACITY_DRAFTS = 4
CAPACITY_CASES = (capacity.Case("1 to 128 tokens", 1, 128), capacity.Case("512 tokens", 512, 512, 1 / 8))
#: What tells the rows of a table apart.
ROW_KEY = ("text", "drafter", "batch")


class Oracle(Drafter):
    """Knows the text, and gets each token right with a given probability."""

    def __init__(self, acceptance: float) -> None:
        self.acceptance, self.random = acceptance, Random(0)

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[Draft]:
        """Guess the next tokens."""
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            done = request.num_output_tokens
            guesses = SCRIPTS[id(request.sampling)][done : done + limit]
            drafts.append(Draft([g if self.random.random() < self.acceptance else g ^ 1 for g in guesses]))
        return drafts


#: What each request is going to say, by its sampling state.
SCRIPTS: dict[int, list[int]] = {}
_sample_row = output.sample_row


def _scripted(logits, row, state):
    """Sample as usual, then say what is laid down."""
    sampled = _sample_row(logits, row, state)
    return sampled._replace(token_id=SCRIPTS[id(state)][state.num_output_tokens])


def run(engine: Engine, texts: Sequence[Script]) -> tuple[int, float]:
    """Let the texts be said until one ends; return tokens and seconds from when all prompts have been computed."""
    SCRIPTS.clear()
    for number, (prompt, said) in enumerate(texts):
        params = SamplingParams(temperature=0.0, max_tokens=len(said), ignore_eos=True)
        engine.add_request(str(number), prompt, params)
        SCRIPTS[id(engine._requests[str(number)].sampling)] = said
    while engine.stats.num_waiting or any(request.is_prefilling for request in engine._scheduler.running):
        engine.step()
    began, tokens = time.perf_counter(), 0
    ended = False
    while not ended:
        deltas = engine.step()
        tokens += sum(len(delta.token_ids) for delta in deltas)
        ended = any(delta.finish_reason is not None for delta in deltas)
    seconds = time.perf_counter() - began
    for number in range(len(texts)):
        engine.abort_request(str(number))
    return tokens, seconds


def run_in_turn(engine: Engine, texts: Sequence[Script], batch: int) -> float:
    """Run the texts, ``batch`` at a time; return tokens per second."""
    runs = [run(engine, texts[i : i + batch]) for i in range(0, len(texts), batch)]
    return sum(tokens for tokens, _ in runs) / sum(seconds for _, seconds in runs)


def throughput(batches: Sequence[int], chosen: Sequence[str], rounds: int) -> Iterator[dict]:
    """Yield the rows of the throughput table."""
    options = {
        "model": str(checkpoint("dense")), "max_model_len": 512, "max_num_seqs": 32, "memory": 768 << 20,
        "enable_prefix_caching": False, "show_progress": False,
    }  # fmt: skip
    plain = Engine.from_config(EngineConfig(**options))
    config = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS}
    drafting = Engine.from_config(EngineConfig(**options, speculative_config=config))
    speculator = drafting._speculator
    prompt_lookup = speculator.drafter
    cases: list[tuple[str, str, Drafter]] = [(kind, "ngram", prompt_lookup) for kind in TEXTS]
    cases += [("prose", f"oracle {acceptance}", Oracle(acceptance)) for acceptance in ACCEPTANCE]
    cases = [case for case in cases if f"{case[0]}, {case[1]}" in chosen]
    for batch in batches:
        for kind, name, drafter in cases:
            texts = scripts(kind, max(batch, LEAST_TEXTS), drafting.tokenizer, PROMPT_LEN, OUTPUT_LEN)
            speculator.drafter = drafter
            run_in_turn(plain, texts, batch)
            run_in_turn(
                drafting, texts, batch
            )  # what steps cost and what is accepted is known from now on, as in a running server
            speculator.stats = SpeculativeStats(num_accepted_tokens_per_pos=[0] * NUM_DRAFTS)
            began = time.perf_counter()
            speeds = [(run_in_turn(plain, texts, batch), run_in_turn(drafting, texts, batch)) for _ in range(rounds)]
            stats, seconds = speculator.stats, time.perf_counter() - began
            yield {
                    "text": kind, "drafter": name, "batch": batch,
                    "plain": round(statistics.median(speed for speed, _ in speeds), 1),
                    "speculative": round(statistics.median(speed for _, speed in speeds), 1),
                    "ratio": round(statistics.median(fast / slow for slow, fast in speeds), 3),
                    "ratios": [round(fast / slow, 3) for slow, fast in speeds],
                    "drafted": stats.num_draft_tokens,
                    "accepted_share": round(stats.num_accepted_tokens / max(1, stats.num_draft_tokens), 3),
                    "mean_accepted_length": round(stats.mean_accepted_length, 2),
                    "draft_seconds": round(stats.draft_seconds, 4),
                    "seconds": round(seconds, 2),
            }  # fmt: skip


def capacity_rows() -> Iterator[dict]:
    """Yield the rows of the table of requests that fit: Qwen3-Next's shapes simulated, the demo model for real."""
    for case in CAPACITY_CASES:
        for tier in capacity.TIERS:
            shape = capacity.SHAPES["Qwen3-Next-80B-A3B"]
            yield {"model": "Qwen3-Next-80B-A3B"} | capacity.measure(shape, 8 << 30, case, tier, CAPACITY_DRAFTS)
    for tier in (capacity.TIERS[0], capacity.TIERS[2]):
        yield {"model": "demo"} | capacity.run_engine(CAPACITY_CASES[-1], tier, 32 << 20, CAPACITY_DRAFTS)


def operator_rows(rounds: int) -> list[dict]:
    """Return the rows of the table of verification times; heads as in Qwen3-Next."""
    shape = LayerShape(GATED_DELTANET, 16, 32, 128, 128)
    tiers = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int8, torch.bfloat16)]
    rows, _ = measure(shape, tiers, [recurrent(), verify(NUM_DRAFTS, 16)], 32, 540_000_000, rounds)
    steps = {
        row.state_dtype: row.seconds for row in rows if row.form == recurrent().name and row.backend == rows[0].backend
    }
    return [
        {
            "states": row.state_dtype, "records": row.record_dtype, "batch": row.batch, "drafts": NUM_DRAFTS,
            "error": row.error, "ms": round(1e3 * row.seconds, 2),
            "stored_states_ms": round(1e3 * row.tokens * steps[row.state_dtype], 2),
            "ratio": round(row.tokens * steps[row.state_dtype] / row.seconds, 2),
            "ratio_to_float32": round(row.tokens * steps["float32"] / row.seconds, 2),
        }
        for row in rows if row.form == verify(NUM_DRAFTS, 16).name
    ]  # fmt: skip


def markdown(result: dict) -> str:
    """The tables."""
    lines = []
    if rows := result.get("throughput"):
        lines += [
            "| text | drafter | batch | tokens/s without | with | ratio | accepted | tokens per step with a draft |"
        ]
        lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
        for row in rows:
            lines.append(
                f"| {row['text']} | {row['drafter']} | {row['batch']} | {row['plain']} | {row['speculative']} "
                f"| {row['ratio']:.2f} | {row['accepted_share']:.0%} | {row['mean_accepted_length']} |"
            )
    if rows := result.get("capacity"):
        lines += ["", "| model | requests of | states / records | a state per draft | ours | ratio |"]
        lines += ["|---|---|---|---:|---:|---:|"]
        for row in rows:
            lines.append(
                f"| {row['model']} | {row['case']} | {row['states']} / {row['records']} | {row['baseline']} "
                f"| {row.get('served', row.get('ran_at_once'))} | {row['ratio']:.2f} |"
            )
    if rows := result.get("operator"):
        lines += ["", "| states / records | 9 steps, ms | verifying 8 drafts, ms | ratio | to float32's steps |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for row in rows:
            lines.append(
                f"| {row['states']} / {row['records']} | {row['stored_states_ms']} | {row['ms']} | {row['ratio']:.2f} "
                f"| {row['ratio_to_float32']:.2f} |"
            )
    if rows := result.get("peers"):
        lines += ["", "| server | choices | tokens/s | over without speculation |", "|---|---:|---:|---:|"]
        for row in rows:
            lines.append(f"| {row['server']} | {row['choices']} | {row['tokens_per_second']} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def save(result: dict, args: argparse.Namespace) -> None:
    """Write the results if there is a file."""
    result |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {"rounds": args.rounds, "prompt_len": PROMPT_LEN, "output_len": OUTPUT_LEN, "drafts": NUM_DRAFTS},
        "machine": {k: v for k, v in machine.describe().items() if not k.endswith(("_bandwidth", "_peak"))},
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--cases", choices=CASES, nargs="*", default=CASES, metavar="CASE", help="'TEXT, DRAFTER'")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file whose rows are replaced; tables go beside it")
    args = parser.parse_args()
    result: dict = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    rows = {tuple(row.get(name) for name in ROW_KEY): row for row in result.get("throughput", [])}
    if "throughput" in args.parts:
        with mock.patch.object(output, "sample_row", _scripted):
            for row in throughput(args.batches, args.cases, args.rounds):
                print(row, flush=True)
                rows[tuple(row.get(name) for name in ROW_KEY)] = row
                # Rows may be measured in runs of their own.
                result["throughput"] = sorted(rows.values(), key=lambda row: row["batch"])
                save(result, args)
    if "operator" in args.parts:
        result["operator"] = operator_rows(args.rounds)
        save(result, args)
    if "peers" in args.parts:
        tokenizer = Tokenizer(checkpoint("dense"))
        texts = scripts("editing code", 2, tokenizer, PROMPT_LEN, OUTPUT_LEN)
        result["peers"] = speculative_peers.measure(texts, args.rounds)
        save(result, args)
    if "capacity" in args.parts:
        result["capacity"] = []
        for row in capacity_rows():
            print(row, flush=True)
            result["capacity"].append(row)
            save(result, args)


if __name__ == "__main__":
    main()
