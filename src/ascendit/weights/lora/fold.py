"""Fold LoRA files into float weights, a few rows at a time, before they are quantized.

`Folds.open` reads the headers of all files and determines the changed tensors of an expert; `fold` adds the
changes in the order of the files. A key that cannot be used is an error. The factors of a tensor are in
memory only while it is folded. `Folds.notes` is one line per file with its keys and its scale.

Sums are in float64, so that a weight gets the same bits for every block size and number of threads. In
float32 the order of a sum depends on the threads, and up to one element in a hundred differs in its last bit.
In float64, sums of products of 16-bit factors are practically exact. PyTorch rounds a sum to BF16 or FP16
through float32, so that one very close to the middle of two values may not become the nearest one.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ascendit.checkpoint.component import EXPERT_ALIASES, EXPERTS
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.errors import CheckpointError, UsageError
from ascendit.names import Shapes, to_wan
from ascendit.report import group_by
from ascendit.weights.lora.fields import ALPHA_KEYS, plain
from ascendit.weights.lora.file import (
    FACTOR_DTYPES,
    FACTORS,
    MERGE_FIX,
    SUFFIXES,
    Delta,
    LoraFile,
    Problem,
    Rows,
    adapter_file,
    missing_roles,
    open_file,
    rank_of,
    roles_of,
    shape_problem,
    unusable_keys,
)
from ascendit.weights.lora.keys import SKIPPED, WRAPPERS, LoraKey, Targets, changes_others, refusal
from ascendit.weights.lora.strength import (
    ROUNDING,
    AppliedLora,
    OwnAlpha,
    Setting,
    Settings,
    Strength,
    read_settings,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger("ascendit")

# ---- the files and their experts ----------------------------------------------------------------

_SYNTAX = (
    "FILE[:WEIGHT], or transformer=FILE[:WEIGHT] (also high=) and transformer_2=FILE[:WEIGHT] (also low=)"
)


@dataclass(frozen=True)
class LoraSource:
    """A LoRA file, or a folder with only one, its weight and its expert.

    Raises UsageError (E-USE-01) for an invalid weight or expert.
    """

    path: Path
    weight: float = 1.0
    expert: str | None = None
    """`transformer` or `transformer_2`; None: every expert, or the expert named in the prefix of each key."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", adapter_file(self.path))
        if not math.isfinite(self.weight) or self.weight == 0:
            raise _bad_source(f"LoRA {self.path} has the weight {self.weight}", "a number other than 0")
        if self.expert not in (None, *EXPERTS):
            raise _bad_source(f"LoRA {self.path} is for {self.expert!r}", " or ".join(EXPERTS))

    def __str__(self) -> str:
        """The text that `parse_lora` reads."""
        path = str(self.path)
        if _expert_of(path.partition("=")[0]):  # the name of a file, not an expert
            path = f"./{path}"
        text = f"{self.expert}={path}" if self.expert else path
        plain = self.weight == 1 and ":" not in text
        return text if plain else f"{text}:{self.weight!r}".removesuffix(".0")


def _expert_of(name: str) -> str | None:
    return EXPERT_ALIASES.get(name.strip().lower())


def parse_lora(text: str) -> LoraSource:
    """Parse `FILE[:WEIGHT]` or `EXPERT=FILE[:WEIGHT]`; FILE may contain `:` and `=`.

    Raises UsageError (E-USE-01).
    """
    head, equals, tail = text.partition("=")
    expert = _expert_of(head) if equals else None
    path = tail if expert else text
    file, colon, number = path.rpartition(":")
    weight = 1.0
    try:
        if colon:
            weight, path = float(number), file
    except ValueError:
        if file.endswith(SUFFIXES):
            got = f"LoRA weight {number!r} in {text!r}"
            raise _bad_source(got, "a number after the last colon") from None
    if not path:
        raise _bad_source(f"no LoRA file in {text!r}", _SYNTAX)
    return LoraSource(Path(os.path.expanduser(path)), weight, expert)


def lora_sources(value: object) -> tuple[LoraSource, ...]:
    """LoRA files from one or a sequence of texts for `parse_lora`, paths or LoraSources; none from None.

    Raises UsageError (E-USE-01) for anything else.
    """
    pairs: list[Any] = [*value.items()] if isinstance(value, dict) else [value]
    if pairs and all(isinstance(pair, tuple) and len(pair) == 2 and _is_number(pair[1]) for pair in pairs):
        fix = f"loras={json.dumps([f'{file}:{weight}' for file, weight in pairs])}"
        raise UsageError(f"LoRA {value!r}", needs=_SYNTAX, fix=fix)
    if isinstance(value, list | tuple):
        return tuple(source for item in value for source in lora_sources(item))
    if isinstance(value, os.PathLike):
        return (LoraSource(Path(value)),)
    if isinstance(value, str):
        return (parse_lora(value),)
    if value is not None and not isinstance(value, LoraSource):
        raise _bad_source(f"LoRA {value!r}", "a text, a path or a LoraSource")
    return () if value is None else (value,)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bad_source(got: str, needs: str) -> UsageError:
    return UsageError(got, needs=needs, fix=f"write {_SYNTAX}")


# ---- folding ------------------------------------------------------------------------------------

PRODUCT_ROWS = 64
"""Rows of one matrix product. Products are always computed in these blocks, because the order of a sum
depends on the size of the product. Small enough for the CPU cache in float64."""


class Folds:
    """The changes of one expert by all LoRA files."""

    def __init__(
        self, shapes: Shapes, deltas: Sequence[Delta], applied: Sequence[AppliedLora | None] = ()
    ) -> None:
        self._shapes = shapes
        self._deltas = group_by(deltas, lambda delta: delta.target)
        self.names = frozenset(self._deltas)
        self.applied = tuple(applied)
        """The changes by each file; None for a file for another expert."""
        self._opened: dict[str, list[Rows]] = {}

    @classmethod
    def open(
        cls,
        sources: Sequence[LoraSource],
        expert: str,
        shapes: Shapes,
        *,
        experts: Collection[str] = EXPERTS,
        skip: Sequence[str] = (),
    ) -> Self:
        """Read the headers of `sources` and match their keys with `shapes`, the tensors of `expert`.

        `experts`: all experts of the model. `skip`: groups of `SKIPPED` whose keys are left out. Raises
        CheckpointError: E-LRA-01 for keys that cannot be used (the first five, and the number of others), and
        for settings of a strength that disagree, E-CKP-02 for a damaged file; UsageError: E-USE-01 for
        another file type, an unknown group, or a file for an expert that the model does not have, E-USE-02
        for a missing file. The caller checks with `require_skipped` that each group has a key.
        """
        check_groups(skip, sources)
        targets = Targets(shapes)
        readers = [_read(source, expert, targets, experts, skip) for source in sources]
        deltas = [delta for reader in readers if reader for delta in reader.deltas]
        folds = cls(shapes, deltas, [reader.applied() if reader else None for reader in readers])
        for note in folds.notes:
            log.info("LoRA into %s: %s", expert, note)
        return folds

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each file for this expert: its keys, its scale and where alpha is written."""
        return tuple(applied.line() for applied in self.applied if applied)

    def fold(self, name: str, rows: torch.Tensor, start: int, columns: slice | None = None) -> torch.Tensor:
        """Add all files to `rows` [n, ...] of the tensor `name`, which begin at row `start`.

        `columns`: the range of the second axis in `rows`; default: all. Computed in float64 and rounded
        by PyTorch, through float32, to the dtype of `rows`. The bits of an element do not depend on rows and
        columns. Returns a new tensor, or `rows` itself if no file changes the tensor. Raises CheckpointError
        (E-LRA-01) for values of a file that are not finite, and for a sum that is too large for the dtype.
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
            total = block.to(torch.float64, copy=True).reshape(len(block), -1)
            for delta in deltas:
                total += delta(first, last)[begin - first : end - first][:, columns or slice(None)]
            total = total.view(block.shape)
            result[begin - start : end - start] = total
            rounded = result[begin - start : end - start].to(torch.float64)
            if bool((torch.isfinite(block.to(torch.float64)) & ~torch.isfinite(rounded)).any()):
                raise _too_large(name, self._deltas[name], rows.dtype)
        return result

    def _open(self, name: str) -> list[Rows]:
        """Read the factors of one tensor, and free the factors of the previous tensor."""
        if name not in self._opened:
            self._opened = {}
            self._opened = {name: [delta.open() for delta in self._deltas[name]]}
        return self._opened[name]


def _too_large(name: str, deltas: Iterable[Delta], dtype: torch.dtype) -> CheckpointError:
    files = dict.fromkeys(str(info.file) for delta in deltas for info in delta.tensors.values())
    scales = ", ".join(f"{delta.scale:g}" for delta in deltas)
    return CheckpointError(
        f"{', '.join(files)}: the sum with {name} is too large for {str(dtype).removeprefix('torch.')} "
        f"(weight x alpha / rank: {scales})",
        needs="finite sums",
        fix="use a smaller weight (FILE:WEIGHT), or another checkpoint of its training",
        code="E-LRA-01",
    )


def lora_report(sources: Sequence[LoraSource], folds: Mapping[str, Folds]) -> list[dict[str, Any]]:
    """Plain data for each file: its weight, and per expert its keys, its scale and their origin."""
    return [
        {
            "file": source.path.name,
            "weight": source.weight,
            "expert": source.expert or "all",
            "applied": {name: own.as_dict() for name, fold in folds.items() if (own := fold.applied[i])},
        }
        for i, source in enumerate(sources)
    ]


def check_groups(skip: Sequence[str], loras: Sequence[LoraSource]) -> None:
    """Raise UsageError (E-USE-01) for a group that is not one of `SKIPPED`, and for one without a LoRA."""
    if unknown := [group for group in skip if group not in SKIPPED]:
        raise UsageError(
            f"--lora-skip {unknown[0]}",
            needs=f"a group of keys: {', '.join(SKIPPED)}",
            fix=f"use --lora-skip {next(iter(SKIPPED))}, or omit it",
        )
    if skip and not loras:
        raise UsageError(
            f"--lora-skip {skip[0]} without a LoRA",
            needs="a LoRA file with keys to leave out",
            fix="add --lora FILE, or omit --lora-skip",
        )


def require_skipped(skip: Collection[str], folds: Iterable[Folds]) -> None:
    """Raise UsageError (E-USE-05) for a group of which no file has a key in any expert."""
    groups = {group for fold in folds for applied in fold.applied if applied for group in applied.skipped}
    if unused := [group for group in skip if group not in groups]:
        raise UsageError(
            f"--lora-skip {unused[0]} matches no key of the LoRA files",
            needs="a group of which at least one file has keys",
            fix=f"omit --lora-skip {unused[0]}",
            code="E-USE-05",
        )


def _read(
    source: LoraSource, expert: str, targets: Targets, experts: Collection[str], skip: Collection[str]
) -> DeltaReader | None:
    """Read the changes of `expert` in one file; None if the file is for another expert.

    Raises CheckpointError (E-LRA-01) for keys that cannot be used.
    """
    if source.expert is not None and source.expert not in experts:
        raise _bad_source(
            f"LoRA {source.path} is for {source.expert}",
            f"one of {', '.join(experts)}: the model has no other expert",
        )
    file = open_file(source.path)
    if source.expert not in (None, expert):
        return None
    reader = DeltaReader(file, targets, source.weight, expert)
    # `transformer.` means any expert, but the first one in files with keys that always mean one expert.
    names_experts = any(key.one_expert for key in file.keys)
    for key in file.keys:
        named = key.expert if names_experts else None
        if reader.read_file_alpha(key):
            continue
        if key.group in skip:
            reader.skipped[key.group] += named in (None, expert)
        elif named is not None and named not in experts:
            reader.problem(key, f"for {named}, which this model does not have")
        elif source.expert is not None and named not in (None, expert):
            reader.problem(
                key,
                f"for {named}, but the file was passed for {expert}",
                f"pass the file without {expert}=",
            )
        elif named in (None, expert):
            reader.keys.append(key)
    for target, group in reader.groups().items():
        reader.read_group(target, group)
    if reader.problems:
        raise unusable_keys(source.path, len(file.keys), reader.problems)
    return reader


# ---- match the keys of a file with tensors ------------------------------------------------------

_INTEGERS = ("I64", "I32", "I16", "I8", "U8")
_OTHER_MODEL = "use a LoRA for a model of this width and kind"


class DeltaReader:
    """Collects the `deltas`, strengths and `problems` of a file for one expert."""

    def __init__(self, file: LoraFile, targets: Targets, weight: float, expert: str) -> None:
        self.file = file
        self.settings = read_settings(file)
        self.targets = targets
        self.weight = weight
        self.expert = expert
        self.keys: list[LoraKey] = []
        """The keys for this expert."""
        self.skipped: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.deltas: list[Delta] = []
        self.strengths: list[Strength] = []
        self.num_file_alphas = 0

    def read_file_alpha(self, key: LoraKey) -> bool:
        """Read a tensor such as `lora_alpha`, the alpha of all layers; False for another key."""
        wrapper = f"{key.path}." if key.role == "alpha" else ""
        if wrapper not in WRAPPERS and (key.role is not None or plain(key.path) not in ALPHA_KEYS):
            return False
        alpha = self._scalar(key, may_be_zero=True)
        setting = Setting(f"tensor {key.name}", WRAPPERS.get(wrapper) or key.expert, alpha=alpha)
        self.settings = Settings((*self.settings.items, setting))
        self.num_file_alphas += 1
        return True

    def applied(self) -> AppliedLora:
        """A summary of the file."""
        skipped = {group: n for group, n in self.skipped.items() if n}
        num_keys = len(self.keys) + self.num_file_alphas
        return AppliedLora(self.file.path.name, self.weight, num_keys, skipped, tuple(self.strengths))

    def problem(self, key: LoraKey, reason: str, fix: str = Problem.fix, group: str = "") -> None:
        """Record that `key` cannot be used."""
        self.problems.append(Problem(key.name, reason, fix, group))

    def groups(self) -> dict[str, dict[str, LoraKey]]:
        """Target -> role -> key. `diff_b` and `diff_m` become the `diff` of another tensor of the layer."""
        groups: dict[str, dict[str, LoraKey]] = {}
        for key in self.keys:
            if key.role is None:
                reason = refusal(key.name) or "not a key of a supported kind of LoRA"
                self.problem(key, reason, MERGE_FIX if changes_others(key.name) else Problem.fix)
            elif (target := self.targets.find(key)) is None:
                self.problem(key, self.targets.reason_missing(key), group=key.group)
            else:
                role = "diff" if key.role in ("diff_b", "diff_m") else key.role
                first = groups.setdefault(target, {}).setdefault(role, key)
                if first is not key:
                    self.problem(key, f"means the same as {first.name}")
        return groups

    def read_group(self, target: str, group: dict[str, LoraKey]) -> None:
        """Add the changes of one tensor: factors with `alpha`, a difference, or both."""
        up_bias = group.get("up_bias")
        modules = {kind: {role: group[role] for role in roles_of(kind) if role in group} for kind in FACTORS}
        if not any(keys for kind, keys in modules.items() if kind != "diff"):
            for role in ("alpha", "rslora"):
                if role in group:
                    self.problem(group[role], "the factors that it scales are missing")
        if up_bias and not modules["lora"]:
            self.problem(up_bias, "the factors of this layer are missing")
        for kind, keys in modules.items():
            if keys and (infos := self._checked(kind, keys, target)) is not None:
                scale = self.weight * self._scale(kind, infos, target, group)
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
            first = next(iter(keys.values()))
            group = first.group if first.group == "patch" else ""
            self.problem(first, f"{problem} of {target}", _OTHER_MODEL, group)
            return None
        # A modulation table may lack the first axis of size 1: use the rows of the model.
        return {"diff": _reshaped(infos["diff"], shape)} if kind == "diff" else infos

    def _scale(
        self, kind: str, infos: dict[str, TensorInfo], target: str, group: dict[str, LoraKey]
    ) -> float:
        """The scale without the weight of the file.

        Differences have no rank, and so no scale. Nor does a LoKr of two complete factors, unless PEFT's
        configuration names both.
        """
        rank = rank_of(kind, infos)
        if rank is None and kind == "lokr":
            rank = self.settings.divisor
        if rank is None:
            return 1.0
        own = None
        if "alpha" in group:
            info = self.file.infos.get(group["alpha"].name)
            value = self._scalar(group["alpha"], may_be_zero=True)  # 0 is the rank, as in kohya's scripts
            own = OwnAlpha(value, ROUNDING.get(info.dtype, 1e-6) if info else 1e-6)
        flag = bool(self._scalar(group["rslora"], is_switch=True)) if "rslora" in group else None
        key = next(key for role, key in group.items() if role in infos)
        layer = target.removesuffix(".weight")
        names = (key.path, layer, to_wan(layer) or layer, key.name.partition(".lora_")[0])
        strength = self.settings.of(key, names, self.expert, rank, own, flag=flag, has_rank=kind != "lokr")
        if strength.problem:
            self.problem(key, strength.problem, strength.fix)
        self.strengths.append(strength)
        return strength.scale

    def _scalar(self, key: LoraKey, *, may_be_zero: bool = False, is_switch: bool = False) -> float:
        """The value of a tensor with one element, or of a number beside the tensors."""
        if info := self.file.infos.get(key.name):
            value, text = math.nan, f"{info.dtype} {list(info.shape)}"
            dtypes = (*FACTOR_DTYPES, *_INTEGERS, *["BOOL"] * is_switch)
            if math.prod(info.shape) == 1 and info.dtype in dtypes:
                with RowReader() as reader:
                    value = float(reader.read_tensor(info).item())
                text += f" with the value {value:g}"
        else:
            number = self.file.values[key.name]
            text = f"{number!r:.60}"
            is_number = isinstance(number, int | float) and (is_switch or not isinstance(number, bool))
            value = float(number) if is_number and abs(number) < 1e300 else math.nan
        if math.isfinite(value) and (value or may_be_zero or is_switch):
            return value
        self.problem(key, f"{text} is not a valid scale")
        return 1.0

    def _add_bias(self, weight: str, key: LoraKey, scale: float) -> None:
        """Add PEFT's `lora_B.bias`, part of the output of `up` and scaled like it."""
        bias = weight.removesuffix(".weight") + ".bias"
        info = self.file.infos[key.name]
        if info.shape != self.targets.shapes.get(bias) or info.dtype not in FACTOR_DTYPES:
            self.problem(key, f"{info.dtype} {list(info.shape)} does not match {bias}", _OTHER_MODEL)
        else:
            self.deltas.append(Delta("diff", bias, {"diff": info}, scale))


def _reshaped(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """A tensor with another number of leading axes of size 1."""
    extra = len(shape) - len(info.shape)
    strides = info.strides and ((1,) * extra + info.strides)[max(-extra, 0) :]
    return replace(info, shape=shape, strides=strides)
