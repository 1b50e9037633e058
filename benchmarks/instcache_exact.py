"""Whether the search finds all that it should, and nothing else, with the demo model as the predictor.

The demo model has learned answers alone, so it is first fitted to a log, as a predictor has to be anyway. What was
found is scored again by transformers in float32. What is looked for is sampled by the engine, which knows nothing of
the search.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from instcache_workloads import SKEWED, fitted
from kvbuffer import LLM, SamplingParams
from kvbuffer.instcache.instructions import InstructionFile
from kvbuffer.instcache.predictor import Predictor
from kvbuffer.instcache.training import FitOptions

SIGMA, MAX_TOKENS, SAMPLES = 12.0, 32, 10_400  # of which over 10,000 are within sigma
_LOG_SIZE, _OPTIONS = 5_000, FitOptions("demo", max_tokens=MAX_TOKENS, epochs=1.0, batch_size=16)
_BATCH = 64


def scored(model: Path, head: list[int], end: int, texts: list[list[int]]) -> np.ndarray:
    """Return -log p of texts by transformers, in float32, summed in float64."""
    scorer = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    order = np.argsort([len(text) for text in texts])
    costs = np.zeros(len(texts))
    for begin in range(0, len(texts), _BATCH):
        part = order[begin : begin + _BATCH]
        rows = [torch.tensor([*head, *texts[i], end]) for i in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.no_grad():
            logits = scorer(ids).logits[:, len(head) - 1 : -1].float()
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, len(head) :], reduction="none").double()
        lengths = torch.tensor([len(row) - len(head) for row in rows])
        costs[part] = (each * (torch.arange(each.shape[1]) < lengths[:, None])).sum(1).numpy()
    return costs


def check_exactness(folder: Path) -> dict[str, Any]:
    model = fitted(SKEWED, folder / "demo", _LOG_SIZE, _OPTIONS)
    predictor = Predictor(str(model), torch.float32, MAX_TOKENS, 1 << 28, show_progress=False)
    turn = predictor.turn
    predictor.build(folder / "exact", SIGMA)
    found = dict(InstructionFile(folder / "exact"))
    texts = list(found)
    again = predictor.costs(texts)
    outside = scored(model, turn.head, turn.end, [turn.encode(text) or [] for text in texts])
    costs = np.array(list(found.values()))

    llm = LLM(str(model), dtype="float32", memory=1 << 29)
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=MAX_TOKENS + 1, stop_token_ids=[turn.end])
        for seed in range(SAMPLES)
    ]
    results = llm.generate([turn.head] * SAMPLES, params, use_tqdm=False)
    drawn = [list(result.outputs[0].token_ids) for result in results]
    ended = [ids[:-1] for ids in drawn if ids[-1] == turn.end]
    sampled = [text for ids in ended if (text := turn.text(ids)) is not None]
    within = [text for text, cost in zip(sampled, predictor.costs(sampled), strict=True) if cost <= SIGMA]
    return {
        "model": "demo, fine-tuned", "dtype": "float32", "sigma": SIGMA, "max_tokens": MAX_TOKENS, "found": len(found),
        "found_above_sigma": int((again > SIGMA).sum()), "recomputed_differently": int((again != costs).sum()),
        "found_above_sigma_by_transformers": int((outside > SIGMA).sum()),
        "largest_difference_to_transformers": float(np.abs(outside - costs).max()),
        "sampled": SAMPLES, "sampled_instructions": len(sampled), "sampled_within_sigma": len(within),
        "different_within_sigma": len(set(within)), "missing": sorted(set(within) - found.keys()),
    }  # fmt: skip
