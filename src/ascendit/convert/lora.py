"""Fold LoRA files into float weights, some rows at a time, before they are quantized.

`Folds.open` reads the headers of all files and says which tensors of an expert change; `fold` adds, in the
order of the files, and rounds once. Every key is used or the run stops and names it.

It adds in float64: the same weight must get the same bits in blocks of any size, on one thread or many. In
float32 it would not. Libraries sum a product in an order that depends on the threads, and up to one element
in a hundred differs in its last bit. In float64 a sum of products of 16-bit factors is as good as exact.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ascendit.checkpoint.lora_names import Targets
from ascendit.checkpoint.names import Shapes
from ascendit.checkpoint.part import EXPERTS
from ascendit.convert.lora_deltas import Delta, Rows
from ascendit.convert.lora_file import open_file, refused
from ascendit.convert.lora_read import Reader
from ascendit.errors import UsageError

if TYPE_CHECKING:
    import torch

TILE = 64
"""Rows of one matrix product, at multiples of it and always whole, whatever rows are asked for: how a product
is summed depends on its size too. Small, so that its float64 stays in the cache."""
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
    if colon and (found := _number(number)) is not None:
        weight = found
    elif colon and file.endswith(".safetensors"):
        raise _bad_source(f"LoRA weight {number!r} in {text!r}", "a number after the last colon")
    else:
        file = rest
    if not file:
        raise _bad_source(f"no LoRA file in {text!r}", _FORM)
    return LoraSource(Path(file), weight, expert)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bad_source(got: str, needs: str) -> UsageError:
    return UsageError(got, needs=needs, fix=f"write {_FORM}", code="E-USE-01")


class Folds:
    """What all LoRA files do to one expert."""

    def __init__(self, shapes: Shapes, deltas: Sequence[Delta], counts: dict[str, int]) -> None:
        self.names = frozenset(delta.target for delta in deltas)
        self._shapes = shapes
        self._deltas: dict[str, list[Delta]] = {}
        for delta in deltas:
            self._deltas.setdefault(delta.target, []).append(delta)
        self._counts = counts
        self._opened: tuple[str, list[Rows]] | None = None
        self._lock = threading.Lock()

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
        deltas: list[Delta] = []
        ranks: list[int] = []
        counts: Counter[str] = Counter()
        for source in sources:
            reader = _read(source, expert, targets, experts)
            deltas += reader.deltas
            ranks += reader.ranks
            counts["files"] += bool(reader.deltas)
            counts["alpha"] += reader.num_alphas
        counts["tensors"] = len({delta.target for delta in deltas})
        counts.update(delta.kind for delta in deltas)
        if ranks:
            counts["rank_min"], counts["rank_max"] = min(ranks), max(ranks)
        return cls(shapes, deltas, dict(counts))

    def summary(self) -> dict[str, int]:
        """Counts for the report.

        `files` that change something, `tensors` that change, modules of each kind there is (`lora`, `loha`,
        `lokr`, `diff`, `diff_b`, `diff_m`, `norm`), modules with an `alpha`, `rank_min` and `rank_max`.
        """
        return dict(self._counts)

    def fold(self, name: str, rows: torch.Tensor, start: int) -> torch.Tensor:
        """`rows` [n, ...] of the tensor `name`, the first being row `start`, with all files added.

        Computed in float64, rounded once to the dtype of `rows`, which are not changed. The same row gets
        the same bits however the tensor is cut. A tensor that no file changes comes back as it is.
        """
        if name not in self.names or not len(rows):
            return rows
        import torch

        assert rows.shape[1:] == self._shapes[name][1:], (name, rows.shape)
        result = torch.empty(rows.shape, dtype=rows.dtype)
        deltas, stop = self._open(name), start + len(rows)
        for first in range(start // TILE * TILE, stop, TILE):
            last = min(first + TILE, self._shapes[name][0])
            begin, end = max(first, start), min(last, stop)
            part = rows[begin - start : end - start]
            total = part.to(torch.float64).reshape(len(part), -1)
            for delta in deltas:
                total += delta(first, last)[begin - first : end - first]
            result[begin - start : end - start] = total.view(part.shape)
        return result

    def _open(self, name: str) -> list[Rows]:
        """The factors of one tensor; those of the tensor before it are forgotten."""
        with self._lock:
            if self._opened is None or self._opened[0] != name:
                self._opened = None
                self._opened = (name, [delta.open() for delta in self._deltas[name]])
            return self._opened[1]


def _read(source: LoraSource, expert: str, targets: Targets, experts: Collection[str]) -> Reader:
    """The keys of one file that are for `expert`. Raises E-LRA-01 for all that cannot be used."""
    if source.expert is not None and source.expert not in experts:
        raise _bad_source(
            f"LoRA {source.path} is for {source.expert}",
            f"one of {', '.join(experts)}: the model has no other",
        )
    file = open_file(source.path)
    reader = Reader(file, targets, source.weight)
    if source.expert not in (None, expert):
        return reader
    mine = []
    for key in file.keys:
        named = key.expert if file.names_experts else None
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
    reader.read(mine)
    if reader.problems:
        raise refused(source.path, len(file.keys), reader.problems)
    return reader
