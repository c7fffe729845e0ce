"""Times of the attention kernels on this machine, which the automatic choice reads. Does not import torch.

`ascendit bench attention` writes a file per kind of device and hardware into the cache folder of this user.
`fastest` reads it. Times of other hardware or other versions of the libraries say nothing about this machine:
such a file is ignored, with a warning, until the benchmark runs again.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ascendit import environment
from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.device.attention_limits import AttentionCall
from ascendit.device.device import Device
from ascendit.errors import EnvironmentProblem
from ascendit.version import __version__, installed

log = logging.getLogger("ascendit")

FORMAT = 1
"""Version of the file; increases if the meaning of a key changes."""
FOLDER = Path("ascendit/attention")
"""In the folder of `environment.cache_home`."""
LIBRARIES = ("torch", "torch_npu", "triton", "flash-attn", "mindiesd")
"""The packages whose versions change the times."""
FARTHEST = 8.0
"""A measurement is used for up to this many times more or fewer tokens, keys or heads."""
LARGEST = 1e15
"""Above every size and time of a file; larger ones would overflow in the choice."""
ERROR_LIMIT = 1e-2
"""Largest relative error of a kernel that the automatic choice takes; rounding to bfloat16 causes 3e-3."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one attention: queries [1, queries, heads, head_dim], keys and values [1, keys, ..]."""

    kind: Literal["self", "cross"]
    queries: int
    keys: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> int:
        """Multiplications and additions of both matrix products."""
        return 4 * self.queries * self.keys * self.heads * self.head_dim

    def __str__(self) -> str:
        return f"{self.queries:,} x {self.keys:,}, {self.heads} heads of {self.head_dim}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One kernel at one shape."""

    kernel: str
    """`Kernel.name`."""
    scheme: str = ""
    """The scheme of quantized attention; empty for a dense kernel."""
    shape: Shape
    dtype: str
    seconds: float
    """Median of one call; if fewer heads were measured, scaled to all of `shape`."""
    best_seconds: float
    """The fastest call, which decides: other programs delay some calls, often more than kernels differ."""
    repeats: int
    measured_heads: int
    error: float
    """norm(output - reference) / norm(reference) of sampled queries."""

    def __post_init__(self) -> None:
        kind, *sizes = asdict(self.shape).values()
        numbers = (self.seconds, self.best_seconds, self.error, *sizes)
        if not all(isinstance(text, str) for text in (self.kernel, self.scheme, self.dtype, kind)):
            raise ValueError(f"{self.kernel}: a name that is not a text")
        if not all(isinstance(n, int | float) and abs(n) < LARGEST for n in numbers):
            raise ValueError(f"{self.kernel}: a value that is not a number below {LARGEST:g}")
        if min(numbers[:2]) <= 0 or min(numbers[3:]) < 1 or self.error < 0:
            raise ValueError(f"{self.kernel}: a value below its minimum")

    @property
    def tflops(self) -> float:
        """TFLOP/s of the median."""
        return self.shape.flops / self.seconds / 1e12

    @property
    def peak_tflops(self) -> float:
        """TFLOP/s of the fastest call."""
        return self.shape.flops / self.best_seconds / 1e12

    def as_dict(self) -> dict[str, Any]:
        """One row of the file, without nested records."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "shape"}
        return row | asdict(self.shape) | {"tflops": self.tflops, "peak_tflops": self.peak_tflops}


def from_row(row: Mapping[str, Any]) -> Measurement:
    """The inverse of `Measurement.as_dict`. Raises KeyError, TypeError or ValueError for an invalid row."""
    shape = Shape(**{f.name: row[f.name] for f in fields(Shape)})
    others = [f.name for f in fields(Measurement) if f.name != "shape"]
    return Measurement(shape=shape, **{name: row[name] for name in others})


# ---- the file -----------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The versions on which times depend."""
    return {"ascendit": __version__, **installed(*LIBRARIES)}


def cached_file(hardware: str) -> Path:
    """The file of this hardware that `fastest` reads.

    Raises EnvironmentProblem (E-ENV-02) if this user has no home folder.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", hardware).strip("-").lower()
    try:
        return environment.cache_home() / FOLDER / f"{name}.json"
    except RuntimeError as e:
        raise EnvironmentProblem(
            f"~/.cache: {e}",
            needs="a folder for measurements",
            fix="export XDG_CACHE_HOME=/a/folder/of/your/own",
            code="E-ENV-02",
        ) from e


def file_data(hardware: str, rows: Iterable[Measurement]) -> dict[str, Any]:
    """The content of a file for these rows."""
    return {
        "format": FORMAT,
        "hardware": hardware,
        "versions": versions(),
        "rows": [row.as_dict() for row in rows],
    }


def merged(old: Iterable[Measurement], new: Collection[Measurement]) -> list[Measurement]:
    """The rows of `new`, and those of `old` at other shapes or dtypes."""
    replaced = {(row.shape, row.dtype) for row in new}
    return [*(row for row in old if (row.shape, row.dtype) not in replaced), *new]


def read_measurements(file: Path, hardware: str) -> tuple[Measurement, ...]:
    """The rows of a file; empty if it is absent, or cannot be used, which is logged once."""
    try:
        status = file.stat()
    except OSError:
        return ()
    return _read(file, status.st_mtime_ns, status.st_size, hardware)


@functools.lru_cache(maxsize=8)
def _read(file: Path, changed: int, size: int, hardware: str) -> tuple[Measurement, ...]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        problem = _mismatch(data, hardware)
        rows = () if problem else tuple(from_row(row) for row in data["rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        rows, problem = (), f"damaged ({type(e).__name__}: {e})"
    if problem:
        log.warning("%s: %s; attention is chosen without it until ascendit bench attention", file, problem)
    return rows


def _mismatch(data: Mapping[str, Any], hardware: str) -> str:
    """Why the times of a file do not apply to this machine; "" if they do."""
    if data["format"] != FORMAT:
        return f"written by another version of ascendit (format {data['format']})"
    if data["hardware"] != hardware:
        return f"measured on {data['hardware']}, this is {hardware}"
    then, current = data["versions"], versions()
    changed = [n for n in sorted({*then, *current}) if then.get(n) != current.get(n)]
    differences = (f"{n} {then.get(n, 'absent')}, here {current.get(n, 'absent')}" for n in changed)
    return f"measured with {'; '.join(differences)}" if changed else ""


# ---- the choice ---------------------------------------------------------------------------------


def fastest(
    device: Device, call: AttentionCall, usable: Callable[[str], bool], *, hardware: str
) -> tuple[str, str] | None:
    """The fastest measured kernel for `call`, with the reason for the log; None without measurements.

    `usable`: whether a kernel can compute `call`; those on request are never chosen. `hardware`: from
    `ops.open_device.hardware_name`. The nearest measured shape of this head size and dtype decides. A twin
    has no measurements, nor has a user without a home folder.
    """
    if device.is_emulated:
        return None
    try:
        file = cached_file(hardware)
    except EnvironmentProblem:
        return None
    wanted = Shape(
        kind="self" if call.kind == "self" else "cross",
        queries=call.queries,
        keys=call.key_length or call.keys,
        heads=call.heads,
        head_dim=call.head_dim,
    )
    rows = [
        row
        for row in read_measurements(file, hardware)
        if (row.shape.kind, row.shape.head_dim, row.dtype) == (wanted.kind, call.head_dim, call.dtype)
        if _is_automatic(row) and _distance(row.shape, wanted)[0] <= FARTHEST
    ]
    nearest = min((row.shape for row in rows), key=lambda shape: _distance(shape, wanted), default=None)
    measured = sorted((row for row in rows if row.shape == nearest), key=lambda row: row.best_seconds)
    if len(measured) < 2:  # nothing to compare
        return None
    times = ", ".join(f"{row.kernel} {row.best_seconds * 1e3:.4g} ms" for row in measured)
    reason = f"fastest in ascendit bench attention at {nearest}: {times}"
    return next(((row.kernel, reason) for row in measured if usable(row.kernel)), None)


def _is_automatic(row: Measurement) -> bool:
    """Whether the automatic choice may take this kernel."""
    kernel = ATTENTION_KERNELS.get(row.kernel)
    return bool(kernel and not kernel.on_request and not row.scheme and row.error <= ERROR_LIMIT)


def _distance(a: Shape, b: Shape) -> tuple[float, float]:
    """The largest ratio between sizes of two shapes, and the product of all."""
    pairs = ((a.queries, b.queries), (a.keys, b.keys), (a.heads, b.heads))
    ratios = [max(x, y) / max(min(x, y), 1) for x, y in pairs]
    return max(ratios), math.prod(ratios)
