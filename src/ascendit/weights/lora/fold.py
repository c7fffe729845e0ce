"""Fold LoRA files into float weights, some rows at a time, before they are quantized.

`Folds.open` reads the headers of all files and says which tensors of an expert change; `fold` adds, in the
order of the files, and rounds once. Every key is used or the run stops and names it. Factors are read when
their tensor is folded and forgotten after it.

It adds in float64: the same weight must get the same bits in blocks of any size, on one thread or many. In
float32 it would not. Libraries sum a product in an order that depends on the threads, and up to one element
in a hundred differs in its last bit. In float64 a sum of products of 16-bit factors is as good as exact.
"""

from __future__ import annotations

import math
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
    gaps,
    misfit,
    open_file,
    rank_of,
    refused,
    roles_of,
)
from ascendit.weights.lora.keys import Key, Targets, refusal

if TYPE_CHECKING:
    import torch


# ---- which files, and for which expert ----------------------------------------------------------

EXPERT_WORDS = {"transformer": "transformer", "transformer_2": "transformer_2"} | dict(
    zip(("high", "low"), EXPERTS, strict=True)
)
"""What may stand before `=`; `high` and `low` are the noise that an expert works on."""
_FORM = "FILE[:WEIGHT], or transformer=FILE[:WEIGHT] (also high=) and transformer_2=FILE[:WEIGHT] (also low=)"


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file, how strong it is, and the expert it is for."""

    path: Path
    weight: float = 1.0
    expert: str | None = None
    """`transformer` or `transformer_2`; None: every expert, or the one that each key's prefix names."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise _bad_source(f"LoRA {self.path} has the weight {self.weight}", "a number other than 0")
        if self.expert not in (None, *EXPERTS):
            raise _bad_source(f"LoRA {self.path} is for {self.expert!r}", " or ".join(EXPERTS))


def parse_lora(text: str) -> LoraSource:
    """`FILE[:WEIGHT]` or `EXPERT=FILE[:WEIGHT]`; FILE may hold colons and `=`. Raises UsageError E-USE-01."""
    head, equals, tail = text.partition("=")
    expert = EXPERT_WORDS.get(head.strip()) if equals else None
    rest = tail if expert else text
    file, colon, number = rest.rpartition(":")
    weight = 1.0
    try:
        if colon:
            weight, rest = float(number), file
    except ValueError:
        if file.endswith(".safetensors"):
            got = f"LoRA weight {number!r} in {text!r}"
            raise _bad_source(got, "a number after the last colon") from None
    if not rest:
        raise _bad_source(f"no LoRA file in {text!r}", _FORM)
    return LoraSource(Path(rest), weight, expert)


def _bad_source(got: str, needs: str) -> UsageError:
    return UsageError(got, needs=needs, fix=f"write {_FORM}")


# ---- folding ------------------------------------------------------------------------------------

PRODUCT_ROWS = 64
"""Rows of one matrix product, at multiples of it and always whole, whatever rows are asked for: how a product
is summed depends on its size too. Small, so that its float64 stays in the cache."""


class Folds:
    """What all LoRA files do to one expert."""

    def __init__(self, shapes: Shapes, deltas: Sequence[Delta]) -> None:
        self._shapes = shapes
        self._deltas = group_by(deltas, lambda delta: delta.target)
        self.names = frozenset(self._deltas)
        self._opened: dict[str, list[Rows]] = {}

    @classmethod
    def open(
        cls, sources: Sequence[LoraSource], expert: str, shapes: Shapes, *, experts: Collection[str] = EXPERTS
    ) -> Self:
        """Read the headers of `sources` and match their keys with `shapes`, the tensors of `expert`.

        `experts`: all that the model has, so that a file for one which it lacks is refused. Raises
        CheckpointError E-LRA-01 for keys that cannot be used (the first five by name, and how many more),
        E-CKP-02 for a damaged file; UsageError E-USE-01 and E-USE-02 for what is no LoRA file.
        """
        targets = Targets(shapes)
        deltas = [delta for source in sources for delta in _read(source, expert, targets, experts)]
        return cls(shapes, deltas)

    def fold(self, name: str, rows: torch.Tensor, start: int, columns: slice | None = None) -> torch.Tensor:
        """`rows` [n, ...] of the tensor `name`, the first being row `start`, with all files added.

        `columns`: those of the second axis that `rows` hold, with the bits that they have in the whole.

        Computed in float64, rounded once to the dtype of `rows`, which are not changed. The same row gets
        the same bits however the tensor is cut. A tensor that no file changes comes back as it is.
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
            part = rows[begin - start : end - start]
            total = part.to(torch.float64).reshape(len(part), -1)
            for delta in deltas:
                total += delta(first, last)[begin - first : end - first][:, columns or slice(None)]
            result[begin - start : end - start] = total.view(part.shape)
        return result

    def _open(self, name: str) -> list[Rows]:
        """The factors of one tensor; those of the tensor before it are forgotten."""
        if name not in self._opened:
            self._opened = {}
            self._opened = {name: [delta.open() for delta in self._deltas[name]]}
        return self._opened[name]


def _read(source: LoraSource, expert: str, targets: Targets, experts: Collection[str]) -> list[Delta]:
    """The keys of one file that are for `expert`. Raises E-LRA-01 for all that cannot be used."""
    if source.expert is not None and source.expert not in experts:
        raise _bad_source(
            f"LoRA {source.path} is for {source.expert}",
            f"one of {', '.join(experts)}: the model has no other",
        )
    file = open_file(source.path)
    reader = DeltaReader(file, targets, source.weight)
    if source.expert not in (None, expert):
        return []
    mine = []
    # `transformer.` stands before the keys of any expert; beside `transformer_2.` it means the first.
    names_experts = any(key.expert == "transformer_2" for key in file.keys)
    for key in file.keys:
        named = key.expert if names_experts else None
        if named is not None and named not in experts:
            reader.problem(key, f"for {named}, which this model does not have")
        elif source.expert is not None and named not in (None, expert):
            reader.problem(
                key,
                f"for {named}, and the file is given for {expert}",
                f"give the file without {expert}= before it",
            )
        elif named in (None, expert):
            mine.append(key)
    for target, group in reader.groups(mine).items():
        reader.read_group(target, group)
    if reader.problems:
        raise refused(source.path, len(file.keys), reader.problems)
    return reader.deltas


# ---- from the keys of a file to changes ---------------------------------------------------------

_INTEGERS = ("I64", "I32", "I16", "I8", "U8")
_OTHER_MODEL = "use a LoRA made for a model of this width and kind"


class DeltaReader:
    """Collects `deltas` and `problems` of a file."""

    def __init__(self, file: LoraFile, targets: Targets, weight: float) -> None:
        self.file = file
        self.targets = targets
        self.weight = weight
        self.problems: list[Problem] = []
        self.deltas: list[Delta] = []

    def problem(self, key: Key, why: str, fix: str = Problem.fix) -> None:
        """Note that `key` cannot be used."""
        self.problems.append(Problem(key.name, why, fix))

    def groups(self, keys: Iterable[Key]) -> dict[str, dict[str, Key]]:
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

    def read_group(self, target: str, group: dict[str, Key]) -> None:
        """One tensor: factors with `alpha`, a whole difference, or both."""
        alpha, up_bias = group.get("alpha"), group.get("up_bias")
        found = {kind: {role: group[role] for role in roles_of(kind) if role in group} for kind in FACTORS}
        if alpha and not any(keys for kind, keys in found.items() if kind != "diff"):
            self.problem(alpha, "no factors of this layer to scale")
        if up_bias and not found["lora"]:
            self.problem(up_bias, "the factors of this layer are missing")
        for kind, keys in found.items():
            if keys and (infos := self._checked(kind, keys, target)) is not None:
                scale = self.weight * self._scale(kind, keys, infos, alpha)
                self.deltas.append(Delta(kind, target, infos, scale))
                if kind == "lora" and up_bias:
                    self._add_bias(target, up_bias, scale)

    def _checked(self, kind: str, keys: dict[str, Key], target: str) -> dict[str, TensorInfo] | None:
        """Where the tensors of a module lie; None, and problems, when one is missing or does not fit."""
        infos = {role: self.file.infos[key.name] for role, key in keys.items()}
        if missing := gaps(kind, keys):
            for key in keys.values():
                half = f"half of a pair: {missing} of this layer is missing"
                self.problem(key, half, "get the whole file again")
            return None
        bad = [role for role, info in infos.items() if info.dtype not in FACTOR_DTYPES or not info.shape]
        for role in bad:
            dtype, sizes = infos[role].dtype, list(infos[role].shape)
            self.problem(keys[role], f"{dtype} {sizes} holds no floating-point rows")
        if bad:
            return None
        shape = self.targets.shapes[target]
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
        if alpha is not None:
            return self._alpha(alpha) / rank
        key, scalings = next(iter(keys.values())), self.file.scalings
        return scalings.get(key.expert, scalings[None]).of(key.path, rank) if kind == "lora" else 1.0

    def _alpha(self, key: Key) -> float:
        info = self.file.infos[key.name]
        value = 0.0
        if math.prod(info.shape) == 1 and info.dtype in FACTOR_DTYPES + _INTEGERS:
            with RowReader() as reader:
                value = float(reader.tensor(info).item())
        if not math.isfinite(value) or value == 0:
            self.problem(key, f"{info.dtype} {list(info.shape)} holds no number to scale by")
        return value

    def _add_bias(self, weight: str, key: Key, scale: float) -> None:
        """PEFT's `lora_B.bias`: part of what `up` gives, so it is scaled like it."""
        bias = weight.removesuffix(".weight") + ".bias"
        info = self.file.infos[key.name]
        if info.shape != self.targets.shapes.get(bias) or info.dtype not in FACTOR_DTYPES:
            self.problem(key, f"{info.dtype} {list(info.shape)} is no change of {bias}", _OTHER_MODEL)
        else:
            self.deltas.append(Delta("diff", bias, {"diff": info}, scale))
