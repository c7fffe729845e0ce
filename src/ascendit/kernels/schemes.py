"""The schemes that a quantized linear layer computes in, as one table.

| scheme          | activation               | weight          | bias    |
|-----------------|--------------------------|-----------------|---------|
| int8            | int8, one scale a token  | int8            | float32 |
| fp8             | e4m3, one scale a token  | fp8             | float32 |
| mxfp8           | mxfp8, rule ceil         | mxfp8           | float32 |
| mxfp4           | mxfp4, rule floor        | mxfp4           | float32 |
| mxfp4_dualscale | mxfp4_dualscale          | mxfp4_dualscale | float32 |
| w4a8            | mxfp8, rule ceil         | mxfp4           | float32 |

W4A8 is a scheme of a denoising step, not of a weight: an activation quantized for `w4a8` multiplies a weight
that was prepared for `mxfp4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ascendit.errors import UsageError


@dataclass(frozen=True)
class LinearScheme:
    """How a linear layer computes. `rule`: the default scale rule of the activation."""

    name: str
    activation: str
    weight: str
    rule: str


SCHEMES: Mapping[str, LinearScheme] = {
    s.name: s
    for s in (
        LinearScheme("int8", "int8", "int8", "amax"),
        LinearScheme("fp8", "fp8", "fp8", "amax"),
        LinearScheme("mxfp8", "mxfp8", "mxfp8", "ceil"),
        LinearScheme("mxfp4", "mxfp4", "mxfp4", "floor"),
        LinearScheme("mxfp4_dualscale", "mxfp4_dualscale", "mxfp4_dualscale", "floor"),
        LinearScheme("w4a8", "mxfp8", "mxfp4", "ceil"),
    )
}


def scheme_of(name: str) -> LinearScheme:
    """The row of this name. UsageError E-USE-01 lists the names if there is none."""
    if name not in SCHEMES:
        raise UsageError(
            f"scheme {name!r} for a linear layer on codes",
            needs=", ".join(SCHEMES),
            fix="check the spelling; bf16 layers are no codes",
            code="E-USE-01",
        )
    return SCHEMES[name]
