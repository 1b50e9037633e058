"""Serving speed of kvbuffer and its peers on this machine, with an accuracy gate in the same run.

    python benchmarks/serve.py --model dense --concurrency 1 8 32 --rounds 3 --out benchmarks/results/dense.json

Every system is started once, on the same checkpoint, in an environment of its own (benchmarks/setup_peers.sh). They
take turns: for each round and workload one is awake, the others are stopped, and the order rotates with the round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import accuracy
import report
from checkpoints import KINDS, VOCAB_SIZE, num_parameters
from kvbuffer.bench import machine
from metrics import decode_metrics, prefill_metrics, summarise
from peers import MAX_MODEL_LEN, OURS, System, reference, systems

_FIRST_TOKEN_ID = 3  # the ids below it are special tokens
_WARM_UP = (16, 4)  # prompt and output length of the requests that wake a server before it is measured
_TABLE_WIDTH = 140  # at least, wherever the output goes: a wrapped table is no table
_console = Console(stderr=True)


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are stopped on the way out
    running: list[System] = []
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {**vars(args), "out": None, "parameters": num_parameters(args.model)},
        "machine": machine.describe(),
        "systems": {},
    }
    try:
        for system in systems(args.systems, args.model, max(args.concurrency)):
            _console.print(f"starting {system.name}")
            running.append(system)
            system.start()
            system.pause()
            result["systems"][system.name] = {
                "version": system.version(),
                "command": [_without_home(part) for part in system.command()],
                "environment": system.environment,
            }
        result["accuracy"] = _accuracy(args, running)
        result["rounds"] = _rounds(args, running)
    finally:
        for system in running:
            system.stop()
    result["operators"] = _operators(args, result["machine"]) if OURS in args.systems else {}
    red = result["accuracy"]["green"] is False
    counted = [entry for entry in result["rounds"] if not (red and entry["system"] == OURS)]
    result["summary"] = summarise(counted)
    report.show(result, Console(width=max(_console.width, _TABLE_WIDTH)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(report.markdown(result) + "\n")
        _console.print(f"wrote {args.out}")


def _rounds(args: argparse.Namespace, running: list[System]) -> list[dict]:
    workloads = [(f"{count} concurrent", count, args.prompt_len, args.output_len) for count in args.concurrency]
    workloads.append(("prefill", args.prefill_prompts, args.prefill_len, 1))
    columns = TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    measured = []
    with Progress(*columns, console=_console) as progress:
        task = progress.add_task("", total=args.rounds * len(workloads) * len(running))
        for number in range(args.rounds):
            turn = number % len(running)
            for name, count, prompt_len, output_len in workloads:
                prompts = make_prompts(f"{args.seed} {number} {name}", count, prompt_len)
                for system in running[turn:] + running[:turn]:
                    progress.update(task, description=f"round {number + 1}: {system.name}, {name}")
                    metrics, foreign = _measure(system, prompts, output_len)
                    entry = {"round": number, "system": system.name, "workload": name, "metrics": metrics}
                    measured.append({**entry, "foreign_load": foreign, "load_average": os.getloadavg()[0]})
                    progress.advance(task)
    return measured


def _measure(system: System, prompts: list[list[int]], output_len: int) -> tuple[dict, float]:
    system.resume()
    try:
        warm_len, warm_tokens = _WARM_UP
        system.generate(make_prompts("warm-up", len(prompts), warm_len), warm_tokens)
        with machine.ForeignLoad(system.process.pid) as load:
            batch = system.generate(prompts, output_len)
        wrong = [one.num_output_tokens for one in batch if one.num_output_tokens != output_len]
        if wrong:
            raise RuntimeError(f"{system.name} wrote {wrong} tokens where {output_len} were asked for")
        return (prefill_metrics if output_len == 1 else decode_metrics)(batch), load.fraction
    finally:
        system.pause()


def _accuracy(args: argparse.Namespace, running: list[System]) -> dict:
    prompts = make_prompts(f"{args.seed} accuracy", args.accuracy_prompts, args.prompt_len)
    outputs = {}
    for system in running:
        if system.name == "transformers-malloc":  # the same arithmetic as transformers
            continue
        _console.print(f"greedy tokens of {system.name}")
        system.resume()
        outputs[system.name] = [
            one.token_ids
            for first in range(0, len(prompts), system.max_concurrency)
            for one in system.generate(prompts[first : first + system.max_concurrency], args.output_len, want_ids=True)
        ]
        system.pause()
    judged = {}
    if outputs:
        _console.print("judging them in float32")
        referee = reference(args.model)
        referee.start()
        try:
            expected = [one.token_ids for one in referee.generate(prompts, args.output_len)]
            for name, tokens in outputs.items():
                judged[name] = accuracy.judge(
                    tokens, expected, referee.ask(do="score", prompts=prompts, outputs=tokens)
                )
        finally:
            referee.stop()
    green, verdict = accuracy.gate(judged)
    return {"green": green, "verdict": verdict, "systems": judged, "prompts": len(prompts)}


def _operators(args: argparse.Namespace, limits: dict) -> dict:
    """The per-operator tables, from a process of its own: the engine must find the machine as the servers did."""
    _console.print("timing the operators of a decode step")
    command = [sys.executable, str(Path(__file__).with_name("operators.py")), "--json", "--model", args.model]
    command += ["--limits", json.dumps(limits), "--concurrency", *map(str, args.concurrency)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def _without_home(argument: str) -> str:
    """A path as it would read on anyone's machine."""
    root = str(Path(__file__).resolve().parents[1])
    return argument.replace(f"{root}/benchmarks/../", "").replace(f"{root}/", "").replace(str(Path.home()), "~")


def make_prompts(seed: str, count: int, length: int) -> list[list[int]]:
    """Random token ids: nothing to find in a prefix cache, and the same for every system."""
    generator = random.Random(seed)
    return [[generator.randrange(_FIRST_TOKEN_ID, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=KINDS, default="dense")
    add("--systems", type=lambda text: text.split(","), default=["kvbuffer", "vllm", "llamacpp", "transformers"])
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    add("--rounds", type=int, default=3)
    add("--prompt-len", type=int, default=64)
    add("--output-len", type=int, default=64)
    add("--prefill-prompts", type=int, default=8)
    add("--prefill-len", type=int, default=512)
    add("--accuracy-prompts", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file; the tables go beside it as Markdown")
    args = parser.parse_args()
    if args.output_len < 2 or max(args.prompt_len + args.output_len, args.prefill_len + 1) > MAX_MODEL_LEN:
        parser.error(f"an output has at least 2 tokens, and a request at most {MAX_MODEL_LEN}")
    return args


if __name__ == "__main__":
    main()
