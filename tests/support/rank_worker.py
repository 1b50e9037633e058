"""One rank of an engine, started by torchrun: writes greedy tokens of prompts to a file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from kvbuffer.engine.config import EngineConfig
from kvbuffer.engine.engine import Engine
from kvbuffer.engine.loading import follow_engine
from kvbuffer.engine.ranks import is_follower
from kvbuffer.engine.sampling_params import SamplingParams
from kvbuffer.models.parallel import ParallelDecoder

#: How a rank ends that is to die.
DEATH = 3


class Generated(NamedTuple):
    """The greedy tokens of each prompt; how many were drafted for all, and how many of these accepted."""

    tokens: list[list[int]]
    drafted: int
    accepted: int


def generate(engine: Engine, prompts: list[list[int]], max_tokens: int) -> Generated:
    """Complete the prompts together."""
    tokens: dict[str, list[int]] = {}
    drafts: dict[str, tuple[int, int]] = {}
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        engine.add_request(str(number), prompt, params)
    while engine.has_work():
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            drafts[delta.request_id] = delta.num_draft_tokens, delta.num_accepted_tokens
    engine.check_integrity()
    drafted, accepted = map(sum, zip(*drafts.values(), strict=True))
    return Generated([tokens[str(number)] for number in range(len(prompts))], drafted, accepted)


def run(path: Path) -> None:
    """Do a task: engine, cqil, prompts, max_tokens, out; dies is the rank that ends at the first batch, if any."""
    torch.set_num_threads(1)
    task = json.loads(path.read_text())
    config = EngineConfig(cqil=None if task["cqil"] is None else Path(task["cqil"]), **task["engine"])
    if task["dies"] == int(os.environ["RANK"]):
        ParallelDecoder.forward = lambda *_: os._exit(DEATH)  # type: ignore[method-assign]
    if is_follower():
        follow_engine(config)
        return
    engine = Engine.from_config(config)
    # The second time from cached prefixes.
    runs = [generate(engine, task["prompts"], task["max_tokens"]) for _ in range(2)]
    engine.close()
    found = {"runs": [run._asdict() for run in runs], "slot_bytes": engine.plan.block_bytes.slot}
    Path(task["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
