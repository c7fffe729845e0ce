"""Compare the numbers of two checkpoints in any layout and scheme: decode both, a few rows at a time.

Weights are compared as a layer applies them to its unsmoothed input: y = (x * mul_scale) W^T, so column k of
a smoothed weight is multiplied by mul_scale[k]. A is the signal, A - B the noise. Functions import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ascendit.checkpoint.layer_format import Layer
from ascendit.checkpoint.reader import RowReader, as_tensor
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.inspect.report import ModelReport, PartReport
from ascendit.inspect.transformer_report import dtype_name
from ascendit.names import sort_names
from ascendit.pages import charts
from ascendit.pages.page import Cell, Figure, Section, Table
from ascendit.progress import Meter, OnProgress
from ascendit.report import columns, counted, group_by, selected, wrapped
from ascendit.weights.decoded_rows import layer_rows

if TYPE_CHECKING:
    from torch import Tensor

Status = Literal["equal", "different", "only in A", "only in B", "other shape"]
MAX_ROWS = 12  # printed per part; --json has all
_CHUNK = 1 << 17  # values that are compared at a time


@dataclass(frozen=True, kw_only=True)
class ValueRow:
    """The comparison of one tensor, or of the decoded weight of one layer."""

    part: str
    name: str
    status: Status
    """`equal`: all values are; NaN equals NaN, and -0 equals 0."""
    a: str | None
    """Scheme or dtype in A, for example `mxfp8`; None if A lacks it."""
    b: str | None
    values: int = 0
    differing: int = 0
    max_difference: float = 0.0
    """Largest |A - B| of finite values."""
    signal: float = 0.0
    """Sum of squares of A, over the values that are finite on both sides."""
    noise: float = 0.0
    """Sum of squares of A - B."""
    invalid_a: int = 0
    """NaN and infinite values in A."""
    invalid_b: int = 0

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise); None if undefined: equal values, or no finite signal."""
        return _decibels(self.signal, self.noise)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        names = ("part", "name", "status", "a", "b", "values", "differing", "sqnr_db", "max_difference")
        return selected(self, *names, "invalid_a", "invalid_b")

    def cells(self) -> tuple[str, ...]:
        """Cells of a line for a terminal."""
        if self.status not in ("equal", "different"):
            return self.status, "", "", self.name, self.formats()
        sqnr = "-" if self.sqnr_db is None else f"{self.sqnr_db:.2f} dB"
        counts = {"A": self.invalid_a, "B": self.invalid_b}
        invalid = [f"{count} NaN or infinite in {side}" for side, count in counts.items() if count]
        text = "  ".join([self.formats(), *invalid])
        return sqnr, f"{self.max_difference:.3g}", f"{self.differing}/{self.values}", self.name, text

    def formats(self) -> str:
        """Scheme or dtype on both sides: `bf16 -> mxfp8`, once if equal."""
        return f"{self.a or '-'} -> {self.b or '-'}" if self.a != self.b else str(self.a)


@dataclass(frozen=True)
class ValueDiff:
    """The comparison of all tensors of two checkpoints."""

    rows: tuple[ValueRow, ...]

    @property
    def same(self) -> bool:
        """Whether both have the same tensors with equal values."""
        return bool(self.rows) and all(row.status == "equal" for row in self.rows)

    @property
    def worst(self) -> list[ValueRow]:
        """The rows that differ: without a counterpart first, then by SQNR, lowest first."""
        return sorted((row for row in self.rows if row.status != "equal"), key=_badness)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`: all rows, and a summary of each part."""
        by_part = group_by(self.rows, lambda row: row.part)
        parts = {name: _summary(rows) for name, rows in by_part.items()}
        return {"same": self.same, "parts": parts, "rows": [row.as_dict() for row in self.rows]}

    def lines(self, width: int | None = None) -> list[str]:
        """Lines for a terminal: for each part a summary, then its worst rows. `width`: of the terminal."""
        lines = []
        worst = group_by(self.worst, lambda row: row.part)
        for part, rows in group_by(self.rows, lambda row: row.part).items():
            lines += ["", *wrapped(f"{part}   ", _summary_text(_summary(rows)), width)]
            if shown := worst.get(part, [])[:MAX_ROWS]:
                head = ("SQNR", "max difference", "values that differ", "worst first", "A -> B")
                lines += columns([head, *(row.cells() for row in shown)], indent="  ", width=width)
            if (more := len(worst.get(part, [])) - MAX_ROWS) > 0:
                lines.append(f"  and {more} more; --json has all")
        return lines

    def summary(self) -> str:
        """One line about all parts."""
        return _summary_text(_summary(self.rows)) if self.rows else "no tensors to compare"

    def sections(self) -> list[Section]:
        """Sections of the HTML report: parts, plots over the blocks, all tensors. Imports matplotlib."""
        by_part = group_by(self.rows, lambda row: row.part)
        parts = [_summary_cells(name, _summary(rows)) for name, rows in by_part.items()]
        sections = [Section("Summary", [Table(head=PART_HEAD, rows=parts)], self.summary())]
        for field, title in MEASURES.items():
            panels = {name: _measured(rows, field) for name, rows in by_part.items()}
            panels = {name: values for name, values in panels.items() if any(map(charts.depth_of, values))}
            if panels:
                svg = charts.by_depth(panels, title, log=field == "max_difference")
                sections.append(Section(title, [Figure(svg=svg, caption=_CAPTION)]))
        worst = [_page_cells(row) for row in self.worst[:MAX_WORST]]
        sections += [Section("Worst tensors", [Table(head=ROW_HEAD, rows=worst)])] if worst else []
        title = counted(len(self.rows), "tensor")
        rows = [_page_cells(row) for row in self.rows]
        return [*sections, Section("Tensors", [Table(head=ROW_HEAD, rows=rows, title=title, folded=True)])]


MAX_WORST = 20  # rows of the table of the worst tensors in a page
MEASURES = {"sqnr_db": "SQNR in dB", "max_difference": "Largest difference"}
"""Attribute of a row -> title of its plot over the blocks."""
PART_HEAD = (
    "part",
    "tensors",
    "equal",
    "different",
    "not comparable",
    "SQNR",
    "max difference",
    "NaN in A / B",
)
ROW_HEAD = ("part", "tensor", "A -> B", "SQNR", "max difference", "values that differ", "NaN in A / B")
_CAPTION = "A curve for each kind of tensor that differs. Equal tensors have no point; the table has all."


def _measured(rows: Iterable[ValueRow], field: str) -> dict[str, float]:
    """Name -> measurement, for the tensors that differ."""
    values = {row.name: getattr(row, field) for row in rows if row.status == "different"}
    return {name: value for name, value in values.items() if value is not None and 0 < abs(value) < math.inf}


def _summary_cells(name: str, data: Mapping[str, Any]) -> tuple[str | Cell, ...]:
    counts = (str(data["tensors"]), str(data["equal"]), str(data["different"]))
    other = Cell(str(data["not_comparable"]), "bad" if data["not_comparable"] else "")
    invalid = data["invalid_a"], data["invalid_b"]
    return (
        name,
        *counts,
        other,
        _decibel_text(data["sqnr_db"]),
        f"{data['max_difference']:.3g}",
        _invalid(*invalid),
    )


def _page_cells(row: ValueRow) -> tuple[str | Cell, ...]:
    """A row of the tables of a page."""
    names = (row.part, row.name, row.formats())
    if row.status == "equal":
        return (*names, Cell("equal", "good"), "0", f"0/{row.values}", _invalid(row.invalid_a, row.invalid_b))
    if row.status != "different":
        return (*names, Cell(row.status, "bad"), "-", "-", "-")
    differing = f"{row.differing}/{row.values}"
    numbers = (_decibel_text(row.sqnr_db), f"{row.max_difference:.3g}", differing)
    return (*names, *numbers, _invalid(row.invalid_a, row.invalid_b))


def _decibel_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} dB"


def _invalid(a: int, b: int) -> Cell:
    return Cell(f"{a} / {b}", "bad") if a or b else Cell("-")


def _summary(rows: tuple[ValueRow, ...] | list[ValueRow]) -> dict[str, Any]:
    compared = [row for row in rows if row.status in ("equal", "different")]
    return {
        "tensors": len(rows),
        "equal": sum(row.status == "equal" for row in rows),
        "different": sum(row.status == "different" for row in rows),
        "not_comparable": len(rows) - len(compared),
        "sqnr_db": _decibels(sum(row.signal for row in compared), sum(row.noise for row in compared)),
        "max_difference": max((row.max_difference for row in compared), default=0.0),
        "invalid_a": sum(row.invalid_a for row in compared),
        "invalid_b": sum(row.invalid_b for row in compared),
    }


def _summary_text(data: Mapping[str, Any]) -> str:
    texts = [f"{data['equal']} of {counted(data['tensors'], 'tensor')} equal"]
    texts += [f"{data['different']} different"] if data["different"] else []
    if data["not_comparable"]:
        texts.append(f"{data['not_comparable']} only on one side or of another shape")
    if data["sqnr_db"] is not None:
        texts.append(f"SQNR {data['sqnr_db']:.2f} dB, max difference {data['max_difference']:.3g}")
    for side in "ab":
        if count := data[f"invalid_{side}"]:
            texts.append(f"{count} NaN or infinite values in {side.upper()}")
    return ", ".join(texts)


def _badness(row: ValueRow) -> tuple[float, float]:
    if row.status != "different":
        return -math.inf, 0.0
    return (-math.inf if row.sqnr_db is None else row.sqnr_db), -row.max_difference


def _decibels(signal: float, noise: float) -> float | None:
    """None if either is zero or not finite."""
    finite = math.isfinite(signal) and math.isfinite(noise)
    return 10 * (math.log10(signal) - math.log10(noise)) if finite and signal > 0 and noise > 0 else None


# ---- reading both sides -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """One tensor of one side."""

    label: str
    shape: tuple[int, ...]
    nbytes: int
    rows: Callable[[RowReader], Iterator[Tensor]]
    """Yields all rows in order, as numbers of any dtype."""


def compare_values(a: ModelReport, b: ModelReport, on_progress: OnProgress | None = None) -> ValueDiff:
    """Decode and compare all tensors of two checkpoints.

    Raises CheckpointError (E-CKP-02) if a file changes while it is read.
    """
    left, right = ({p.name: _stored(p) for p in report.parts if p.tensors} for report in (a, b))
    sides = [x.nbytes for side in (left, right) for part in side.values() for x in part.values()]
    advance = Meter(sum(sides), on_progress).stage_counter("values")
    rows = []
    with RowReader() as one, RowReader() as other:
        for part in dict.fromkeys([*left, *right]):
            xs, ys = left.get(part, {}), right.get(part, {})
            for name in sort_names(dict.fromkeys([*xs, *ys])):
                x, y = xs.get(name), ys.get(name)
                rows.append(_compare(part, name, x, y, one, other))
                advance(name, sum(side.nbytes for side in (x, y) if side))
    return ValueDiff(tuple(rows))


def _stored(part: PartReport) -> dict[str, _Stored]:
    """Name in the library -> tensor, the decoded layers of an expert among them."""
    if part.expert is None:
        return {name: _plain(info) for name, info in part.named.items()}
    stored, used = {}, set()
    for name, layer in part.expert.layers.items():
        infos = [info for role, info in layer.tensors.items() if role != "bias"]
        used |= {info.name for info in infos}
        label = layer.scheme if layer.scheme != "bf16" else dtype_name(layer.tensors["weight"].dtype)
        label += " smoothed" if "mul_scale" in layer.tensors else ""
        nbytes = sum(info.nbytes for info in infos)
        stored[f"{name}.weight"] = _Stored(label, layer.shape, nbytes, _layer(layer))
    others = {n: info for n, info in part.expert.tensors.items() if info.name not in used}
    return stored | {name: _plain(info) for name, info in others.items()}


def _plain(info: TensorInfo) -> _Stored:
    """A tensor outside the quantized layers. FP4 elements are compared as bytes."""
    raw = replace(info, dtype="U8", shape=(info.nbytes,)) if info.dtype == "F4" else info

    def rows(reader: RowReader) -> Iterator[Tensor]:
        return (as_tensor(view, raw) for _, view in reader.read_blocks(raw) if len(view))

    return _Stored(dtype_name(info.dtype), raw.shape, info.nbytes, rows)


def _layer(layer: Layer) -> Callable[[RowReader], Iterator[Tensor]]:
    """The effective weight: decoded, times `mul_scale`."""
    import torch

    smoothing = layer.tensors.get("mul_scale")

    def rows(reader: RowReader) -> Iterator[Tensor]:
        factors = None if smoothing is None else reader.read_tensor(smoothing).to(torch.float64)
        for block in layer_rows(layer, reader):
            yield block if factors is None else block.to(torch.float64) * factors

    return rows


def _compare(
    part: str, name: str, x: _Stored | None, y: _Stored | None, one: RowReader, other: RowReader
) -> ValueRow:
    names: dict[str, Any] = {"part": part, "name": name, "a": x and x.label, "b": y and y.label}
    if x is None or y is None:
        return ValueRow(status="only in B" if x is None else "only in A", **names)
    if x.shape != y.shape:
        return ValueRow(status="other shape", **names)
    total = _Totals()
    for left, right in _aligned(x.rows(one), y.rows(other)):
        total.add(left, right)
    status: Status = "different" if total.differing else "equal"
    return ValueRow(status=status, values=math.prod(x.shape), **names, **vars(total))


def _aligned(left: Iterator[Tensor], right: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of blocks with the same rows, from iterators over the same rows in blocks of other heights.

    A block is used up before the next one is read into its buffer.
    """
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        row = max(a[0].numel(), 1)
        count = min(len(a), len(b), max(_CHUNK // row, 1))
        yield a[:count], b[:count]
        a, b = a[count:], b[count:]
        a = a if len(a) else next(left, None)
        b = b if len(b) else next(right, None)


class _Totals:
    """Sums over the blocks of one tensor, in float64; the attributes are fields of `ValueRow`."""

    def __init__(self) -> None:
        self.differing = self.invalid_a = self.invalid_b = 0
        self.signal = self.noise = self.max_difference = 0.0

    def add(self, left: Tensor, right: Tensor) -> None:
        """Compare two blocks of the same shape."""
        import torch

        if left.is_complex():
            left, right = torch.view_as_real(left), torch.view_as_real(right.to(left.dtype))
        x, y = (side.reshape(-1).to(torch.float64) for side in (left, right))
        difference = x - y
        signal, noise = float(x.dot(x)), float(difference.dot(difference))
        if not left.is_floating_point() and left.dtype == right.dtype:  # float64 rounds large integers
            differing = int((left != right).sum())
        elif math.isfinite(signal) and math.isfinite(noise):
            differing = int(difference.count_nonzero())
        else:
            differing = int(((x != y) & ~(x.isnan() & y.isnan())).sum())
            self.invalid_a += int((~x.isfinite()).sum())
            self.invalid_b += int((~y.isfinite()).sum())
            finite = x.isfinite() & y.isfinite()
            x, difference = x[finite], difference[finite]
            signal, noise = float(x.dot(x)), float(difference.dot(difference))
        self.differing += differing
        self.signal += signal
        self.noise += noise
        if differing and difference.numel():
            self.max_difference = max(self.max_difference, float(difference.abs().max()))
