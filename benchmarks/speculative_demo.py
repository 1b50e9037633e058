"""What drafts by the demo model's own head bring, on questions about Python.

    python benchmarks/speculative_demo.py [--rounds 4] [--out benchmarks/results/speculative-demo.json]

Three engines take turns at the same questions: one that speculates as `make serve` does, and two that do not, whose
ratio says what is noise.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from kvbuffer import LLM, SamplingParams
from kvbuffer.bench import machine

SPECULATIVE = {"method": "mtp", "num_speculative_tokens": 3}
CASES = ((1, 0.0), (8, 0.0), (32, 0.0))


def questions() -> list[str]:
    """The first question of each chat."""
    folder = Path(__file__).parents[1] / "scripts"
    files = (folder / name for name in ("demo_questions.txt", "demo_questions_new.txt"))
    return [line.split(" || ")[0] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def tokens_per_second(llm: LLM, asked: list[str], batch: int, temperature: float) -> float:
    """Answer all questions, ``batch`` at a time."""
    params, count, begin = SamplingParams(temperature=temperature, max_tokens=120, seed=1), 0, time.perf_counter()
    for first in range(0, len(asked), batch):
        chats = [[{"role": "user", "content": question}] for question in asked[first : first + batch]]
        count += sum(len(one.outputs[0].token_ids) for one in llm.chat(chats, params, use_tqdm=False))
    return count / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = {"max_model_len": 1024, "memory": 256 << 20, "enable_prefix_caching": False, "show_progress": False}
    plain, again = LLM("demo", **options), LLM("demo", **options)
    engines = {"plain": plain, "again": again, "mtp": LLM("demo", speculative_config=SPECULATIVE, **options)}
    asked, rows = questions(), []
    for batch, temperature in CASES:
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(args.rounds + 1):
            for name in sorted(engines, reverse=turn % 2 == 1):
                speed = tokens_per_second(engines[name], asked, batch, temperature)
                if turn:  # the first one warms up
                    speeds[name].append(speed)
        ratios = {
            name: [round(new / old, 3) for new, old in zip(speeds[name], speeds["plain"], strict=True)]
            for name in ("again", "mtp")
        }
        row = {"batch": batch, "temperature": temperature, "tokens_per_second": round(median(speeds["plain"]))}
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
