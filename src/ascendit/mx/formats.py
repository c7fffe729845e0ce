"""The number formats as one table: element, block, scale rules, bits per value. Does not import torch.

Sources: OCP Microscaling Formats (MX) v1.0 for the elements, the block of 32 and E8M0; the Ascend operators
npu_dynamic_mx_quant and npu_dynamic_dual_level_mx_quant for the rules `floor`, `ceil`, `max` and the two
levels of `mxfp4_dualscale`; msModelSlim 26.1.0 for the rules `msms:*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ascendit.errors import UsageError

Kind = Literal["block", "dual", "row", "tile"]
"""block: one E8M0 scale per 32 values. dual: the same, on values divided by a float32 scale per 512 values.
row: one float32 scale per row. tile: one float32 scale per 128 x 128 values of a matrix."""

ROUNDINGS = ("rint", "half_away", "floor")
"""rint: to nearest, ties to even (IEEE, OCP; NPU "rint"). half_away: to nearest, ties away from zero (NPU
"round"). floor: towards minus infinity (NPU "floor")."""

CEIL_X_LIMITS = (6.0, 12.0)
"""Smallest and largest number in `max:<m>` (NPU `dst_type_max`) and `msms:ceil_x:<c>`."""
SEARCH = "msms:ceil_x:search"
"""The `msms:ceil_x:<c>` with the least squared error over the whole weight."""


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Element:
    """A small float: 1 sign bit, `ebits` of exponent, `mbits` of mantissa; subnormals. Encoding saturates.

    `max` is the largest value, `emax` its exponent.
    """

    name: str
    ebits: int
    mbits: int
    emax: int
    max: float
    nan: int | None
    """The encoding of NaN; None if there is no NaN."""

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal value, and of the subnormals."""
        return 2 - (1 << (self.ebits - 1))

    @property
    def bits(self) -> int:
        return 1 + self.ebits + self.mbits


E4M3 = Element("e4m3", ebits=4, mbits=3, emax=8, max=448.0, nan=0x7F)
E5M2 = Element("e5m2", ebits=5, mbits=2, emax=15, max=57344.0, nan=0x7F)
E2M1 = Element("e2m1", ebits=2, mbits=1, emax=2, max=6.0, nan=None)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One number format. Names of `rules` that end in `:` take a value, as in `max:7`."""

    name: str
    kind: Kind
    element: Element | None
    """None for int8."""
    qdata_dtype: str
    """Name of the torch dtype of the quantized tensor. Packed FP4: the even index is in the low nibble."""
    rules: tuple[str, ...]
    """Scale rules; the first is the default."""
    block: int = 0
    """Values per scale; 0: one scale per row. For `tile` the side of the tile."""
    coarse: int = 0
    """Values per `dual_scale`; 0 if the format has none."""
    npu_rules: tuple[str, ...] = ("amax",)
    """The scale rules of the NPU's quantizer of activations."""

    @property
    def default_rule(self) -> str:
        return self.rules[0]

    @property
    def largest(self) -> float:
        """The largest number of the element."""
        return self.element.max if self.element else 127.0

    @property
    def tile(self) -> int:
        """Rows and columns of a square with one scale; 0 for the other kinds."""
        return self.block if self.kind == "tile" else 0

    @property
    def scale_dtype(self) -> str:
        """Name of the torch dtype of a scale: uint8 (E8M0) or float32."""
        return "uint8" if self.kind in ("block", "dual") else "float32"

    @property
    def packed(self) -> bool:
        return self.element is not None and self.element.bits == 4

    def shapes(self, shape: Shape, axis: int = -1) -> tuple[Shape, Shape, Shape | None]:
        """Shapes of qdata, scale and dual_scale (or None) of a tensor [.., K, ..] with K at `axis`."""
        axis %= len(shape)
        length = shape[axis]

        def along(size: int) -> Shape:
            return (*shape[:axis], size, *shape[axis + 1 :])

        qdata = along(-(-length // 2)) if self.packed else shape
        dual = (*along(-(-length // self.coarse)), 1) if self.coarse else None
        if self.kind == "tile":
            return qdata, tuple(-(-n // self.block) for n in shape), dual
        return qdata, along(-(-length // self.block) if self.block else 1), dual


_OCP = ("floor", "pow2", "even")

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(
            name="mxfp8",
            kind="block",
            element=E4M3,
            qdata_dtype="float8_e4m3fn",
            npu_rules=("floor", "ceil"),
            block=32,
            rules=("ceil", *_OCP, "msms:minmax", "msms:minmax_bf16", "msms:mse_round"),
        ),
        Format(
            name="mxfp8_e5m2",
            kind="block",
            element=E5M2,
            qdata_dtype="float8_e5m2",
            block=32,
            rules=("ceil", *_OCP),
        ),
        Format(
            name="mxfp4",
            kind="block",
            element=E2M1,
            qdata_dtype="uint8",
            npu_rules=("floor", "max:"),
            block=32,
            rules=(
                "max:7",
                "max:",
                "ceil",
                *_OCP,
                "msms:minmax",
                "msms:minmax_bf16",
                "msms:ceil_x:",
                "msms:fouroversix",
            ),
        ),
        Format(
            name="mxfp4_dualscale",
            kind="dual",
            element=E2M1,
            qdata_dtype="uint8",
            npu_rules=("floor",),
            block=32,
            coarse=512,
            rules=("floor", "msms:dualscale"),
        ),
        Format(
            name="int8",
            kind="row",
            element=None,
            qdata_dtype="int8",
            rules=("amax", "msms:int8", "msms:int8_legacy"),
        ),
        Format(
            name="int8_block",
            kind="tile",
            element=None,
            qdata_dtype="int8",
            block=128,
            rules=("amax",),
        ),
        Format(name="fp8", kind="row", element=E4M3, qdata_dtype="float8_e4m3fn", rules=("amax",)),
        Format(
            name="fp8_128x128",
            kind="tile",
            element=E4M3,
            qdata_dtype="float8_e4m3fn",
            block=128,
            rules=("amax",),
        ),
    )
}


def lookup(name: str) -> Format:
    """Return the format with this name. Raises UsageError (E-USE-01) if it is unknown."""
    if name not in FORMATS:
        raise UsageError(
            f"number format {name!r}",
            needs=f"one of {', '.join(FORMATS)}",
            fix="check the spelling",
        )
    return FORMATS[name]


def resolve_rule(fmt: Format, rule: str | None) -> str:
    """`rule`, or the default of the format for None.

    `max:<m>` and `msms:ceil_x:<c>` take a number from 6 to 12, `msms:ceil_x:` also `search`.
    Raises UsageError (E-USE-01) if the format does not support the rule.
    """
    if rule is None:
        return fmt.default_rule
    if rule in fmt.rules and not rule.endswith(":"):
        return rule
    head, _, value = rule.rpartition(":")
    if f"{head}:" in fmt.rules and (_in_limits(value) or (head == "msms:ceil_x" and value == "search")):
        return rule
    low, high = CEIL_X_LIMITS
    fix = f"omit --scale-rule for {fmt.default_rule}, the default"
    if any(r.endswith(":") for r in fmt.rules):
        fix += f"; numbers are from {low:g} to {high:g}, as in max:7; msms:ceil_x:search finds the best one"
    raise UsageError(
        f"scale rule {rule!r} for {fmt.name}",
        needs="one of " + ", ".join(f"{r}<number>" if r.endswith(":") else r for r in fmt.rules),
        fix=fix,
    )


def _in_limits(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return CEIL_X_LIMITS[0] <= value <= CEIL_X_LIMITS[1]


def resolve_rounding(fmt: Format, rule: str, rounding: str | None) -> str:
    """`rounding`, or the default for None: `rint`, or the fixed rounding of msModelSlim's rules.

    Raises UsageError (E-USE-01) if the format or the rule does not support it.
    """
    fixed = None
    if rule.startswith("msms:"):
        fixed = "rint" if fmt.kind == "row" else "half_away"
    allowed = (fixed,) if fixed else ROUNDINGS
    chosen = rounding or fixed or "rint"
    if chosen not in allowed:
        raise UsageError(
            f"rounding {rounding!r} for {fmt.name} with scale rule {rule!r}",
            needs=f"one of {', '.join(allowed)}",
            fix="omit rounding",
        )
    return chosen
