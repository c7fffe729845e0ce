"""Checks of scales by their bytes, for whoever streams them. Neither torch nor numpy is needed.

The headers say that a scale has the right shape; only its bytes say whether it is one. Each check takes
the bytes of a tensor or of some rows of it, little-endian as on disk.
"""

from __future__ import annotations

import re
from typing import Literal

from ascendit.errors import CheckpointError

Buffer = bytes | bytearray | memoryview

_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}
"""Bits of +inf. Positive finite numbers are the patterns 1 to this - 1, read as unsigned."""
_UNSIGNED: dict[str, Literal["H", "I", "Q"]] = {"BF16": "H", "F16": "H", "F32": "I", "F64": "Q"}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_NAN_SCALE = re.compile(rb"\xff")
_NOT_ZERO = re.compile(rb"[^\x00]")


def check_scale_bytes(data: Buffer, name: str) -> None:
    """E8M0 scales: no byte may be 255, which is NaN. Raises CheckpointError E-CKP-08."""
    if found := _NAN_SCALE.search(data):
        count = bytes(data).count(255)
        raise _invalid(
            f"{name} has {count} scales of NaN (byte 255), the first at byte {found.start()}",
            "E8M0 bytes 0 to 254: 2^(byte - 127)",
        )


def check_zero(data: Buffer, dtype: str, name: str) -> None:
    """Offsets of a symmetric format: every one 0, or -0. `dtype` in safetensors' spelling.

    Raises CheckpointError E-CKP-08.
    """
    if not _NOT_ZERO.search(data):
        return
    raw = bytearray(data)
    if (size := _BYTES.get(dtype)) is not None:
        signs = raw[size - 1 :: size]
        raw[size - 1 :: size] = signs.replace(b"\x80", b"\x00")
    if found := _NOT_ZERO.search(raw):
        place = found.start() // _BYTES.get(dtype, 1)
        raise _invalid(
            f"{name} is not zero (element {place})",
            "symmetric quantization: offsets of 0; ascendit has no asymmetric int8",
        )


def check_positive(data: Buffer, dtype: str, name: str) -> None:
    """Floating-point scales: every one finite and above 0. `dtype`: BF16, F16, F32 or F64.

    Raises CheckpointError E-CKP-08.
    """
    values = memoryview(data).cast("B").cast(_UNSIGNED[dtype])
    if not values or 0 < min(values) and max(values) < _INFINITY[dtype]:
        return
    bad = [place for place, bits in enumerate(values) if not 0 < bits < _INFINITY[dtype]]
    raise _invalid(
        f"{name} has {len(bad)} values that are zero, negative or not finite, the first at element {bad[0]}",
        "finite scales above 0",
    )


def check_scale(data: Buffer, dtype: str, name: str) -> None:
    """Floating-point scales of rows, groups or tiles: finite, and 0 at least, for a row of zeros.

    `dtype`: BF16, F16, F32 or F64. Raises CheckpointError E-CKP-08.
    """
    limit, minus_zero = _INFINITY[dtype], 1 << (8 * _BYTES[dtype] - 1)
    values = memoryview(data).cast("B").cast(_UNSIGNED[dtype])
    if not values or max(values) < limit:
        return
    bad = [place for place, bits in enumerate(values) if bits >= limit and bits != minus_zero]
    if bad:
        raise _invalid(
            f"{name} has {len(bad)} scales that are negative or not finite, the first at element {bad[0]}",
            "finite scales; msModelSlim writes NaN for 512 zeros in a row, which no engine can run",
        )


def _invalid(got: str, needs: str) -> CheckpointError:
    return CheckpointError(
        got,
        needs=needs,
        fix="download or export the model again; if the source is like this, its quantization went wrong",
        code="E-CKP-08",
    )
