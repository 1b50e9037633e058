"""Wrong arguments: every operator refuses them by name before any kernel sees them, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from kvbuffer.ops.buffered import buffered_decode, buffered_verify, compact_records, fold_records, recurrent_decode
from kvbuffer.ops.chunked import chunked_prefill
from kvbuffer.ops.layout import StatePool
from kvbuffer.ops.rule import GATED_DELTANET, KDA, LINEAR_ATTENTION, RETNET, RWKV7, UpdateRule
from tests.support.operators import Pool, int32, make_tokens

#: The arguments of each operator besides the rule.
OPERATORS: dict[Callable[..., Any], list[str]] = {
    buffered_decode: ["tokens", "states", "slots", "records", "page_table", "fill", "fold"],
    buffered_verify: [
        "tokens", "states", "slots", "records", "page_table", "fill", "cu_seqlens", "parents",
    ],
    chunked_prefill: ["tokens", "states", "slots", "cu_seqlens", "fresh"],
    compact_records: ["records", "page_table", "fill", "accepted", "cu_accepted"],
    fold_records: ["states", "slots", "records", "page_table", "count", "target_slots"],
    recurrent_decode: ["tokens", "states", "slots"],
}  # fmt: skip
OPERATOR = pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)


def arguments(rng: Generator, operator: Callable[..., Any], rule: UpdateRule = GATED_DELTANET) -> dict[str, Any]:
    """A valid call: three requests with one token each."""
    pool = Pool(rule, 3, 2, 4, 16, 32, 8, 4, rng)
    flags, one_each = torch.zeros(3, dtype=torch.uint8), int32([0, 1, 2, 3])
    everything = {
        "tokens": make_tokens(rng, rule, 3, 2, 4, 16, 32),
        "states": pool.states,
        "slots": pool.slots,
        "records": pool.records,
        "page_table": pool.page_table,
        "fill": pool.fill,
        "fold": flags,
        "fresh": flags + 1,
        "count": pool.fill,
        "target_slots": pool.slots.clone(),
        "cu_seqlens": one_each,
        "parents": int32([-1, -1, -1]),
        "accepted": int32([0, 0, 0]),
        "cu_accepted": one_each,
    }
    needed = {name: everything[name] for name in OPERATORS[operator]}
    return needed if operator is compact_records else {"rule": rule, **needed}


def replaced(arguments: dict[str, Any], name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """The arguments with one changed, which may be a field: ``tokens.q``."""
    name, _, field = name.partition(".")
    value = arguments[name]
    value = value._replace(**{field: change(getattr(value, field))}) if field else change(value)
    return {**arguments, name: value}


def names(operator: Callable[..., Any], rule: UpdateRule) -> list[str]:
    """Every tensor that an operator takes for a family."""
    generator = Generator().manual_seed(0)
    found: list[str] = []
    for name, value in arguments(generator, operator, rule).items():
        if isinstance(value, Tensor):
            found.append(name)
        elif isinstance(value, tuple):
            found += [f"{name}.{field}" for field in value._fields if getattr(value, field) is not None]
    return found


def stretched(x: Tensor) -> Tensor:
    """The same values, every second element of memory."""
    return x.repeat_interleave(2, -1)[..., ::2]


WRONG: dict[str, tuple[type[Exception], Callable[[Tensor], Any]]] = {
    "missing": (TypeError, lambda x: None),
    "a list": (TypeError, lambda x: x.tolist()),
    "dtype": (TypeError, lambda x: x.to(torch.float16)),
    "longer": (ValueError, lambda x: torch.cat([x, x], -1)),
    "one dim more": (ValueError, lambda x: x.unsqueeze(0)),
    "on another device": (ValueError, lambda x: x.to("meta")),
    "strided": (ValueError, stretched),
}

#: The others are measured by these, so that of two that do not fit one another the other one is blamed.
LEADING = {"states.data", "slots", "records.keys"}
#: These may have any length or width, or be left out.
ANY_LENGTH, OPTIONAL = {"page_table", "accepted"}, {"parents", "target_slots"}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("rule", [GATED_DELTANET, RWKV7], ids=lambda r: r.name)
@OPERATOR
def test_every_argument_is_checked(rng: Generator, operator: Callable[..., Any], rule: UpdateRule, wrong: str) -> None:
    error, change = WRONG[wrong]
    for name in names(operator, rule):
        if name in {"missing": OPTIONAL, "longer": ANY_LENGTH}.get(wrong, set()):
            continue
        if operator is compact_records and name.startswith("records"):
            continue  # copied by PyTorch, which checks them itself
        leads = name in LEADING or (operator is compact_records and name == "fill")
        named = None if leads and wrong in ("longer", "on another device") else f"^{name} "
        with pytest.raises(error, match=named):
            operator(**replaced(arguments(rng, operator, rule), name, change))


def test_messages_say_what_was_found_and_what_is_needed(rng: Generator) -> None:
    call = arguments(rng, recurrent_decode)
    wrong: list[tuple[str, Callable[[Tensor], Any], str]] = [
        ("slots", Tensor.long, "slots must be torch.int32, is torch.int64"),
        ("tokens.v", lambda x: x[..., :8], "tokens.v must have shape [3, 4, 32], has [3, 4, 8]"),
        ("tokens.beta", stretched, "tokens.beta must be contiguous, has strides (8, 2)"),
        ("tokens.k", lambda x: x[:, :0], "4 value heads are no multiple of 0 key heads"),
        ("states.data", lambda x: x[0], "states.data must have shape [num_slots, HV, K, V], has [4, 16, 32]"),
        ("states.scales", lambda x: torch.ones(5, 4, 16), "states.scales must be None"),
    ]
    for name, change, message in wrong:
        with pytest.raises((TypeError, ValueError)) as error:
            recurrent_decode(**replaced(call, name, change))
        assert str(error.value).startswith(message)


def test_int8_states_need_their_scales(rng: Generator) -> None:
    call = arguments(rng, recurrent_decode)
    pool = StatePool.allocate(5, 4, 16, 32, torch.int8)
    with pytest.raises(TypeError, match=r"^states\.scales must be a tensor"):
        recurrent_decode(**{**call, "states": pool._replace(scales=None)})
    with pytest.raises(ValueError, match=r"^states\.scales must have shape \[5, 4, 16\]"):
        recurrent_decode(**{**call, "states": pool._replace(scales=torch.ones(5, 4, 1))})


@pytest.mark.parametrize(
    ("rule", "field"),
    [(LINEAR_ATTENTION, "g"), (RETNET, "beta"), (KDA, "removal_read"), (GATED_DELTANET, "removal_write")],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_inputs_that_a_family_does_not_take(rng: Generator, rule: UpdateRule, field: str) -> None:
    call = arguments(rng, recurrent_decode, rule)
    call["tokens"] = call["tokens"]._replace(**{field: torch.zeros(3, 4)})
    with pytest.raises(TypeError, match=rf"^tokens\.{field} must be None"):
        recurrent_decode(**call)


def test_records_of_another_family(rng: Generator) -> None:
    call = arguments(rng, buffered_decode)
    with pytest.raises(ValueError, match=r"^records\.keys must have shape"):
        buffered_decode(**{**call, "records": arguments(rng, buffered_decode, RWKV7)["records"]})
    with pytest.raises(ValueError, match=r"^records\.decays must have shape"):
        buffered_decode(**{**call, "records": arguments(rng, buffered_decode, KDA)["records"]})


def test_what_may_be_strided_gives_the_same_bits(backend: str, rng: Generator) -> None:
    """Rows of q, k and v cut from one wide tensor, a decay per head expanded over the tokens, part of a page table."""
    call = arguments(rng, buffered_decode, RETNET)
    tokens = call["tokens"]
    expanded = tokens.g[:1].expand(3, 4)
    call["tokens"] = tokens._replace(g=expanded.contiguous())
    expected = buffered_decode(**call)
    wide = torch.cat([x.flatten(1) for x in tokens[:3]], 1).split([32, 32, 128], 1)
    q, k, v = (x.unflatten(1, (-1, width)) for x, width in zip(wide, (16, 16, 32), strict=True))
    call["tokens"] = tokens._replace(q=q, k=k, v=v, g=expanded)
    call["page_table"] = torch.cat([call["page_table"], call["page_table"]], 1)[:, :2]
    assert not any(x.is_contiguous() for x in (q, k, v, expanded, call["page_table"]))
    assert torch.equal(buffered_decode(**call), expected)


def test_no_requests_are_none(backend: str, rng: Generator) -> None:
    call = arguments(rng, recurrent_decode)
    out = recurrent_decode(**{**call, "tokens": call["tokens"].rows(slice(0)), "slots": call["slots"][:0]})
    assert out.shape == (0, 4, 32)
