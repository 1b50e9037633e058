"""What speculative decoding brings: throughput with and without it, requests that fit, time of verification and steps.

    python benchmarks/speculative.py --out benchmarks/results/speculative.json     # on a quiet machine

The engine is compared with itself, in one process, steps with and without drafts in turn, on the dense benchmark
checkpoint or the one with experts. What it says is laid down, see speculative_script.py: code with a name replaced,
summaries that quote, prose. With no drafter at all, the same engine shows what is noise. Timed is decoding alone, from
when all prompts have been computed until the first request ends, so that all steps have the same number of requests.

Steps in which each request has the same number of drafts are taken apart by operator. Verification of eight drafts,
folds included, is timed against nine steps of the recurrence, which is what a system that stores a state for each draft
has to do at least. Capacity is that of capacity.py with four drafts in every step, against five float32 states and
convolution states per request.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

import capacity
import speculative_peers
import speculative_steps
from checkpoints import KINDS, checkpoint
from kvbuffer.bench import machine
from kvbuffer.bench.forms import recurrent, verify
from kvbuffer.bench.measure import measure
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.engine.speculative.drafter import Drafter
from kvbuffer.engine.speculative.methods import make_drafter
from kvbuffer.engine.speculative.speculator import SpeculativeStats
from kvbuffer.ops.cost import LayerShape
from kvbuffer.ops.rule import GATED_DELTANET
from kvbuffer.tokenizer import Tokenizer
from speculative_script import NUM_DRAFTS, OUTPUT_LEN, PROMPT_LEN, SCRIPTS, Oracle, Run, laid_down, make_engine
from speculative_texts import TEXTS, Script, scripts

#: So many texts are run one after the other where fewer are to run at once.
LEAST_TEXTS = 4
ACCEPTANCE = (0.5, 0.7, 0.9)
LOOKUPS = ("ngram", "suffix")
CASES = [
    "prose, none",
    *(f"{text}, {lookup}" for text in TEXTS for lookup in LOOKUPS),
    *(f"prose, oracle {acceptance}" for acceptance in ACCEPTANCE),
]
#: The steps come last: they leave clocks around the operators.
PARTS = ("throughput", "operator", "peers", "capacity", "steps")
CAPACITY_DRAFTS = 4
CAPACITY_CASES = (capacity.Case("1 to 128 tokens", 1, 128), capacity.Case("512 tokens", 512, 512, 1 / 8))
#: What tells the rows of a table apart.
ROW_KEY = ("text", "drafter", "batch", "drafts", "model", "case", "states", "records", "server", "choices")
#: Parts that are measured for one model at a time, or a few of its cases.
IN_PIECES = ("throughput", "steps")
#: Per part of the result what its table is about, and which values of each row it shows.
TABLES = {
    "throughput": (
        "Tokens per second without and with drafts; the ratio is the median of those of single rounds.",
        ("model", "text", "drafter", "batch", "plain", "speculative", "ratio", "ratios", "accepted_share",
         "mean_accepted_length"),
    ),
    "steps": (
        "Milliseconds of a step by operator, where each of 32 requests has so many drafts; and the tokens it brings.",
        ("model", "drafts", *speculative_steps.GROUPS, "step", "tokens"),
    ),
    "capacity": (
        "Requests that fit: with a stored state per draft, and here.",
        ("model", "case", "states", "records", "baseline", "fit", "ratio"),
    ),
    "operator": (
        "Milliseconds of verifying eight drafts, and of nine steps of the recurrence; the last ratio is to float32's.",
        ("states", "records", "stored_states_ms", "ms", "ratio", "ratio_to_float32"),
    ),
    "peers": (
        "Tokens per second, and over the same server without speculation.",
        ("server", "choices", "tokens_per_second", "ratio"),
    ),
}  # fmt: skip


def speeds(engines: Sequence[Engine], texts: Sequence[Script], batch: int) -> list[float]:
    """Let the engines say the texts, ``batch`` at a time, step by step in turn; return their tokens per second."""
    tokens, seconds = [0] * len(engines), [0.0] * len(engines)
    for begin in range(0, len(texts), batch):
        SCRIPTS.clear()
        runs = [Run(engine, texts[begin : begin + batch]) for engine in engines]
        while not any(run.ended for run in runs):
            for run in runs:
                run.step()
        for i, run in enumerate(runs):
            tokens[i] += run.tokens
            seconds[i] += run.seconds
            run.end()
    return [count / taken for count, taken in zip(tokens, seconds, strict=True)]


def throughput(model: str, batches: Sequence[int], chosen: Sequence[str], rounds: int) -> Iterator[dict]:
    """Yield the rows of the throughput table for one of the benchmark checkpoints."""
    plain = make_engine(model, None)
    drafting = make_engine(model, {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS})
    speculator = drafting._speculator
    for batch in batches:
        for case in chosen:
            kind, name = case.split(", ")
            texts = scripts(kind, max(batch, LEAST_TEXTS), drafting.tokenizer, PROMPT_LEN, OUTPUT_LEN)
            speculator.drafter = make(name, drafting)
            drafting._speculator = None if name == "none" else speculator
            # What steps cost and what is accepted is known afterwards, as in a running server.
            speeds((plain, drafting), texts, batch)
            speculator.stats = stats = SpeculativeStats(num_accepted_tokens_per_pos=[0] * NUM_DRAFTS)
            began = time.perf_counter()
            measured = [speeds((plain, drafting), texts, batch) for _ in range(rounds)]
            seconds = time.perf_counter() - began
            yield {
                "model": model, "text": kind, "drafter": name, "batch": batch,
                "plain": round(statistics.median(speed for speed, _ in measured), 1),
                "speculative": round(statistics.median(speed for _, speed in measured), 1),
                "ratio": round(statistics.median(fast / slow for slow, fast in measured), 3),
                "ratios": [round(fast / slow, 3) for slow, fast in measured],
                "drafted": stats.num_draft_tokens,
                "accepted_share": round(stats.num_accepted_tokens / max(1, stats.num_draft_tokens), 3),
                "mean_accepted_length": round(stats.mean_accepted_length, 2),
                "draft_seconds": round(stats.draft_seconds, 4),
                "seconds": round(seconds, 2),
            }  # fmt: skip


def make(name: str, engine: Engine) -> Drafter:
    """Return a drafter by the name that it has in the table."""
    if name.startswith("oracle"):
        return Oracle(float(name.split()[1]))
    # What was said is said again in the next round: nothing is kept of it.
    config = SpeculativeConfig(
        "suffix" if name == "suffix" else "ngram", NUM_DRAFTS, suffix_decoding_max_cached_tokens=0
    )
    return make_drafter(engine.config, config, engine._model, engine._runner.caches, engine._memory, None)


def capacity_rows() -> Iterator[dict]:
    """Yield the rows of the table of requests that fit: Qwen3-Next's shapes simulated, two models for real.

    The dense model has heads of 128, as Qwen3-Next, the demo model of 64.
    """
    for case in CAPACITY_CASES:
        for tier in capacity.TIERS:
            shape = capacity.SHAPES["Qwen3-Next-80B-A3B"]
            row = capacity.measure(shape, 8 << 30, case, tier, CAPACITY_DRAFTS)
            yield {"model": "Qwen3-Next-80B-A3B"} | row | {"fit": row["served"]}
    for model, budget in (("demo", 32 << 20), ("dense", 256 << 20)):
        for case in CAPACITY_CASES:
            for tier in (capacity.TIERS[0], capacity.TIERS[2]):
                row = capacity.run_engine(checkpoint(model), case, tier, budget, CAPACITY_DRAFTS)
                yield {"model": model} | row | {"fit": row["ran_at_once"]}


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
    tables = []
    for part, (about, names) in TABLES.items():
        rows = [[str(row[name]) for name in names] for row in result.get(part, [])]
        if rows:
            lines = [[name.replace("_", " ") for name in names], ["---"] * len(names), *rows]
            tables.append(f"{about}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def save(result: dict, part: str, args: argparse.Namespace) -> None:
    """Write the results, of which ``part`` is new, if there is a file."""
    result.setdefault("measured", {})[part] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": machine.commit(), "rounds": args.rounds
    }  # fmt: skip
    result["settings"] = {"prompt_len": PROMPT_LEN, "output_len": OUTPUT_LEN, "drafts": NUM_DRAFTS}
    result["machine"] = {k: v for k, v in machine.describe().items() if not k.endswith(("_bandwidth", "_peak"))}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result) + "\n")


def measure_part(part: str, args: argparse.Namespace) -> Iterator[dict]:
    """Yield the rows of a part as they are measured."""
    if part == "throughput":
        with laid_down():
            yield from throughput(args.model, args.batches, args.cases, args.rounds)
    elif part == "operator":
        yield from operator_rows(args.rounds)
    elif part == "peers":
        texts = scripts("editing code", 2, Tokenizer(checkpoint("dense")), PROMPT_LEN, OUTPUT_LEN)
        yield from speculative_peers.measure(texts, args.rounds)
    elif part == "steps":
        with laid_down():
            yield from speculative_steps.measure(args.model, args.rounds)
    else:
        yield from capacity_rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--model", choices=KINDS, default=KINDS[0], help="for throughput and steps")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--cases", choices=CASES, nargs="*", default=CASES, metavar="CASE", help="'TEXT, DRAFTER'")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file whose rows are replaced; tables go beside it")
    args = parser.parse_args()
    result: dict = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for part in (part for part in PARTS if part in args.parts):
        rows = {_key(row): row for row in result.get(part, []) if part in IN_PIECES}
        for row in measure_part(part, args):
            print(row, flush=True)
            rows[_key(row)] = row
            result[part] = [*rows.values()]
            if part in IN_PIECES:
                result[part].sort(key=lambda row: (KINDS.index(row["model"]), row["batch"]))
            save(result, part, args)


def _key(row: dict) -> tuple:
    """What tells a row of a table from the others."""
    return tuple(row.get(name) for name in ROW_KEY)


if __name__ == "__main__":
    main()
