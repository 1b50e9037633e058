"""What happens at several times the load that the server can bear.

    python benchmarks/overload.py --out benchmarks/results/overload.json

Starts `kvbuffer serve`, obtains every prompt's answer alone, measures the rate that the server sustains, and then sends
requests of mixed lengths at four times that rate for ten minutes, from clients with unequal demand, some of which hang
up. Everything is checked: each answer is the one obtained alone or a 429 that says when to come back, each client got
its max-min fair share, the queue drains, memory returns to what it was, the server still answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import statistics
import sys
import threading
import time
import urllib.request
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvbuffer.bench import machine
from overload_load import Outcome, Prompt, ask, closed_loop, make_prompts, open_loop
from peers import KVBuffer

#: Shares of the whole demand: at four times the sustainable rate, one client alone asks for more than there is, and one
#: for less than its fair share.
DEMAND = {"heavy": 0.6, "medium": 0.25, "light": 0.1, "small": 0.05}
_MIN_OF_FAIR_SHARE = 0.8
_MAX_RSS_GROWTH = 0.02  # of the resident size, over the second half of the load
_WARM_UP_SHARE = 0.1  # of a measurement, before anything is counted
_DRAIN_TIMEOUT_S = 60
_MAX_SILENCE_S = 5
_console = Console(stderr=True)


class Server(KVBuffer):
    """`kvbuffer serve`, in float32 so that answers do not depend on who shares a step."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__("kvbuffer-overload", args.model, args.max_num_seqs)
        self._args = args

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-c", "from kvbuffer.cli import main; main()", "serve", self.model),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "bench", "--dtype", "float32"),
            *("--max-num-seqs", str(self.max_concurrency), "--max-queue-len", str(self._args.max_queue_len)),
            *("--max-model-len", str(self._args.max_model_len), "--memory", self._args.memory),
        ]

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return response.read()

    def gauges(self) -> dict[str, float]:
        """The server's own metrics, without histograms and labels."""
        pattern = r"^kvbuffer:(\w+?)(?:_total)?\{model_name=\"bench\"(?:,reason=\"(\w+)\")?\} (\S+)$"
        found = re.findall(pattern, self.get("/metrics").decode(), re.MULTILINE)
        return {f"{name} {reason}".strip(): float(value) for name, reason, value in found}

    def rss(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024


class Sampler:
    """Resident size and queue length, once a second, from a thread of its own."""

    def __init__(self, server: Server) -> None:
        self._server, self._stop = server, threading.Event()
        self.rows: list[tuple[float, int, float, float]] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Sampler:
        self._start = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            gauges = self._server.gauges()
            queue = gauges["num_requests_running"], gauges["num_requests_waiting"]
            self.rows.append((time.monotonic() - self._start, self._server.rss(), *queue))


def max_min_shares(demand: dict[str, float], capacity: float) -> dict[str, float]:
    """Divide `capacity` so that nobody gets more than asked for and nobody's lot can grow but from a richer one."""
    shares: dict[str, float] = {}
    for number, (name, wanted) in enumerate(sorted(demand.items(), key=lambda item: item[1])):
        shares[name] = min(wanted, (capacity - sum(shares.values())) / (len(demand) - number))
    return shares


def finished_per_second(outcomes: list[Outcome], start: float, seconds: float) -> float:
    """Answers completed per second, without the first part of the time, in which the server fills up."""
    since = start + _WARM_UP_SHARE * seconds
    finished = sum(o.status == 200 and since <= o.end < start + seconds for o in outcomes)
    return finished / (start + seconds - since)


def longest_silence(outcomes: list[Outcome]) -> float:
    """Most seconds in which no answer began or ended, from the first answer to the last."""
    moments = sorted(moment for o in outcomes for moment in (o.first, o.end) if moment is not None)
    return max((after - before for before, after in pairwise(moments)), default=0.0)


def growth_of(values: list[float]) -> float:
    """By how much a straight line through equally spaced values rises from the first to the last."""
    if len(values) < 2:
        return 0.0
    slope, _ = statistics.linear_regression(range(len(values)), values)
    return slope * (len(values) - 1)


def judge(outcomes: list[Outcome], expected: list[list[int]]) -> tuple[Counter[str], list[str]]:
    """Count how requests ended; also return what was wrong with those that neither succeeded nor failed cleanly."""
    counts: Counter[str] = Counter()
    faults = []
    for outcome in outcomes:
        answer = expected[outcome.prompt]
        kind, fault = "wrong", None
        if outcome.token_ids != answer[: len(outcome.token_ids)]:
            fault = f"tokens differ from those obtained alone, prompt {outcome.prompt}"
        elif outcome.cancelled:
            kind = "cancelled"
        elif outcome.status == 200:
            kind = "ok" if len(outcome.token_ids) == len(answer) else "wrong"
            fault = None if kind == "ok" else f"{len(outcome.token_ids)} tokens in place of {len(answer)}"
        elif outcome.status == 429 and _is_clean(outcome):
            kind = "refused"
        else:
            fault = f"status {outcome.status}: {outcome.error}"
        counts[kind] += 1
        if fault is not None:
            faults.append(fault)
    return counts, faults


def _is_clean(outcome: Outcome) -> bool:
    error = outcome.error
    known = isinstance(error, dict) and error["type"] == "rate_limit_error" and "max_queue_len" in error["message"]
    return known and (outcome.retry_after or "").isdigit()


def client_table(outcomes: list[Outcome], prompts: list[Prompt], start: float, end: float) -> dict[str, dict]:
    """What each client asked for and got between two moments, in the tokens that fair shares are made of."""
    rows = {name: {"sent": 0, "refused": 0, "demand": 0.0, "served": 0.0, "ttft_s": []} for name in DEMAND}
    full = sum(prompts[o.prompt].cost for o in outcomes if o.status == 200)
    computed = sum(prompts[o.prompt].cost - o.cached_tokens for o in outcomes if o.status == 200)
    for outcome in outcomes:
        row, prompt = rows[outcome.client], prompts[outcome.prompt]
        if start <= outcome.sent < end:
            row["sent"] += 1
            row["refused"] += outcome.status == 429
            if outcome.first or not outcome.cancelled:
                row["demand"] += prompt.cost * computed / max(1, full)
        if outcome.first is not None and start <= outcome.end < end:
            row["served"] += len(prompt.token_ids) - outcome.cached_tokens + 2 * len(outcome.token_ids)
            row["ttft_s"].append(outcome.first - outcome.sent)
    fair = max_min_shares({n: r["demand"] for n, r in rows.items()}, sum(r["served"] for r in rows.values()))
    for name, row in rows.items():
        row |= {"fair_share": fair[name], "of_fair_share": row["served"] / max(1.0, fair[name])}
        row["ttft_s"] = statistics.median(row["ttft_s"]) if row["ttft_s"] else None
    return rows


def run(args: argparse.Namespace, server: Server) -> dict:
    """Measure, load, check."""
    prompts = make_prompts(f"{args.seed}", args.prompts, args.vocab_size)
    before = server.gauges()
    _console.print(f"answers of {len(prompts)} prompts alone")
    expected = asyncio.run(_alone(server.port, prompts))
    _console.print(f"sustainable rate, {args.measure_seconds} s")
    calm = asyncio.run(closed_loop(server.port, prompts, 2 * args.max_num_seqs, args.measure_seconds))
    sustainable = finished_per_second(calm, min(o.sent for o in calm), args.measure_seconds)
    calm_counts, calm_faults = judge(calm, expected)
    rates = {name: share * args.factor * sustainable for name, share in DEMAND.items()}
    _console.print(f"{sustainable:.1f} requests/s; now {args.factor} times that for {args.minutes} minutes")
    seconds = args.minutes * 60
    columns = TextColumn("{task.fields[sent]} sent"), BarColumn(), TimeElapsedColumn()
    with Sampler(server) as sampler, Progress(*columns, console=_console) as progress:
        task = progress.add_task("", total=seconds, sent=0)
        start = time.monotonic()

        def on_sent(count: int) -> None:
            progress.update(task, completed=time.monotonic() - start, sent=count)

        load = open_loop(server.port, prompts, rates, seconds, args.cancel_share, f"{args.seed} load", on_sent)
        outcomes = asyncio.run(load)
    after = _drained(server)
    counts, faults = judge(outcomes, expected)
    [canary] = asyncio.run(_alone(server.port, prompts[:1]))
    clients = client_table(outcomes, prompts, start + _WARM_UP_SHARE * seconds, start + seconds)
    loaded = [rss for at, rss, _, _ in sampler.rows if at <= seconds]
    second_half = loaded[len(loaded) // 2 :]
    growth = growth_of(second_half) / max(1, loaded[-1] if loaded else 1)
    least = min(row["of_fair_share"] for row in clients.values())
    silence = max(longest_silence(calm), longest_silence(outcomes))
    held = {name: value for name, value in after.items() if name.endswith("_in_use") and value != before[name]}
    unfinished = after["num_requests_running"] + after["num_requests_waiting"]
    refused = sum(value for name, value in after.items() if name.startswith("request_rejected"))
    return {
        "sustainable_requests_per_s": sustainable,
        "offered_requests_per_s": len(outcomes) / seconds,
        "finished_requests_per_s": finished_per_second(outcomes, start, seconds),
        "outcomes": dict(counts),
        "calm_outcomes": dict(calm_counts),
        "faults": [*calm_faults, *faults][:20],
        "clients": clients,
        "max_waiting": max(row[3] for row in sampler.rows),
        "rss_mib": [round(rss / 2**20, 1) for rss in loaded[:: max(1, len(loaded) // 100)]],
        "preemptions": after["num_preemptions"],
        "checks": {
            "every answer correct or a clean 429": _check(not calm_faults and not faults, len(calm_faults + faults)),
            "refusals are counted": _check(refused >= counts["refused"], refused),
            "no client starved": _check(least >= _MIN_OF_FAIR_SHARE, least),
            "never stuck": _check(silence <= _MAX_SILENCE_S, silence),
            "nothing left in the queue": _check(unfinished == 0, unfinished),
            "pools as before": _check(not held, held),
            "resident size steady": _check(growth <= _MAX_RSS_GROWTH, growth),
            "alive and correct afterwards": _check(canary == expected[0], len(canary)),
        },
    }


async def _alone(port: int, prompts: list[Prompt]) -> list[list[int]]:
    answers = []
    for number, prompt in enumerate(prompts):
        outcome = await ask(port, prompt, Outcome("alone", number, time.monotonic()))
        if outcome.status != 200:
            raise RuntimeError(f"an idle server answered {outcome.status}: {outcome.error}")
        answers.append(outcome.token_ids)
    return answers


def _drained(server: Server) -> dict[str, float]:
    """The server's metrics once nothing runs and waits, or after a while all the same."""
    deadline = time.monotonic() + _DRAIN_TIMEOUT_S
    while True:
        gauges = server.gauges()
        if gauges["num_requests_running"] + gauges["num_requests_waiting"] == 0 or time.monotonic() > deadline:
            return gauges
        time.sleep(0.2)


def _check(ok: bool, value: object) -> dict:
    return {"ok": ok, "value": value}


def show(result: dict, console: Console) -> None:
    """Print what the clients got, and what was checked."""
    table = Table("client", "sent", "refused", "demand", "served", "fair share", "of it", "median TTFT")
    for name, row in result["clients"].items():
        numbers = (
            f"{row['demand']:.0f}",
            f"{row['served']:.0f}",
            f"{row['fair_share']:.0f}",
            f"{row['of_fair_share']:.2f}",
        )
        ttft = "-" if row["ttft_s"] is None else f"{row['ttft_s']:.2f} s"
        table.add_row(name, str(row["sent"]), str(row["refused"]), *numbers, ttft)
    console.print(table)
    console.print(result["outcomes"])
    for name, check in result["checks"].items():
        console.print(f"{'ok ' if check['ok'] else 'FAILED'} {name}: {check['value']}")


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped on the way out
    server = Server(args)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {**vars(args), "out": None, "command": server.command()[3:]},
        "machine": machine.describe(),
    }
    server.start()
    try:
        with machine.ForeignLoad(server.process.pid) as load:
            result |= run(args, server)
        result["foreign_load"] = load.fraction
    finally:
        server.stop()
    show(result, _console)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        _console.print(f"wrote {args.out}")
    sys.exit(not all(check["ok"] for check in result["checks"].values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="demo")
    add("--vocab-size", type=int, default=4096, help="prompts are random token ids below it")
    add("--minutes", type=float, default=10.0)
    add("--factor", type=float, default=4.0, help="times the sustainable rate")
    add("--measure-seconds", type=float, default=20.0, help="for which the sustainable rate is measured")
    add("--prompts", type=int, default=60, help="different prompts")
    add("--cancel-share", type=float, default=0.1, help="of the requests, hung up after 2 s on average")
    add("--max-num-seqs", type=int, default=16)
    add("--max-queue-len", type=int, default=128)
    add("--max-model-len", type=int, default=2048)
    add("--memory", default="64MiB", help="for states, buffers and caches")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
