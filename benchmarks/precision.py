"""What low-precision states and records cost: the output error of long decode rollouts against the float64 recurrence.

    python benchmarks/precision.py --out benchmarks/results/precision.json
    python benchmarks/precision.py --tokens 100000 --families mamba2 --checkpoints float32 bfloat16 int8 --lengths 1 16
    python benchmarks/precision.py --tokens 100000 --families kda --heads 2 --dim 64 --lengths 1 16

Every variant (checkpoint dtype, record dtype, buffer length) decodes the same tokens from a zero state with the public
operators. Tiers that the operators do not have (fp8, stochastic rounding) keep a float32 state which is rounded here
after every write. Errors are RMS error over RMS output, per head and tenth of the rollout. Takes a few minutes with
compiled kernels, hours without.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor

import precision_inputs
from kvbuffer.bench import machine
from kvbuffer.ops import dispatch
from kvbuffer.ops.buffered import buffered_decode, fold_records, recurrent_decode
from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.reference import recurrence
from kvbuffer.ops.rule import FAMILIES, UpdateRule
from precision_inputs import DEMO_MODEL
from precision_report import DTYPES, markdown

_FAMILIES = ("gated_deltanet", "mamba2", "kda", "rwkv7", DEMO_MODEL)
_TENTHS = 10
_NO_FOLD = torch.zeros(1, dtype=torch.uint8)
_FP8_MAX = 448.0
_INT8_MAX = 127.0


class Checkpoint(NamedTuple):
    """How a state is stored: the pool's dtype, and what the script rounds it with after a write, if anything."""

    dtype: torch.dtype
    rounding: Callable[[Tensor, Generator], Tensor] | None = None


def round_int8_stochastic(state: Tensor, rng: Generator) -> Tensor:
    scale = state.abs().amax(-1, keepdim=True).clamp_min(1e-38) / _INT8_MAX
    return (state / scale + torch.rand(state.shape, generator=rng)).floor().clamp(-_INT8_MAX, _INT8_MAX) * scale


def round_fp8(state: Tensor, rng: Generator) -> Tensor:
    scale = state.abs().amax(-1, keepdim=True).clamp_min(1e-38) / _FP8_MAX
    return (state / scale).to(torch.float8_e4m3fn).float() * scale


CHECKPOINTS = {
    **{name: Checkpoint(dtype) for name, dtype in DTYPES.items()},
    "int8, stochastic": Checkpoint(torch.float32, round_int8_stochastic),
    "fp8 e4m3": Checkpoint(torch.float32, round_fp8),
}
RECORDS = ("float32", "bfloat16")


class Variant:
    """One request that decodes with one choice of checkpoint, records and buffer length."""

    def __init__(self, rule: UpdateRule, like: Tokens, checkpoint: str, record: str | None, length: int) -> None:
        (_, key_heads, k), (_, value_heads, v) = like.k.shape, like.v.shape
        self.key = {"checkpoint": checkpoint, "records": record, "length": length}
        self._rule, self._length = rule, length
        dtype, self._rounding = CHECKPOINTS[checkpoint]
        self._states = StatePool.allocate(1, value_heads, k, v, dtype)
        for part in self._states:
            if part is not None:
                part.zero_()
        self._slots = torch.zeros(1, dtype=torch.int32)
        self._rng = Generator().manual_seed(0)
        if record is not None:
            self._page_table, self._fill = torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            self._records = RecordPages.allocate(rule, 1, length, key_heads, value_heads, k, v, DTYPES[record])

    def decode(self, tokens: Tokens) -> Tensor:
        """Go on with these tokens, one by one."""
        step = self._recurrent if self.key["records"] is None else self._buffered
        return torch.cat([step(tokens.rows(slice(t, t + 1))) for t in range(tokens.v.shape[0])])

    def _recurrent(self, token: Tokens) -> Tensor:
        out = recurrent_decode(self._rule, token, self._states, self._slots)
        self._round()
        return out

    def _buffered(self, token: Tokens) -> Tensor:
        where = self._states, self._slots, self._records, self._page_table
        if self._fill == self._length:
            # Not by the step's own fold: tiers that the script rounds are rounded before the state is read again.
            fold_records(self._rule, *where, self._fill)
            self._round()
            self._fill.zero_()
        out = buffered_decode(self._rule, token, *where, self._fill, _NO_FOLD)
        self._fill += 1
        return out

    def _round(self) -> None:
        if self._rounding is not None:
            self._states.data[0] = self._rounding(self._states.data[0], self._rng)


class Reference:
    """The recurrence itself in float32: the error that no storage is to blame for."""

    key = {"checkpoint": "reference", "records": None, "length": 1}  # noqa: RUF012

    def __init__(self, rule: UpdateRule, like: Tokens, dtype: torch.dtype = torch.float32) -> None:
        self._rule, self._dtype = rule, dtype
        self._state = torch.zeros(like.v.shape[1], like.k.shape[2], like.v.shape[2], dtype=dtype)

    def decode(self, tokens: Tokens) -> Tensor:
        tokens = Tokens(*(None if x is None else x.to(self._dtype) for x in tokens))
        out, self._state = recurrence(self._rule, tokens, self._state)
        return out


def measure(source: precision_inputs.Source, num_tokens: int, checkpoints: list[str], lengths: list[int]) -> dict:
    """The errors of every variant on one stream of tokens.

    Args:
        source: the stream.
        num_tokens: how many tokens to decode.
        checkpoints: names of the tiers.
        lengths: buffer lengths, 1 being the plain recurrence.

    Returns:
        ``rule``, ``tokens``, ``heads`` (their labels), ``shape`` and ``variants``, each with ``errors`` [tenth][head].
    """
    tenth = num_tokens // _TENTHS
    rule, like = source.rule, source.take(1)
    expected = Reference(rule, like, torch.float64)
    variants: list[Variant | Reference] = [Reference(rule, like)]
    for checkpoint in checkpoints:
        for length in lengths:
            records = (None,) if length == 1 else RECORDS
            variants += [Variant(rule, like, checkpoint, record, length) for record in records]
    errors: list[list[list[float]]] = [[] for _ in variants]
    for _ in range(_TENTHS):
        tokens = source.take(tenth)
        right = expected.decode(tokens)
        for variant, rows in zip(variants, errors, strict=True):
            rows.append(_relative_error(variant.decode(tokens), right))
    return {
        "tokens": tenth * _TENTHS,
        "rule": rule.name,
        "heads": source.heads,
        "shape": {"k": like.k.shape[2], "v": like.v.shape[2], "heads": like.v.shape[1]},
        "variants": [{**variant.key, "errors": rows} for variant, rows in zip(variants, errors, strict=True)],
    }


def _relative_error(out: Tensor, expected: Tensor) -> list[float]:
    """RMS error over RMS output, per head of [T, HV, V]."""
    error, size = ((out - expected).square().mean((0, 2)), expected.square().mean((0, 2)))
    return [float(f"{ratio:.3g}") for ratio in (error / size).sqrt().tolist()]


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "settings": {**vars(args), "out": None},
        # Errors do not depend on speed, which a busy machine would misreport.
        "machine": {key: x for key, x in machine.describe().items() if not key.endswith(("_bandwidth", "_peak"))},
        "versions": {"torch": torch.__version__, "backend": dispatch.explain().partition(":")[0]},
        "families": {},
    }
    for name in args.families:
        source = precision_inputs.source(name, args.seed, args.heads, args.dim)
        num_tokens = min(args.tokens, source.max_tokens)
        result["families"][name] = measure(source, num_tokens, args.checkpoints, args.lengths)
        print(f"{name} done", flush=True)
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", choices=[*FAMILIES, DEMO_MODEL], nargs="+", default=_FAMILIES)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--checkpoints", choices=CHECKPOINTS, nargs="+", default=list(CHECKPOINTS))
    parser.add_argument("--lengths", type=int, nargs="+", choices=[1, 4, 16, 32, 64], default=[1, 4, 16, 32, 64])
    parser.add_argument("--heads", type=int, default=8, help="of synthetic tokens, from slow to fast")
    parser.add_argument("--dim", type=int, default=128, help="K and V of synthetic tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; the tables go beside it as Markdown")
    return parser.parse_args()


if __name__ == "__main__":
    main()
