"""The operators as ``torch.library`` custom operators, ``torch.ops.kvbuffer.*``, so that torch.compile can trace them.

A custom operator takes tensors and scalars only. Each one has the arguments of its public function, flattened: a rule
is its name in :data:`kvbuffer.ops.rule.FAMILIES`, a NamedTuple is its tensors (``states`` is ``states_data`` and
``states_scales``). That is read off the function's annotations, so it is written down nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from itertools import islice
from typing import Any, ParamSpec, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from kvbuffer.ops.layout import RecordPages, StatePool, Tokens
from kvbuffer.ops.rule import FAMILIES, UpdateRule

P = ParamSpec("P")
R = TypeVar("R")

# Not torch.library.custom_op: what it does for training costs 200 us per call of this many arguments.
_library = torch.library.Library("kvbuffer", "DEF")


def custom_operator(*, writes: tuple[str, ...]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a public function as the custom operator of its name, which compiled code calls instead of it.

    Other callers go straight to the function: the dispatcher takes 10 us to hand this many arguments to Python, which
    over the layers of a small model is 1 % of a decode step.

    Args:
        writes: the arguments whose tensors the function writes.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        parameters = get_type_hints(function)
        returns_tensor = parameters.pop("return") is Tensor

        def run(*flat: Any) -> Any:
            return cast(Callable[..., Any], function)(**_unflatten(parameters, flat))

        def fake(*flat: Any) -> Tensor | None:
            if not returns_tensor:
                return None
            # What an operator returns is shaped like the tokens' values.
            values: Tensor = _unflatten(parameters, flat)["tokens"].v
            return torch.empty_like(values, memory_format=torch.contiguous_format)

        _library.define(f"{name}({_schema(parameters, writes)}) -> {'Tensor' if returns_tensor else '()'}")
        # One implementation for every device: the backend is chosen inside.
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"kvbuffer::{name}", fake, lib=_library)
        operator = getattr(torch.ops.kvbuffer, name).default

        @wraps(function)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling():
                return function(*args, **kwargs)
            arguments = [*args, *(kwargs[name] for name in list(parameters)[len(args) :] if name in kwargs)]
            return cast(R, operator(*_flatten(arguments)))

        return public

    return register


def _fields(name: str, kind: Any) -> dict[str, Any]:
    """Return the flat arguments of one parameter, and the type of each."""
    if kind in (Tokens, StatePool, RecordPages):
        return {f"{name}_{field}": field_kind for field, field_kind in get_type_hints(kind).items()}
    return {name: kind}


def _schema(parameters: Mapping[str, Any], writes: tuple[str, ...]) -> str:
    """Return the operator's arguments in the schema language of PyTorch."""
    arguments = []
    for parameter, parameter_kind in parameters.items():
        for name, kind in _fields(parameter, parameter_kind).items():
            if kind is UpdateRule:
                arguments.append(f"str {name}")
                continue
            written = f"(a{len(arguments)}!)" if parameter in writes else ""
            optional = "" if kind is Tensor else "?"
            default = "=None" if optional and name == parameter else ""
            arguments.append(f"Tensor{written}{optional} {name}{default}")
    return ", ".join(arguments)


def _flatten(arguments: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for x in arguments:
        if isinstance(x, UpdateRule):
            flat.append(x.name)
        elif isinstance(x, tuple):
            flat.extend(x)
        else:
            flat.append(x)
    return flat


def _unflatten(parameters: Mapping[str, Any], flat: Iterable[Any]) -> dict[str, Any]:
    values = iter(flat)
    arguments: dict[str, Any] = {}
    for name, kind in parameters.items():
        if kind is UpdateRule:
            arguments[name] = _family(next(values))
        elif kind in (Tokens, StatePool, RecordPages):
            arguments[name] = kind(*islice(values, len(kind._fields)))
        else:
            # The dispatcher leaves out trailing arguments that have their default.
            arguments[name] = next(values, None)
    return arguments


def _family(name: str) -> UpdateRule:
    if name not in FAMILIES:
        raise ValueError(f"no family is called {name!r}; compiled code knows {', '.join(FAMILIES)}")
    return FAMILIES[name]
