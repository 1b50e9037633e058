"""Trains the demo model's multi-token-prediction head, with which it drafts its own next tokens.

    python scripts/train_demo_mtp.py [--model src/kvbuffer/demo_model]

The model itself is frozen. The head learns to give the distributions that the model will give, one to DEPTH tokens
ahead of what the model has computed, on the corpus of train_demo.py; its weights are added to the model's as `mtp.*`.
Training continues from the last checkpoint in --cache; delete that file to begin again.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from demo_chats import ChatSampler
from demo_export import CONFIG, END
from demo_network import MtpHead, Network
from train_demo import ADAM_RATE, FINAL_DIALOGUE_SHARE, IGNORE, MUON_RATE, fetch_docs, optimizers, plain_text, rows

BATCH = 4
DEPTH = 3
"""Tokens that are drafted one after the other in training."""
PLACES = 256
"""Places of a batch, of those that count, whose distributions are compared in a step."""
STEPS, WARM_UP, DECAY = 400, 20, 0.5


def losses(network: Network, head: MtpHead, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The head's cross-entropy to the model's distributions, and how often their best tokens agree, both [DEPTH].

    Place i of the first pass has the model's hidden state i and token i + 1, and predicts what the model says at i + 1.
    In later passes the hidden state is what the pass before gave one place earlier. Only tokens that the model would
    generate count.
    """
    counts = labels[:, 2:] != IGNORE
    counts[:, :DEPTH] = False
    places = counts.flatten().nonzero().squeeze(1)
    places = places[torch.randperm(len(places))[:PLACES]]
    with torch.no_grad():
        hidden = network(tokens[:, :-1])
        target = F.linear(hidden[:, 1:].flatten(0, 1)[places], network.embed_tokens.weight)
        embedded = network.embed_tokens(tokens[:, 1:-1])
    hidden, past, results = hidden[:, :-1], [], []
    for _ in range(DEPTH):
        out = head(embedded, hidden, past)
        logits = F.linear(out.flatten(0, 1)[places], network.embed_tokens.weight)
        agrees = (logits.argmax(-1) == target.argmax(-1)).float().mean()
        results.append((F.cross_entropy(logits, target.softmax(-1)), agrees))
        hidden = out.roll(1, 1)
    loss, agreement = zip(*results, strict=True)
    return torch.stack(loss), torch.stack(agreement)


def load_network(path: Path) -> Network:
    tensors = {name.removeprefix("model."): tensor.float() for name, tensor in load_file(path).items()}
    for layer in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        gate, up, down = (
            torch.stack([tensors[f"{layer}.experts.{i}.{name}_proj.weight"] for i in range(CONFIG.num_experts)])
            for name in ("gate", "up", "down")
        )
        tensors |= {f"{layer}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{layer}.experts.down_proj": down}
    network = Network(CONFIG)
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    return network.requires_grad_(False)


def save(head: MtpHead, path: Path) -> None:
    """Puts the head's weights beside the model's, in place of any that are there."""
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("mtp.")}
    tensors |= {f"mtp.{name}": tensor.detach().bfloat16() for name, tensor in head.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("src/kvbuffer/demo_model"))
    parser.add_argument("--docs", type=Path, help="the documentation's _sources folder, instead of Debian's package")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/kvbuffer-demo")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options.cache.mkdir(parents=True, exist_ok=True)
    docs = options.docs or fetch_docs(options.cache)
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    encoded = tokenizer.encode_batch([text + END for text in plain_text(docs)])
    documents = torch.tensor([token for item in encoded for token in item.ids])

    network, head = load_network(options.model / "model.safetensors"), MtpHead(CONFIG)
    # The head begins with what the model's last layer attends to.
    head.layers[0].self_attn.load_state_dict(network.layers[-1].self_attn.state_dict())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # Muon shares its work
    optims = optimizers(head)
    step, checkpoint = 0, options.cache / "mtp.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        head.load_state_dict(saved["head"])
        for optim, state in zip(optims, saved["optimizers"], strict=True):
            optim.load_state_dict(state)
        step = saved["step"]
    rng = random.Random(f"mtp {step}")
    sampler = ChatSampler(docs, rng)
    sampler.dialogue_share = FINAL_DIALOGUE_SHARE
    batches = rows(tokenizer, sampler, documents, rng)
    mean = torch.zeros(DEPTH)
    for step in track(range(step, STEPS), "Training"):  # noqa: B020  # continues where it was
        batch = torch.tensor([next(batches) for _ in range(BATCH)])
        loss, agreement = losses(network, head, batch[:, 0], batch[:, 1])
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        factor = min(1, (step + 1) / WARM_UP, max(0.02, (1 - step / STEPS) / DECAY))
        for optim, rate in zip(optims, (MUON_RATE, ADAM_RATE), strict=True):
            optim.param_groups[0]["lr"] = rate * factor
            optim.step()
            optim.zero_grad()
        mean.lerp_(agreement.detach(), max(0.02, 1 / (step + 1)))
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss.mean():.3f} agreement", *(f"{share:.3f}" for share in mean), flush=True)
            state = {"head": head.state_dict(), "optimizers": [optim.state_dict() for optim in optims]}
            torch.save({**state, "step": step + 1}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
    save(head, options.model / "model.safetensors")


if __name__ == "__main__":
    main()
