"""What drafts by the demo model's own head bring, on questions about Python.

    python benchmarks/speculative_demo.py [--rounds 4] [--out benchmarks/results/speculative-demo.json]

Three engines answer the same questions, step by step in turn: one that speculates as `make serve` does, and two that do
not, whose ratio says what is noise.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from kvbuffer import SamplingParams
from kvbuffer.bench import machine
from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine

SPECULATIVE = {"method": "mtp", "num_speculative_tokens": 3}
CASES = ((1, 0.0), (8, 0.0), (32, 0.0))


def questions() -> list[str]:
    """The first question of each chat."""
    folder = Path(__file__).parents[1] / "scripts"
    files = (folder / name for name in ("demo_questions.txt", "demo_questions_new.txt"))
    return [line.split(" || ")[0] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def speeds(engines: dict[str, Engine], asked: list[str], batch: int, temperature: float) -> dict[str, float]:
    """Let the engines answer all questions, ``batch`` at a time; return their tokens per second."""
    params = SamplingParams(temperature=temperature, max_tokens=120, seed=1)
    tokens, seconds = dict.fromkeys(engines, 0), dict.fromkeys(engines, 0.0)
    for first in range(0, len(asked), batch):
        for number, question in enumerate(asked[first : first + batch]):
            for engine in engines.values():
                prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": question}])
                engine.add_request(str(number), prompt, params)
        turn = list(engines.items())
        while any(engine.has_work() for engine in engines.values()):
            turn.reverse()
            for name, engine in turn:
                if engine.has_work():
                    began = time.perf_counter()
                    deltas = engine.step()
                    seconds[name] += time.perf_counter() - began
                    tokens[name] += sum(len(delta.token_ids) for delta in deltas)
    return {name: tokens[name] / seconds[name] for name in engines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = {"max_model_len": 1024, "memory": 256 << 20, "enable_prefix_caching": False, "show_progress": False}
    configs = {"plain": None, "again": None, "mtp": SPECULATIVE}
    engines = {
        name: Engine.from_config(EngineConfig("demo", speculative_config=config, **options))
        for name, config in configs.items()
    }
    asked, rows = questions(), []
    for batch, temperature in CASES:
        # The first round warms up.
        measured = [speeds(engines, asked, batch, temperature) for _ in range(args.rounds + 1)][1:]
        ratios = {name: [round(one[name] / one["plain"], 3) for one in measured] for name in ("again", "mtp")}
        row = {
            "batch": batch, "temperature": temperature,
            "tokens_per_second": round(median(one["plain"] for one in measured)),
        }  # fmt: skip
        rows.append({**row, "noise": median(ratios["again"]), "ratio": median(ratios["mtp"]), "ratios": ratios})
        print(rows[-1], flush=True)
    if args.out:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": machine.commit(),
            "cpu": machine.describe()["cpu"], "versions": machine.versions("torch"),
            "speculative_config": SPECULATIVE, "questions": len(asked),
        }  # fmt: skip
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
