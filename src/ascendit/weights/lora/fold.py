"""Fold LoRA files into float weights, a few rows at a time, before they are quantized.

`Folds.open` reads the headers of all files and determines the changed tensors of an expert; `fold` adds the
changes in the order of the files, and rounds once. A key that cannot be used is an error. The factors of a
tensor are in memory only while it is folded.

Sums are in float64, so that a weight gets the same bits for every block size and number of threads. In
float32 the order of a sum depends on the threads, and up to one element in a hundred differs in its last bit.
In float64, sums of products of 16-bit factors are practically exact.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ascendit.checkpoint.component import EXPERTS
from ascendit.checkpoint.reader import RowReader, TensorInfo
from ascendit.errors import UsageError
from ascendit.names import Shapes
from ascendit.report import group_by
from ascendit.weights.lora.file import (
    FACTOR_DTYPES,
    FACTORS,
    Delta,
    LoraFile,
    Problem,
    Rows,
    missing_roles,
    open_file,
    rank_of,
    roles_of,
    shape_problem,
    unusable_keys,
)
from ascendit.weights.lora.keys import LoraKey, Targets, refusal

if TYPE_CHECKING:
    import torch


# ---- the files and their experts ----------------------------------------------------------------

EXPERT_NAMES = {"transformer": "transformer", "transformer_2": "transformer_2"} | dict(
    zip(("high", "low"), EXPERTS, strict=True)
)
"""Allowed before `=` -> expert; `high` and `low` are its noise levels."""
_SYNTAX = (
    "FILE[:WEIGHT], or transformer=FILE[:WEIGHT] (also high=) and transformer_2=FILE[:WEIGHT] (also low=)"
)


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file, its weight and its expert.

    Raises UsageError (E-USE-01) for an invalid weight or expert.
    """

    path: Path
    weight: float = 1.0
    expert: str | None = None
    """`transformer` or `transformer_2`; None: every expert, or the expert named in the prefix of each key."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise _bad_source(f"LoRA {self.path} has the weight {self.weight}", "a number other than 0")
        if self.expert not in (None, *EXPERTS):
            raise _bad_source(f"LoRA {self.path} is for {self.expert!r}", " or ".join(EXPERTS))

    def __str__(self) -> str:
        """The text that `parse_lora` reads."""
        text = f"{self.expert}={self.path}" if self.expert else str(self.path)
        plain = self.weight == 1 and ":" not in text
        return text if plain else f"{text}:{self.weight!r}".removesuffix(".0")


def parse_lora(text: str) -> LoraSource:
    """Parse `FILE[:WEIGHT]` or `EXPERT=FILE[:WEIGHT]`; FILE may contain `:` and `=`.

    Raises UsageError (E-USE-01).
    """
    head, equals, tail = text.partition("=")
    expert = EXPERT_NAMES.get(head.strip()) if equals else None
    path = tail if expert else text
    file, colon, number = path.rpartition(":")
    weight = 1.0
    try:
        if colon:
            weight, path = float(number), file
    except ValueError:
        if file.endswith(".safetensors"):
            got = f"LoRA weight {number!r} in {text!r}"
            raise _bad_source(got, "a number after the last colon") from None
    if not path:
        raise _bad_source(f"no LoRA file in {text!r}", _SYNTAX)
    return LoraSource(Path(os.path.expanduser(path)), weight, expert)


def lora_sources(value: object) -> tuple[LoraSource, ...]:
    """LoRA files from one or a sequence of texts for `parse_lora`, paths or LoraSources; none from None.

    Raises UsageError (E-USE-01) for anything else.
    """
    if isinstance(value, list | tuple):
        return tuple(source for item in value for source in lora_sources(item))
    if isinstance(value, os.PathLike):
        return (LoraSource(Path(value)),)
    if isinstance(value, str):
        return (parse_lora(value),)
    if value is not None and not isinstance(value, LoraSource):
        raise _bad_source(f"LoRA {value!r}", "a text, a path or a LoraSource")
    return () if value is None else (value,)


def _bad_source(got: str, needs: str) -> UsageError:
    return UsageError(got, needs=needs, fix=f"write {_SYNTAX}")


# ---- folding ------------------------------------------------------------------------------------

PRODUCT_ROWS = 64
"""Rows of one matrix product. Products are always computed in these blocks, because the order of a sum
depends on the size of the product. Small enough for the CPU cache in float64."""


class Folds:
    """The changes of one expert by all LoRA files."""

    def __init__(self, shapes: Shapes, deltas: Sequence[Delta]) -> None:
        self._shapes = shapes
        self._deltas = group_by(deltas, lambda delta: delta.target)
        self.names = frozenset(self._deltas)
        self.notes: tuple[str, ...] = ()
        self._opened: dict[str, list[Rows]] = {}

    @classmethod
    def open(
        cls,
        sources: Sequence[LoraSource],
        expert: str,
        shapes: Shapes,
        *,
        experts: Collection[str] = EXPERTS,
        skip: Collection[str] = (),
    ) -> Self:
        """Read the headers of `sources` and match their keys with `shapes`, the tensors of `expert`.

        `experts`: all experts of the model. Raises CheckpointError: E-LRA-01 for keys that cannot be used
        (the first five, and the number of others), E-CKP-02 for a damaged file; UsageError: E-USE-01 for
        another file type, or a file for an expert that the model does not have, E-USE-02 for a missing file.
        """
        targets = Targets(shapes)
        deltas = [delta for source in sources for delta in _read(source, expert, targets, experts)]
        return cls(shapes, deltas)

    def fold(self, name: str, rows: torch.Tensor, start: int, columns: slice | None = None) -> torch.Tensor:
        """Add all files to `rows` [n, ...] of the tensor `name`, which begin at row `start`.

        `columns`: the range of the second axis in `rows`; default: all. Computed in float64 and rounded once
        to the dtype of `rows`. The bits of an element do not depend on rows and columns. Returns a new
        tensor, or `rows` itself if no file changes the tensor. Raises CheckpointError (E-LRA-01) for values
        that are not finite.
        """
        if name not in self.names or not len(rows):
            return rows
        import torch

        full = self._shapes[name]
        assert columns not in (None, slice(None)) or rows.shape[1:] == full[1:], (name, rows.shape)
        result = torch.empty(rows.shape, dtype=rows.dtype)
        deltas, stop = self._open(name), start + len(rows)
        for first in range(start // PRODUCT_ROWS * PRODUCT_ROWS, stop, PRODUCT_ROWS):
            last = min(first + PRODUCT_ROWS, full[0])
            begin, end = max(first, start), min(last, stop)
            block = rows[begin - start : end - start]
            total = block.to(torch.float64).reshape(len(block), -1)
            for delta in deltas:
                total += delta(first, last)[begin - first : end - first][:, columns or slice(None)]
            result[begin - start : end - start] = total.view(block.shape)
        return result

    def _open(self, name: str) -> list[Rows]:
        """Read the factors of one tensor, and free the factors of the previous tensor."""
        if name not in self._opened:
            self._opened = {}
            self._opened = {name: [delta.open() for delta in self._deltas[name]]}
        return self._opened[name]


def _read(source: LoraSource, expert: str, targets: Targets, experts: Collection[str]) -> list[Delta]:
    """Read the changes of `expert` in one file.

    Raises CheckpointError (E-LRA-01) for keys that cannot be used.
    """
    if source.expert is not None and source.expert not in experts:
        raise _bad_source(
            f"LoRA {source.path} is for {source.expert}",
            f"one of {', '.join(experts)}: the model has no other expert",
        )
    file = open_file(source.path)
    reader = DeltaReader(file, targets, source.weight)
    if source.expert not in (None, expert):
        return []
    keys = []
    # The prefix `transformer.` means any expert, but the first one in files that also have `transformer_2.`.
    names_experts = any(key.expert == "transformer_2" for key in file.keys)
    for key in file.keys:
        named = key.expert if names_experts else None
        if named is not None and named not in experts:
            reader.problem(key, f"for {named}, which this model does not have")
        elif source.expert is not None and named not in (None, expert):
            reader.problem(
                key,
                f"for {named}, but the file was passed for {expert}",
                f"pass the file without {expert}=",
            )
        elif named in (None, expert):
            keys.append(key)
    for target, group in reader.groups(keys).items():
        reader.read_group(target, group)
    if reader.problems:
        raise unusable_keys(source.path, len(file.keys), reader.problems)
    return reader.deltas


# ---- match the keys of a file with tensors ------------------------------------------------------

_INTEGERS = ("I64", "I32", "I16", "I8", "U8")
_OTHER_MODEL = "use a LoRA for a model of this width and kind"


class DeltaReader:
    """Collects the `deltas` and `problems` of a file."""

    def __init__(self, file: LoraFile, targets: Targets, weight: float) -> None:
        self.file = file
        self.targets = targets
        self.weight = weight
        self.problems: list[Problem] = []
        self.deltas: list[Delta] = []

    def problem(self, key: LoraKey, reason: str, fix: str = Problem.fix) -> None:
        """Record that `key` cannot be used."""
        self.problems.append(Problem(key.name, reason, fix))

    def groups(self, keys: Iterable[LoraKey]) -> dict[str, dict[str, LoraKey]]:
        """Target -> role -> key. `diff_b` and `diff_m` become the `diff` of another tensor of the layer."""
        groups: dict[str, dict[str, LoraKey]] = {}
        for key in keys:
            if key.role is None:
                self.problem(key, refusal(key.name) or "not a key of a supported kind of LoRA")
            elif (target := self.targets.find(key)) is None:
                self.problem(key, self.targets.reason_missing(key))
            else:
                role = "diff" if key.role in ("diff_b", "diff_m") else key.role
                first = groups.setdefault(target, {}).setdefault(role, key)
                if first is not key:
                    self.problem(key, f"means the same as {first.name}")
        return groups

    def read_group(self, target: str, group: dict[str, LoraKey]) -> None:
        """Add the changes of one tensor: factors with `alpha`, a difference, or both."""
        alpha, up_bias = group.get("alpha"), group.get("up_bias")
        modules = {kind: {role: group[role] for role in roles_of(kind) if role in group} for kind in FACTORS}
        if alpha and not any(keys for kind, keys in modules.items() if kind != "diff"):
            self.problem(alpha, "the factors that it scales are missing")
        if up_bias and not modules["lora"]:
            self.problem(up_bias, "the factors of this layer are missing")
        for kind, keys in modules.items():
            if keys and (infos := self._checked(kind, keys, target)) is not None:
                scale = self.weight * self._scale(kind, keys, infos, alpha)
                self.deltas.append(Delta(kind, target, infos, scale))
                if kind == "lora" and up_bias:
                    self._add_bias(target, up_bias, scale)

    def _checked(self, kind: str, keys: dict[str, LoraKey], target: str) -> dict[str, TensorInfo] | None:
        """The header entries of a module; None, and problems, if one is missing or does not match."""
        infos = {role: self.file.infos[key.name] for role, key in keys.items()}
        if missing := missing_roles(kind, keys):
            for key in keys.values():
                self.problem(
                    key, f"incomplete: {missing} of this layer is missing", "download the file again"
                )
            return None
        bad = [role for role, info in infos.items() if info.dtype not in FACTOR_DTYPES or not info.shape]
        for role in bad:
            dtype, sizes = infos[role].dtype, list(infos[role].shape)
            self.problem(keys[role], f"{dtype} {sizes} is not a floating-point tensor with rows")
        if bad:
            return None
        shape = self.targets.shapes[target]
        if problem := shape_problem(kind, infos, shape):
            self.problem(next(iter(keys.values())), f"{problem} of {target}", _OTHER_MODEL)
            return None
        # A modulation table may lack the first axis of size 1: use the rows of the model.
        return {"diff": replace(infos["diff"], shape=shape)} if kind == "diff" else infos

    def _scale(
        self, kind: str, keys: dict[str, LoraKey], infos: dict[str, TensorInfo], alpha: LoraKey | None
    ) -> float:
        """alpha / rank, or 1. Differences and a LoKr of two complete factors have no rank: no scaling."""
        if (rank := rank_of(kind, infos)) is None:
            return 1.0
        if alpha is not None:
            return self._alpha(alpha) / rank
        key, scalings = next(iter(keys.values())), self.file.scalings
        return scalings.get(key.expert, scalings[None]).scale_of(key.path, rank) if kind == "lora" else 1.0

    def _alpha(self, key: LoraKey) -> float:
        info = self.file.infos[key.name]
        value = 0.0
        if math.prod(info.shape) == 1 and info.dtype in FACTOR_DTYPES + _INTEGERS:
            with RowReader() as reader:
                value = float(reader.read_tensor(info).item())
        if not math.isfinite(value) or value == 0:
            self.problem(key, f"{info.dtype} {list(info.shape)} is not a valid scale")
        return value

    def _add_bias(self, weight: str, key: LoraKey, scale: float) -> None:
        """Add PEFT's `lora_B.bias`, part of the output of `up` and scaled like it."""
        bias = weight.removesuffix(".weight") + ".bias"
        info = self.file.infos[key.name]
        if info.shape != self.targets.shapes.get(bias) or info.dtype not in FACTOR_DTYPES:
            self.problem(key, f"{info.dtype} {list(info.shape)} does not match {bias}", _OTHER_MODEL)
        else:
            self.deltas.append(Delta("diff", bias, {"diff": info}, scale))
