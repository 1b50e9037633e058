"""What multi-level training saves, against controls, on Python's own standard library.

Two families, a GPT (Llama architecture) and a hybrid (Qwen3.5: Gated DeltaNet and gated attention), are trained from
scratch, by V-cycles of two and three levels, by stacking, by one late expansion, and from a small model without the
V-cycle's first stage. All get the same FLOPs, counted, the same data in the same order, and the same learning rate.
What is reported is the cost at which each first reaches the held-out loss that training from scratch ends with.

The defaults are small: a first look, not a result about models of a useful size. The runs are kept in --work, and go on
there when they were cut off.

    python benchmarks/multilevel.py --work runs [--families gpt hybrid] [--steps 300] [--seeds 0 1] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sysconfig
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from kvbuffer.bench import machine
from kvbuffer.train.config import TrainConfig
from kvbuffer.train.data import prepare, read_info
from kvbuffer.train.defaults import METHODS
from kvbuffer.train.report import read_results, summarize, write_report
from kvbuffer.train.run import run

PACKAGES = ("asyncio", "collections", "email", "http", "importlib", "json", "logging", "unittest")
COMMON = {"head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 1024}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 4}
LINEAR = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt": {"architectures": ["LlamaForCausalLM"], **COMMON, **ATTENTION, "num_hidden_layers": 4},
    "hybrid": {"architectures": ["Qwen3_5ForCausalLM"], **COMMON, **ATTENTION, **LINEAR, "num_hidden_layers": 8},
}


def main() -> None:
    args = _arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    data = args.work / "data"
    if not data.exists():
        prepare(_copy_library(args.work / "texts"), data, vocab_size=2048, held_out=0.05)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "machine": {key: x for key, x in machine.describe().items() if not key.endswith(("_bandwidth", "_peak"))},
        "versions": machine.versions("torch", "transformers"),
        "data": vars(read_info(data)),
        "settings": {key: value for key, value in vars(args).items() if key not in ("work", "out")},
        "families": {},
    }
    for family in args.families:
        folder = args.work / family
        folder.mkdir(exist_ok=True)
        model = folder / "config.json"
        widths = {"hidden_size": args.hidden_size, "intermediate_size": 3 * args.hidden_size}
        model.write_text(json.dumps({**FAMILIES[family], **widths}))
        for seed in args.seeds:
            for method in args.methods:
                run(_options(args, data, model, folder / f"{method}-{seed}", method, seed))
        write_report(folder)
        results = read_results(folder)
        result["families"][family] = {
            "model": json.loads(model.read_text()),
            "methods": summarize(results),
            "curves": {f"{item.method}-{item.seed}": item.points for item in results},
        }
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


def _copy_library(folder: Path) -> Path:
    """Copy the top-level modules of the standard library, and those of some packages, without their tests."""
    library = Path(sysconfig.get_path("stdlib"))
    folder.mkdir(parents=True, exist_ok=True)
    for package in (".", *PACKAGES):
        for file in (library / package).glob("*.py"):
            shutil.copyfile(file, folder / f"{package.strip('.')}_{file.name}")
    return folder


def _options(args: argparse.Namespace, data: Path, model: Path, out: Path, method: str, seed: int) -> TrainConfig:
    return TrainConfig(
        data=data,
        out=out,
        model=model,
        method=method,
        seed=seed,
        steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        optimizer=args.optimizer,
        lr=args.lr,
        warmup=args.steps // 20,
        rewarm=args.steps // 20,
        alpha=args.alpha,
        first_share=args.first_share,
        small_share=args.small_share,
        eval_every=max(1, args.steps // 30),
        eval_sequences=args.eval_sequences,
        save_every=max(1, args.steps // 4),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of data and runs")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--alpha", type=float, default=0.25)
    parser.add_argument("--first-share", type=float, default=0.1)
    parser.add_argument("--small-share", type=float, default=0.5)
    parser.add_argument("--eval-sequences", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
