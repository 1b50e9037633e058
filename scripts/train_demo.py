"""Trains the demo model: a small Qwen3-Next chat model that knows a little about Python.

    python scripts/train_demo.py --out src/kvbuffer/demo_model [--minutes 60]

The corpus is Python's own documentation and docstrings (demo_corpus.py) and chats made from them (demo_chats.py). The
documentation comes from Debian's package; where that cannot be fetched, pass the documentation's `_sources` folder as
--docs, or go without it. Checkpoints are kept in --cache and a run continues from the last one; delete the folder to
begin again.

The work is shared by --workers processes of one thread each, which exchange gradients once per step: on a busy machine
this waits far less than one process with many threads. The learning rate follows warm-up, a constant phase and a linear
decay over the last 30 % of the time. Matrices are trained with Muon, all other parameters with AdamW.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor

from demo_chats import ChatSampler, dialogues
from demo_corpus import fetch_docs, plain_text
from demo_export import CONFIG, END, END_OF_TURN, export, train_tokenizer
from demo_network import Network

LENGTH = 256
ROWS = 4
"""Sequences per step, over all workers."""
PLAIN_SHARE = 0.06
FINAL_DIALOGUE_SHARE = 0.75
"""Of the questions drawn during the decay: what the model learns last, it knows best."""
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARM_UP, DECAY = 40, 0.3
IGNORE = -100


Row = tuple[list[int], list[int]]


def rows(tokenizer: Tokenizer, sampler: ChatSampler, documents: Tensor, rng: random.Random) -> Iterator[Row]:
    """Packed rows of LENGTH + 1 tokens and labels: chats, labelled on the assistant's turns, or plain text."""
    while True:
        if rng.random() < PLAIN_SHARE:
            start = rng.randrange(len(documents) - LENGTH - 1)
            tokens = documents[start : start + LENGTH + 1].tolist()
            yield tokens, tokens
            continue
        tokens, labels = [], []
        while len(tokens) <= LENGTH:
            for message in sampler.sample():
                head = tokenizer.encode(f"<|im_start|>{message['role']}\n").ids
                body = tokenizer.encode(f"{message['content']}{END_OF_TURN}").ids
                tail = tokenizer.encode("\n").ids
                tokens += head + body + tail
                learn = body if message["role"] == "assistant" else [IGNORE] * len(body)
                labels += [IGNORE] * len(head) + learn + [IGNORE] * len(tail)
        yield tokens[: LENGTH + 1], labels[: LENGTH + 1]


def orthogonalized(update: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrices to update [..., M, N], by five Newton-Schulz iterations."""
    wide = update.shape[-2] <= update.shape[-1]
    x = update if wide else update.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal. Matrices of one shape are handled together, by one of the workers."""

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        lr, parameters = self.param_groups[0]["lr"], self.param_groups[0]["params"]
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
            momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            momentum.lerp_(parameter.grad, 0.05)
            parameter.grad.lerp_(momentum, 0.95)
        rank, workers = dist.get_rank(), dist.get_world_size()
        for shape, group in by_shape.items():
            mine = group[rank::workers]
            scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
            if mine:
                for parameter, update in zip(mine, orthogonalized(torch.stack([p.grad for p in mine])), strict=True):
                    parameter.grad.copy_(update * scale)
            for other in set(range(workers)) - {rank}:
                for parameter in group[other::workers]:
                    parameter.grad.zero_()
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
        dist.all_reduce(flat)
        for parameter, update in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.mul_(1 - 0.05 * lr).sub_(update.view_as(parameter), alpha=lr)


def optimizers(network: Network) -> list[torch.optim.Optimizer]:
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        small = parameter.ndim < 2 or name.endswith(("gate.weight", "in_proj_ba.weight", "conv1d.weight"))
        (others if small or "embed" in name else matrices).append(parameter)
    return [Muon(matrices, MUON_RATE), torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, fraction: float) -> float:
    """The learning rate's factor after `step` steps and `fraction` of the time."""
    return min(1.0, (step + 1) / WARM_UP, max(0.02, (1 - fraction) / DECAY))


def loss_of(network: Network, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of the labelled tokens, and the same with the experts' balance loss added."""
    hidden = network(tokens[:, :-1])
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    logits = F.linear(hidden[chosen], network.embed_tokens.weight)
    loss = F.cross_entropy(logits, targets[chosen])
    return loss, loss + 0.01 * network.balance_loss()


def average_gradients(network: Network) -> None:
    gradients = [parameter.grad for parameter in network.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    norm = flat.norm()
    flat *= (1.0 / norm).clamp(max=1.0)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def train(rank: int, options: argparse.Namespace) -> None:
    """One worker. Every worker holds the same parameters; worker 0 reports, saves and exports."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(options.cache / f"store-{options.run}"), options.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.workers)
    torch.manual_seed(0)
    network = Network(CONFIG)
    optims = optimizers(network)
    checkpoint_path = options.cache / "checkpoint.pt"
    step, spent, seen = 0, 0.0, 0
    if checkpoint_path.exists():
        saved = torch.load(checkpoint_path)
        network.load_state_dict(saved["network"])
        for optim, state in zip(optims, saved["optimizers"], strict=True):
            optim.load_state_dict(state)
        step, spent, seen = saved["step"], saved["spent"], saved["seen"]
    tokenizer = Tokenizer.from_file(str(options.cache / "tokenizer.json"))
    documents = torch.load(options.cache / "documents.pt")
    rng = random.Random(f"{rank} {step}")
    sampler = ChatSampler(options.docs, rng)
    batches = rows(tokenizer, sampler, documents, rng)

    def save() -> None:
        state = {"network": network.state_dict(), "optimizers": [optim.state_dict() for optim in optims]}
        torch.save({**state, "step": step, "spent": spent, "seen": seen}, checkpoint_path.with_suffix(".new"))
        checkpoint_path.with_suffix(".new").replace(checkpoint_path)
        export(network, options.cache / "tokenizer.json", options.out, spent / 60, seen)

    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank > 0) as progress:
        task = progress.add_task("starting", total=options.minutes * 60, completed=spent)
        average, last_save = 0.0, time.monotonic()
        while spent < options.minutes * 60:
            begin = time.monotonic()
            fraction = spent / (options.minutes * 60)
            if fraction > 1 - DECAY:
                sampler.dialogue_share = FINAL_DIALOGUE_SHARE
            batch = torch.tensor([next(batches) for _ in range(ROWS // options.workers)])
            loss, total = loss_of(network, batch[:, 0], batch[:, 1])
            total.backward()
            average_gradients(network)
            for optim, rate in zip(optims, (MUON_RATE, ADAM_RATE), strict=True):
                optim.param_groups[0]["lr"] = rate * schedule(step, fraction)
                optim.step()
            network.zero_grad()
            # Every worker must agree on the time, or one would leave the loop before the others.
            clock = torch.tensor([time.monotonic() - begin, loss.item()], dtype=torch.float64)
            dist.all_reduce(clock)
            seconds, mean_loss = (clock / options.workers).tolist()
            step, spent, seen = step + 1, spent + seconds, seen + ROWS * LENGTH
            average = mean_loss if not average else 0.95 * average + 0.05 * mean_loss
            speed = ROWS * LENGTH / seconds
            progress.update(task, completed=spent, description=f"step {step} loss {average:.3f} {speed:.0f} tokens/s")
            if rank == 0 and step % 10 == 0:
                with (options.cache / "log.jsonl").open("a") as log:
                    log.write(json.dumps({"step": step, "loss": average, "spent": spent, "speed": speed}) + "\n")
            if rank == 0 and time.monotonic() - last_save > options.save_every:
                save()
                last_save = time.monotonic()
    if rank == 0:
        save()
        print(f"{step} steps, {seen} tokens in {spent / 60:.1f} minutes, loss {average:.3f}; exported to {options.out}")


def prepare(options: argparse.Namespace) -> None:
    """Fetches the documentation, trains the tokenizer and tokenizes the documents, each once."""
    options.cache.mkdir(parents=True, exist_ok=True)
    options.docs = options.docs or fetch_docs(options.cache)
    if options.docs is None:
        print("No documentation found: training on docstrings and pydoc topics only.")
    texts = list(plain_text(options.docs))
    path = options.cache / "tokenizer.json"
    if not path.exists():
        sampler = ChatSampler(options.docs, random.Random(0))
        chats = [message["content"] for _ in range(20_000) for message in sampler.sample()]
        spoken = [text for questions, answer in dialogues() for text in (*questions, answer)]
        train_tokenizer([*texts, *chats, *spoken], path)
    if not (options.cache / "documents.pt").exists():
        encoded = Tokenizer.from_file(str(path)).encode_batch([text + END for text in texts])
        torch.save(torch.tensor([token for item in encoded for token in item.ids]), options.cache / "documents.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the Hugging Face checkpoint is written")
    parser.add_argument("--minutes", type=float, default=60, help="training time, over all runs from one --cache")
    parser.add_argument("--docs", type=Path, help="the documentation's _sources folder, instead of Debian's package")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/kvbuffer-demo")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--save-every", type=float, default=240, help="seconds between checkpoints")
    options = parser.parse_args()
    prepare(options)
    options.run = time.time_ns()
    mp.spawn(train, (options,), nprocs=options.workers)


if __name__ == "__main__":
    main()
