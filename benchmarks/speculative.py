"""What speculative decoding brings: throughput with and without it, requests that fit, time of verification.

    python benchmarks/speculative.py --out benchmarks/results/speculative.json     # on a quiet machine

The engine is compared with itself, in one process, steps with and without drafts in turn, on the dense
benchmark checkpoint or the one with experts. The weights are random, so what they say is laid down: every token is
sampled as usual, and then replaced by the next one of a given text. The drafters see real texts that way, and do or do
not find what is repeated in them: code with a name replaced, summaries that quote, prose. An oracle, whose guesses are
right with a given probability each, stands for drafters of any quality; with no drafter at all, the same engine shows
what is noise. Timed is decoding alone, from when all prompts have been computed until the first request ends, so that
all steps have the same number of requests.

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
from checkpoints import KINDS, checkpoint
from kvbuffer import SamplingParams
from kvbuffer.bench import machine
from kvbuffer.bench.forms import recurrent, verify
from kvbuffer.bench.measure import measure
from kvbuffer.engine import output
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.request import Request
from kvbuffer.engine.speculative.config import SpeculativeConfig
from kvbuffer.engine.speculative.drafter import Draft, Drafter
from kvbuffer.engine.speculative.methods import make_drafter
from kvbuffer.engine.speculative.speculator import SpeculativeStats
from kvbuffer.ops.cost import LayerShape
from kvbuffer.ops.rule import GATED_DELTANET
from kvbuffer.tokenizer import Tokenizer
from speculative_texts import TEXTS, Script, scripts

PROMPT_LEN, OUTPUT_LEN, NUM_DRAFTS = 192, 96, 8
#: So many texts are run one after the other where fewer are to run at once.
LEAST_TEXTS = 4
ACCEPTANCE = (0.5, 0.7, 0.9)
LOOKUPS = ("ngram", "suffix")
CASES = [
    "prose, none",
    *(f"{text}, {lookup}" for text in TEXTS for lookup in LOOKUPS),
    *(f"prose, oracle {acceptance}" for acceptance in ACCEPTANCE),
]
PARTS = ("throughput", "operator", "peers", "capacity")
CAPACITY_DRAFTS = 4
CAPACITY_CASES = (capacity.Case("1 to 128 tokens", 1, 128), capacity.Case("512 tokens", 512, 512, 1 / 8))
#: What tells the rows of a table apart.
ROW_KEY = ("text", "drafter", "batch", "model", "case", "states", "records", "server", "choices")


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


class Run:
    """Texts being said by an engine, all at once.

    Attributes:
        tokens: generated since all prompts had been computed.
        seconds: that took.
        ended: whether one of the texts has been said.
    """

    def __init__(self, engine: Engine, texts: Sequence[Script]) -> None:
        self.engine, self.names = engine, [str(number) for number in range(len(texts))]
        self.tokens, self.seconds, self.ended = 0, 0.0, False
        for name, (prompt, said) in zip(self.names, texts, strict=True):
            engine.add_request(name, prompt, SamplingParams(temperature=0.0, max_tokens=len(said), ignore_eos=True))
            SCRIPTS[id(engine._requests[name].sampling)] = said
        while engine.stats.num_waiting or any(request.is_prefilling for request in engine._scheduler.running):
            engine.step()

    def step(self) -> None:
        """Let each text go on."""
        began = time.perf_counter()
        deltas = self.engine.step()
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(delta.token_ids) for delta in deltas)
        self.ended |= any(delta.finish_reason is not None for delta in deltas)

    def end(self) -> None:
        """Forget the texts."""
        for name in self.names:
            self.engine.abort_request(name)


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
    options = {
        "model": str(checkpoint(model)), "max_model_len": 512, "max_num_seqs": 32, "memory": 768 << 20,
        "enable_prefix_caching": False, "show_progress": False,
    }  # fmt: skip
    config = {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS}
    plain, drafting = (
        Engine.from_config(EngineConfig(**options, speculative_config=given)) for given in (None, config)
    )
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


#: Per part of the result the head of its table, with what each row of it says.
TABLES = {
    "throughput": {
        "model": "{model}", "text": "{text}", "drafter": "{drafter}", "batch": "{batch}", "tokens/s without": "{plain}",
        "with": "{speculative}", "ratio": "{ratio:.2f}", "of single rounds": "{ratios}",
        "accepted": "{accepted_share:.0%}",
        "tokens per step with a draft": "{mean_accepted_length}",
    },
    "capacity": {
        "model": "{model}", "requests of": "{case}", "states / records": "{states} / {records}",
        "a state per draft": "{baseline}", "ours": "{fit}", "ratio": "{ratio:.2f}",
    },
    "operator": {
        "states / records": "{states} / {records}", "9 steps, ms": "{stored_states_ms}",
        "verifying 8 drafts, ms": "{ms}", "ratio": "{ratio:.2f}", "to float32's steps": "{ratio_to_float32:.2f}",
    },
    "peers": {
        "server": "{server}", "choices": "{choices}", "tokens/s": "{tokens_per_second}",
        "over without speculation": "{ratio:.2f}",
    },
}  # fmt: skip


def markdown(result: dict) -> str:
    """The tables."""
    tables = []
    for part, columns in TABLES.items():
        rows = [[cell.format(**row) for cell in columns.values()] for row in result.get(part, [])]
        if rows:
            lines = [list(columns), ["---"] * len(columns), *rows]
            tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
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
        with mock.patch.object(output, "sample_row", _scripted):
            yield from throughput(args.model, args.batches, args.cases, args.rounds)
    elif part == "operator":
        yield from operator_rows(args.rounds)
    elif part == "peers":
        texts = scripts("editing code", 2, Tokenizer(checkpoint("dense")), PROMPT_LEN, OUTPUT_LEN)
        yield from speculative_peers.measure(texts, args.rounds)
    else:
        yield from capacity_rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--model", choices=KINDS, default=KINDS[0], help="for throughput")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--cases", choices=CASES, nargs="*", default=CASES, metavar="CASE", help="'TEXT, DRAFTER'")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file whose rows are replaced; tables go beside it")
    args = parser.parse_args()
    result: dict = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for part in args.parts:
        # Rows of throughput may be measured in runs of their own.
        rows = {_key(row): row for row in result.get(part, []) if part == "throughput"}
        for row in measure_part(part, args):
            print(row, flush=True)
            rows[_key(row)] = row
            result[part] = [*rows.values()]
            if part == "throughput":
                result[part].sort(key=lambda row: (KINDS.index(row["model"]), row["batch"]))
            save(result, part, args)


def _key(row: dict) -> tuple:
    """What tells a row of a table from the others."""
    return tuple(row.get(name) for name in ROW_KEY)


if __name__ == "__main__":
    main()
