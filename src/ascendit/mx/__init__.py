"""Number formats: encode a tensor into quantized values and scales, and decode it. No files, no devices.

    from ascendit import mx
    encoded = mx.encode(weight, "mxfp8")                         # qdata, scale, format, axis, shape
    decoded = mx.decode(encoded, torch.bfloat16)

Names are imported on first use, so that the tables in `mx.formats` can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ascendit.mx.codec import Encoded, decode, encode, sqnr
    from ascendit.mx.formats import FORMATS, Format

_MODULES = {
    **dict.fromkeys(("FORMATS", "Format"), "ascendit.mx.formats"),
    **dict.fromkeys(("Encoded", "decode", "encode", "sqnr"), "ascendit.mx.codec"),
}

__all__ = ["FORMATS", "Encoded", "Format", "decode", "encode", "sqnr"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ascendit.mx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
