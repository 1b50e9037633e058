"""Which layers are computed at once: a small JSON file, made for one checkpoint and checked against it.

    {"model": "fingerprint", "bypass": 1, "groups": [[4, 5], [6, 8]], "measured": {...}}

``groups`` are layers by index from 0. A group runs in the place of its first layer; its layers need not be neighbours,
so that in a hybrid model linear-attention layers can be grouped across a full-attention layer between them. ``bypass``
is the distance D (see :mod:`kvbuffer.models.group`). ``measured`` is for people: what the planner found.

A plan whose losses an adapter makes good has it in the same folder, and says ``"adapter": "identity"``: that of groups
and adapter together, so that neither is used without the other.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvbuffer.cache.disk.identity import checkpoint_id
from kvbuffer.errors import ConfigError
from kvbuffer.models.adapter import Adapter
from kvbuffer.models.config import ModelConfig


@dataclass(frozen=True)
class CqilPlan:
    """Groups of layers.

    Attributes:
        model: fingerprint of the checkpoint that the plan was made for.
        groups: indices of layers, ascending within each group; groups of one are the same as none.
        bypass: D, how many layers back the MLPs of a group see.
        measured: what the planner found.
        adapter: is added to the checkpoint's weights.
    """

    model: str
    groups: tuple[tuple[int, ...], ...]
    bypass: int = 0
    measured: dict[str, Any] = field(default_factory=dict)
    adapter: Adapter | None = None

    @property
    def identity(self) -> str:
        """What makes two plans' caches interchangeable, as 16 hexadecimal digits; empty where there is nothing to tell.

        A bypass that reaches beyond the longest group is the same as one that reaches just so far.
        """
        groups = sorted(group for group in self.groups if len(group) > 1)
        added = [] if self.adapter is None else [self.adapter.digest]
        if not groups and not added:
            return ""
        reach = min(self.bypass, max(map(len, groups), default=1) - 1)
        return blake2b(json.dumps([groups, reach, *added]).encode(), digest_size=8).hexdigest()

    def check(self, folder: Path, config: ModelConfig) -> None:
        """Check that the plan fits a checkpoint.

        Raises:
            ConfigError: it was made for another one, or its groups make no sense.
        """
        if self.model != (actual := checkpoint_id(folder)):
            raise ConfigError(
                f"the CQIL plan was made for another checkpoint ({self.model}; this one is {actual}): make a new one "
                "with 'kvbuffer cqil plan'"
            )
        if self.bypass < 0:
            raise ConfigError(f"bypass in the CQIL plan must be at least 0, got {self.bypass}")
        for group in self.groups:
            shown = list(group)
            if not group:
                raise ConfigError("a group in the CQIL plan is empty: remove it")
            if unknown := [index for index in group if not 0 <= index < config.num_layers]:
                raise ConfigError(
                    f"group {shown} in the CQIL plan names layers {unknown}; the model has 0 to {config.num_layers - 1}"
                )
            if any(left >= right for left, right in pairwise(group)):
                raise ConfigError(f"the layers of group {shown} in the CQIL plan must ascend")
            if len(types := {config.layer_types[index] for index in group}) > 1:
                raise ConfigError(
                    f"group {shown} in the CQIL plan mixes {' and '.join(sorted(types))} layers: group only layers of "
                    "one type"
                )
        counts = Counter(index for group in self.groups for index in group)
        if twice := sorted(index for index, count in counts.items() if count > 1):
            raise ConfigError(f"layers {twice} are in more than one group of the CQIL plan: keep each in one")

    def save(self, path: Path) -> None:
        """Write the JSON file; the adapter is not in it."""
        content = {"model": self.model, "bypass": self.bypass, "groups": self.groups, "measured": self.measured}
        if self.adapter is not None:
            content["adapter"] = self.identity
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CqilPlan:
        """Read a JSON file, and the adapter beside it if the plan has one.

        Raises:
            ConfigError: they cannot be read, it is not a plan, or the adapter is not the plan's.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"cannot read the CQIL plan {path}: {error}") from None
        known = {"model", "groups", "bypass", "measured", "adapter"}
        if not isinstance(content, dict) or not {"model", "groups"} <= content.keys() <= known:
            raise ConfigError(
                f"{path} is not a CQIL plan: it must hold model and groups, and may hold bypass, measured, adapter"
            )
        groups, bypass = content["groups"], content.get("bypass", 0)
        if not isinstance(groups, list) or not all(isinstance(group, list) and _all_int(group) for group in groups):
            raise ConfigError(f"groups in {path} must be lists of layer numbers, got {groups!r}")
        if not _all_int([bypass]):
            raise ConfigError(f"bypass in {path} must be an integer, got {bypass!r}")
        plan = cls(str(content["model"]), tuple(map(tuple, groups)), bypass, content.get("measured", {}))
        if "adapter" not in content:
            return plan
        plan = replace(plan, adapter=Adapter.load(path.parent))
        if plan.identity != content["adapter"]:
            raise ConfigError(
                f"the adapter in {path.parent} is not that of the CQIL plan {path.name}, or the plan's groups were "
                "changed: keep the files as 'kvbuffer cqil recover' wrote them"
            )
        return plan


#: Every layer by itself.
NO_GROUPS = CqilPlan("", ())


def _all_int(values: list[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)
