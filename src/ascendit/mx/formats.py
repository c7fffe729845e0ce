"""The number formats as one table: element, block, scale rules, bits per value. No torch here.

Sources: OCP Microscaling Formats (MX) v1.0 for the elements, the block of 32 and E8M0; the Ascend operators
npu_dynamic_mx_quant and npu_dynamic_dual_level_mx_quant for the rules `floor`, `ceil`, `max` and for the two
levels of `mxfp4_dualscale`; msModelSlim 26.1.0 for the rules `msms:*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ascendit.errors import UsageError

Kind = Literal["block", "dual", "row", "tile"]
"""block: one E8M0 scale per 32 values. dual: the same on values already divided by one float32 per 512.
row: one float32 per row. tile: one float32 per 128 x 128 square, only decoded."""

ROUNDINGS = ("rint", "half_away", "floor")
"""rint: to the nearest, ties to the even code (IEEE, OCP; NPU "rint"). half_away: ties away from zero (NPU
"round"). floor: towards minus infinity (NPU "floor")."""

CEIL_X_LIMITS = (6.0, 12.0)
"""Both for `max:<m>` (NPU `dst_type_max`) and for `msms:ceil_x:<c>`."""
SEARCH = "msms:ceil_x:search"
"""The `msms:ceil_x:<c>` that errs least on the whole weight."""


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Element:
    """A small float: 1 sign bit, `ebits` of exponent, `mbits` of mantissa; subnormals, no way to overflow.

    `emax` is the exponent of the largest number, `max` that number. Encoding saturates at `max`.
    """

    name: str
    ebits: int
    mbits: int
    emax: int
    max: float
    nan: int | None
    """The code that stands for NaN, None where the format has none."""

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number, which is also that of the subnormals."""
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
    """Name of the torch dtype of the codes. In a uint8 the even 4-bit code is in the low nibble."""
    rules: tuple[str, ...]
    """The first is the default."""
    block: int = 0
    """Values that share one scale; 0: a whole row. For `tile` the side of the square."""
    coarse: int = 0
    """Values that share one `dual_scale`; 0: there is none."""

    @property
    def default_rule(self) -> str:
        return self.rules[0]

    @property
    def packed(self) -> bool:
        return self.element is not None and self.element.bits == 4

    def shapes(self, shape: Shape, axis: int = -1) -> tuple[Shape, Shape, Shape | None]:
        """Of codes, scale and dual_scale of a tensor [.., K, ..] with K at `axis`; no dual_scale: None."""
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
    """The row of this name. UsageError E-USE-01 lists the names if there is none."""
    if name not in FORMATS:
        raise UsageError(
            f"number format {name!r}",
            needs=f"one of {', '.join(FORMATS)}",
            fix="check the spelling",
        )
    return FORMATS[name]


def resolve_rule(form: Format, rule: str | None) -> str:
    """The rule to use: the format's default for None, else `rule` if this format has it.

    `max:<m>` and `msms:ceil_x:<c>` take a number from 6 to 12, `msms:ceil_x:` also the word `search`.
    UsageError E-USE-01 otherwise.
    """
    if rule is None:
        return form.default_rule
    if rule in form.rules and not rule.endswith(":"):
        return rule
    head, _, value = rule.rpartition(":")
    if f"{head}:" in form.rules and (_in_limits(value) or (head == "msms:ceil_x" and value == "search")):
        return rule
    low, high = CEIL_X_LIMITS
    raise UsageError(
        f"scale rule {rule!r} for {form.name}",
        needs="one of " + ", ".join(f"{r}<number>" if r.endswith(":") else r for r in form.rules),
        fix=f"a number is {low:g} to {high:g}, as in max:7; msms:ceil_x:search looks for it",
    )


def _in_limits(text: str) -> bool:
    try:
        value = float(text)
    except ValueError:
        return False
    return CEIL_X_LIMITS[0] <= value <= CEIL_X_LIMITS[1]


def resolve_rounding(form: Format, rule: str, rounding: str | None) -> str:
    """The rounding to use: `rint` for None. msModelSlim's rules fix their own and take only that.

    UsageError E-USE-01 otherwise.
    """
    fixed = None
    if rule.startswith("msms:"):
        fixed = "rint" if form.kind == "row" else "half_away"
    allowed = (fixed,) if fixed else ROUNDINGS
    chosen = rounding or fixed or "rint"
    if chosen not in allowed:
        raise UsageError(
            f"rounding {rounding!r} for {form.name} with scale rule {rule!r}",
            needs=f"one of {', '.join(allowed)}",
            fix="leave rounding out",
        )
    return chosen
