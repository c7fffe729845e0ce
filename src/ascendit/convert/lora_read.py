"""The keys of one LoRA file -> the changes they make to one expert. A key that is not used is a problem.

Headers and the one-element `alpha` tensors are read here; factors are read when a tensor is folded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from ascendit.checkpoint.lora_names import Key, Targets, refusal
from ascendit.checkpoint.store import TensorInfo
from ascendit.convert.lora_deltas import FAMILIES, FLOATS, Delta, gaps, misfit, rank_of, read_number
from ascendit.convert.lora_file import LoraFile, Problem

_INTEGERS = ("I64", "I32", "I16", "I8", "U8")
_OTHER_MODEL = "use a LoRA made for a model of this width and kind"


class Reader:
    """Collects `deltas` and `problems` of a file; `ranks` and `num_alphas` are for the report."""

    def __init__(self, file: LoraFile, targets: Targets, weight: float) -> None:
        self.file = file
        self.targets = targets
        self.weight = weight
        self.problems: list[Problem] = []
        self.deltas: list[Delta] = []
        self.ranks: list[int] = []
        self.num_alphas = 0

    def read(self, keys: Iterable[Key]) -> None:
        """Add what `keys` change."""
        for target, group in self._groups(keys).items():
            self._read_group(target, group)

    def problem(self, key: Key, why: str, fix: str = Problem.fix) -> None:
        """Note that `key` cannot be used."""
        self.problems.append(Problem(key.name, why, fix))

    def _groups(self, keys: Iterable[Key]) -> dict[str, dict[str, Key]]:
        """Target -> role -> key. `diff_b` and `diff_m` are the `diff` of another tensor of the layer."""
        groups: dict[str, dict[str, Key]] = {}
        for key in keys:
            if key.role is None:
                self.problem(key, refusal(key.name) or "no known kind of LoRA has such a key")
            elif (target := self.targets.find(key)) is None:
                self.problem(key, self.targets.why_not(key))
            else:
                role = "diff" if key.role in ("diff_b", "diff_m") else key.role
                first = groups.setdefault(target, {}).setdefault(role, key)
                if first is not key:
                    self.problem(key, f"means the same as {first.name}")
        return groups

    def _read_group(self, target: str, group: dict[str, Key]) -> None:
        """One tensor: factors with `alpha`, a whole difference, or both."""
        alpha, up_bias = group.get("alpha"), group.get("up_bias")
        found = {
            kind: {role: group[role] for role in roles if role in group} for kind, roles in FAMILIES.items()
        }
        if alpha and not any(keys for kind, keys in found.items() if kind != "diff"):
            self.problem(alpha, "no factors of this layer to scale")
        if up_bias and not found["lora"]:
            self.problem(up_bias, "the factors of this layer are missing")
        for kind, keys in found.items():
            if keys and (infos := self._checked(kind, keys, target)) is not None:
                scale = self.weight * self._scale(kind, keys, infos, alpha)
                self.deltas.append(Delta(_label(kind, target), target, infos, scale))
                if kind == "lora" and up_bias:
                    self._add_bias(target, up_bias, scale)

    def _checked(self, kind: str, keys: dict[str, Key], target: str) -> dict[str, TensorInfo] | None:
        """Where the tensors of a module lie; None, and problems, when one is missing or does not fit."""
        infos = {role: self.file.infos[key.name] for role, key in keys.items()}
        if missing := gaps(kind, keys):
            for key in keys.values():
                self.problem(
                    key, f"half of a pair: {missing} of this layer is missing", "get the whole file again"
                )
            return None
        bad = [role for role, info in infos.items() if info.dtype not in FLOATS or not info.shape]
        for role in bad:
            self.problem(
                keys[role], f"{infos[role].dtype} {list(infos[role].shape)} holds no floating-point rows"
            )
        shape = self.targets.shapes[target]
        if bad:
            return None
        if why := misfit(kind, infos, shape):
            self.problem(next(iter(keys.values())), f"{why} of {target}", _OTHER_MODEL)
            return None
        # A modulation table may lack the first axis of size 1: rows are counted as in the model.
        return {"diff": replace(infos["diff"], shape=shape)} if kind == "diff" else infos

    def _scale(
        self, kind: str, keys: dict[str, Key], infos: dict[str, TensorInfo], alpha: Key | None
    ) -> float:
        """alpha / rank, or 1. Differences and a LoKr of two whole factors have no rank and are not scaled."""
        if (rank := rank_of(kind, infos)) is None:
            return 1.0
        self.ranks.append(rank)
        if alpha is not None:
            self.num_alphas += 1
            return self._alpha(alpha) / rank
        key = next(iter(keys.values()))
        return self.file.scaling(key).of(key.path, rank) if kind == "lora" else 1.0

    def _alpha(self, key: Key) -> float:
        info = self.file.infos[key.name]
        value = 0.0
        if math.prod(info.shape) == 1 and info.dtype in FLOATS + _INTEGERS:
            value = read_number(info)
        if not math.isfinite(value) or value == 0:
            self.problem(key, f"{info.dtype} {list(info.shape)} holds no number to scale by")
        return value

    def _add_bias(self, weight: str, key: Key, scale: float) -> None:
        """PEFT's `lora_B.bias`: part of what `up` gives, so it is scaled like it."""
        bias = weight.removesuffix(".weight") + ".bias"
        info = self.file.infos[key.name]
        if info.shape != self.targets.shapes.get(bias) or info.dtype not in FLOATS:
            self.problem(key, f"{info.dtype} {list(info.shape)} is no change of {bias}", _OTHER_MODEL)
        else:
            self.deltas.append(Delta("diff_b", bias, {"diff": info}, scale))


def _label(kind: str, target: str) -> str:
    """The kind, for the summary. Other tools drop norms and modulation, so these are counted apart."""
    if kind != "diff":
        return kind
    if "norm" in target:
        return "norm"
    if target.endswith("scale_shift_table"):
        return "diff_m"
    return "diff_b" if target.endswith(".bias") else "diff"
