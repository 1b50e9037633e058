"""What low-precision states and records do to whole models: divergence of next-token distributions in long rollouts.

    python benchmarks/precision_models.py --out benchmarks/results/precision-models.json

A rollout is sampled at temperature 1 by the model in float32 throughout. Every variant (dtype of the weights, states
and records, length of the buffer) then decodes the same tokens through the engine's own scheduler and memory, and its
distributions are compared at every position with those of float32 states and records beside the same weights. Two
yardsticks are compared with the model in float32: bfloat16 weights by themselves, and transformers in bfloat16.

Models: the demo model, and random-weight Qwen3-Next and Qwen3.5 with heads of 128 whose memories are drawn as long as
those of trained models are, from 3 to 4,096 tokens; with transformers' own initialisation most heads forget everything
within a token, and the state would hardly matter.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from bare import bare_request, fixed_forms
from kvbuffer.bench import machine
from kvbuffer.cache.memory import RequestMemory
from kvbuffer.cache.plan import plan_memory
from kvbuffer.cache.store import allocate
from kvbuffer.engine.config import DTYPES, STATE_DTYPES
from kvbuffer.engine.runner import Runner
from kvbuffer.engine.scheduler import Scheduler
from kvbuffer.models.config import ModelConfig
from kvbuffer.models.decoder import Decoder
from kvbuffer.models.weights import resolve_model

LENGTHS = (1, 16)
REFERENCE = {"state": "float32", "record": "float32", "buffer_len": 16}
MODELS = ("demo", "qwen3_next", "qwen3_5")
_SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 16384,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
# Distributions far from uniform, and a router that is as sure of itself as a trained one.
_SCALES = {"lm_head": 2.0, "mlp.gate.weight": 8.0}
_SHORTEST_MEMORY, _LONGEST_MEMORY = 3, 4096


def checkpoint(name: str, folder: Path) -> Path:
    """Return the folder of a model, made there if it is one of random weights (saved in bfloat16)."""
    if name == "demo":
        return resolve_model(name)
    import transformers

    torch.manual_seed(0)
    if name == "qwen3_next":
        model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**_SHAPE, **_EXPERTS))
    else:
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**_SHAPE))
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("A_log"):
                # Rates of decay where softplus(a + dt_bias) is 1.
                span = math.log(_LONGEST_MEMORY / _SHORTEST_MEMORY)
                weight.copy_(-math.log(_SHORTEST_MEMORY) - span * torch.rand_like(weight))
            elif key.endswith("dt_bias"):
                weight.fill_(math.log(math.e - 1))
            elif weight.ndim > 1 and "conv1d" not in key:
                scale = next((scale for part, scale in _SCALES.items() if part in key), 1.0)
                weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5 * scale)
    model.to(torch.bfloat16).save_pretrained(folder / name)
    return folder / name


class Rollout:
    """A few requests that decode token by token, with one choice of precision.

    Args:
        model: with its weights.
        state: dtype of the states.
        record: dtype of the records.
        buffer_len: records before a fold; 1 rewrites the state at every token.
        first: the first token of each request.
        num_tokens: tokens of each in the end.
    """

    def __init__(self, model: Decoder, state: str, record: str, buffer_len: int, first: list[int], num_tokens: int):
        shape = model.config.cache_shape
        plan = plan_memory(
            shape, budget=8 << 30, max_model_len=num_tokens + 1, max_num_seqs=len(first), buffer_len=buffer_len,
            kv_only_len=0, dtype=model.dtype, state_dtype=STATE_DTYPES[state], record_dtype=DTYPES[record],
        )  # fmt: skip
        memory = RequestMemory(plan, prefix_caching=False)
        self._scheduler = Scheduler(memory, fixed_forms(shape.linear, buffer_len, 0), 512)
        self._runner = Runner(model, allocate(shape, plan), memory)
        self._requests = [bare_request(str(i), [token], num_tokens + 1) for i, token in enumerate(first)]
        for request in self._requests:
            self._scheduler.add(request)

    def step(self) -> Tensor:
        """Compute every request's last token; return the logits after it, one row per request."""
        batch = self._scheduler.schedule()
        logits = self._runner.run(batch).logits
        complete = [batch[place].request for place in self._scheduler.commit(batch)]
        order = [complete.index(request) for request in self._requests]
        return logits[order]

    def append(self, tokens: list[int]) -> None:
        """Give each request its next token."""
        for request, token in zip(self._requests, tokens, strict=True):
            request.token_ids.append(token)


def sample_rollout(model: Decoder, first: list[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return a text [T, B] sampled in float32, and the log-probabilities [T, B, vocab] after each of its tokens."""
    rng = torch.Generator().manual_seed(0)
    rollout, tokens, logprobs = Rollout(model, **REFERENCE, first=first, num_tokens=num_tokens), [first], []
    for _ in range(num_tokens):
        logprobs.append(rollout.step().log_softmax(-1))
        tokens.append(torch.multinomial(logprobs[-1].exp(), 1, generator=rng)[:, 0].tolist())
        rollout.append(tokens[-1])
    return torch.tensor(tokens[:-1]), torch.stack(logprobs)


def forced(model: Decoder, variant: dict, text: Tensor) -> Tensor:
    """Return the log-probabilities [T, B, vocab] that a variant has along a given text [T, B]."""
    rollout = Rollout(model, **variant, first=text[0].tolist(), num_tokens=len(text))
    logprobs = torch.empty(*text.shape, model.config.vocab_size)
    for t in range(len(text)):
        logprobs[t] = rollout.step().log_softmax(-1)
        if t + 1 < len(text):
            rollout.append(text[t + 1].tolist())
    return logprobs


def transformers_bfloat16(folder: Path, text: Tensor) -> Tensor:
    """Return the same of transformers in bfloat16: one forward over the whole text."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        return torch.stack([model(row[None]).logits[0].float().log_softmax(-1) for row in text.T], 1)


def compare(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """KL of the expected from the actual distributions in nats, and the share of equal arg maxes."""
    kl = torch.stack([(row.exp() * (row - other)).sum(-1) for row, other in zip(expected, actual, strict=True)])
    kl = kl.double().clamp_min(0)
    return {
        "kl_mean": float(kl.mean()),
        "kl_median": float(kl.median()),
        "kl_p99": float(kl.flatten().quantile(0.99)),
        "kl_mean_last_quarter": float(kl[len(kl) * 3 // 4 :].mean()),
        "agreement": float((actual.argmax(-1) == expected.argmax(-1)).double().mean()),
    }


def measure(name: str, folder: Path, args: argparse.Namespace) -> list[dict]:
    """The rows of one model."""
    num_rollouts, num_tokens = args.rollouts, args.tokens
    path = checkpoint(name, folder)
    config, rows = ModelConfig.from_folder(path), []
    rng = torch.Generator().manual_seed(1)
    first = torch.randint(3, config.vocab_size, (num_rollouts,), generator=rng).tolist()
    models = {dtype: Decoder(path, config, DTYPES[dtype], num_tokens + 1, show_progress=False) for dtype in DTYPES}
    text, exact = sample_rollout(models["float32"], first, num_tokens)
    rows.append({"what": "transformers bfloat16", **compare(transformers_bfloat16(path, text), exact)})
    for weights, model in models.items():
        expected = exact
        if weights != "float32":
            expected = forced(model, REFERENCE, text)
            rows.append({"what": f"{weights} weights", **compare(expected, exact)})
        for state in STATE_DTYPES if weights in args.weights else ():
            for record in DTYPES:
                for length in args.lengths:
                    variant = {"state": state, "record": record, "buffer_len": length}
                    if variant != REFERENCE:
                        row = compare(forced(model, variant, text), expected)
                        rows.append({"what": "variant", "weights": weights, **variant, **row})
        print(f"{name}, {weights} weights: done", flush=True)
    return rows


def markdown(result: dict) -> str:
    """One table per model."""
    lines = []
    for name, rows in result["models"].items():
        lines += [
            f"### {name}\n",
            "| weights | states | records | buffer | mean KL | median KL | p99 KL | last quarter | same arg max |",
            "|---|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            key = [row.get(part, "") for part in ("weights", "state", "record", "buffer_len")]
            key = [row["what"], "", "", ""] if row["what"] != "variant" else key
            numbers = [f"{row[f'kl_{part}']:.1e}" for part in ("mean", "median", "p99", "mean_last_quarter")]
            lines.append("| " + " | ".join(map(str, [*key, *numbers, f"{row['agreement']:.2%}"])) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--tokens", type=int, default=4096, help="length of a rollout")
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--weights", choices=DTYPES, nargs="+", default=list(DTYPES), help="beside which variants run")
    parser.add_argument("--lengths", choices=LENGTHS, type=int, nargs="+", default=LENGTHS, help="of buffers")
    parser.add_argument("--out", type=Path, help="JSON file, to which the models are added; tables go beside it")
    args = parser.parse_args()
    result: dict = {"models": {}}
    if args.out and args.out.exists():
        result = json.loads(args.out.read_text())
    result |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {"tokens": args.tokens, "rollouts": args.rollouts},
        "machine": {key: x for key, x in machine.describe().items() if not key.endswith(("_bandwidth", "_peak"))},
    }
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            result["models"][name] = measure(name, Path(folder), args)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
