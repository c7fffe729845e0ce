"""TensorInfo: where one tensor is stored, and the dtypes of safetensors. Does not import torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ascendit.checkpoint.sources import FileState

Buffer = bytes | bytearray | memoryview

TORCH_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
    **{f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)},
    **{f"U{bits}": f"uint{bits}" for bits in (64, 32, 16, 8)},
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}
"""safetensors dtype -> torch dtype. F4 stores two elements per byte, so its last axis is halved in torch."""
DTYPE_BITS = {name: 8 if name == "BOOL" else int(re.findall(r"\d+", name)[0]) for name in TORCH_DTYPES}
"""safetensors dtype -> bits per element."""


def common_dtype(sizes: Iterable[tuple[str, int]]) -> str:
    """The torch dtype of most bytes; float32 for float64, in which no operator computes.

    `sizes`: (safetensors dtype, bytes) of each tensor.
    """
    count: Counter[str] = Counter()
    for dtype, nbytes in sizes:
        count[dtype] += nbytes
    name = TORCH_DTYPES[count.most_common(1)[0][0]] if count else "float32"
    return "float32" if name == "float64" else name


@dataclass(frozen=True)
class Encoding:
    """How a file stores a float tensor, if not as numbers of its dtype. `RowReader` decodes it."""

    name: str
    """A key of `mx.stored_floats.DECODERS`."""
    scale: TensorInfo | None = None
    """Factor of the decoded values: one float, or one per row, [N] or [N, 1]."""
    block: int = 1
    """Values that are stored together; a block may extend over several rows."""
    label: str = ""
    """The kind of file, for messages about an invalid scale."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is stored. `start` and `end` are byte offsets in `file`."""

    name: str
    dtype: str
    """safetensors name: `BF16`, `F32`, `F8_E4M3`, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    state: FileState | None = field(default=None, compare=False, repr=False)
    """State of the file when its header was read; None if unknown."""
    encoding: Encoding | None = None
    """Present if the bytes are not numbers of `dtype`, which is then the dtype after reading."""
    strides: tuple[int, ...] | None = None
    """Elements in the file from one index to the next, on each axis; None: contiguous. The encoding of a
    strided tensor, if there is one, is a float dtype.
    """
    container: Literal["safetensors", "gguf", "pickle"] = field(
        default="safetensors", compare=False, repr=False
    )
    """The format of the file, whatever its name is."""

    def __post_init__(self) -> None:
        assert self.strides is None or len(self.strides) == len(self.shape), self

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.start

    @property
    def is_plain(self) -> bool:
        """Whether the bytes in the file are those after reading."""
        return self.encoding is None and self.strides is None

    @property
    def stored_dtype(self) -> str:
        """The dtype in the file; the name of the encoding if there is one."""
        return self.dtype if self.encoding is None else self.encoding.name

    @property
    def read_nbytes(self) -> int:
        """Bytes after reading."""
        if self.is_plain:
            return self.nbytes
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8
