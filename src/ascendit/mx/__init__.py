"""Numbers: how a tensor becomes codes and scales, and comes back. Pure tensor functions, no files, no device.

    from ascendit import mx
    encoded = mx.encode(weight, "mxfp8")                         # codes, scale, format, axis, shape
    again = mx.decode(encoded, torch.bfloat16)

Each name is fetched when it is first used, so that the tables in `mx.formats` can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ascendit.mx.codec import Encoded, decode, encode, sqnr
    from ascendit.mx.formats import FORMATS, Format

_WHERE = {
    **dict.fromkeys(("FORMATS", "Format"), "ascendit.mx.formats"),
    **dict.fromkeys(("Encoded", "decode", "encode", "sqnr"), "ascendit.mx.codec"),
}

__all__ = ["FORMATS", "Encoded", "Format", "decode", "encode", "sqnr"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ascendit.mx' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
