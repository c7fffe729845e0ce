"""What npu_quant_matmul takes: its arguments, which mode they mean, and what each mode refuses.

Texts are those of torch_npu's adapter and Meta kernel. On a card the eager adapter runs few of these checks:
a call without group_sizes or scale_dtype reaches CANN, which fails or takes another mode; a contiguous scale
is misread. The twin makes all the checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.twin import contract, nz
from ascendit.twin.contract import refuse, require

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = (torch.bfloat16, torch.float16, torch.float32)

Shape = tuple[int, ...]
Checked = tuple[Shape, torch.dtype]


@dataclass(frozen=True, eq=False)
class QuantMatmulCall:
    """The arguments, as in the schema."""

    x1: Tensor
    x2: Tensor
    scale: Tensor
    offset: Tensor | None
    pertoken_scale: Tensor | None
    bias: Tensor | None
    output_dtype: int | None
    x1_dtype: int | None
    x2_dtype: int | None
    pertoken_scale_dtype: int | None
    scale_dtype: int | None
    group_sizes: list[int] | None
    y_scale: Tensor | None

    def with_scale(self, scale: Tensor) -> QuantMatmulCall:
        return dataclasses.replace(self, scale=scale)


# ---- modes --------------------------------------------------------------------------------------


def mode_of(c: QuantMatmulCall) -> str:
    """int8, static, fp8, mxfp8, mxfp4, w4a8 or block. Refuses other pairs of dtypes."""
    fp4 = contract.FP4_E2M1
    for name, dtype in (("x1", c.x1_dtype), ("x2", c.x2_dtype)):
        tensor: Tensor = getattr(c, name)
        if dtype is not None and (dtype != fp4 or tensor.dtype in (*FP8, *WIDE)):
            refuse("matmul.dtype_of_native", name=name, dtype=dtype, tensor=tensor)
        require(dtype is None or tensor.element_size() == 1, "matmul.dtype_of_wide", name=name, tensor=tensor)
    if c.x1_dtype == fp4 and c.x2_dtype == fp4:
        return "mxfp4"
    if c.x1.dtype == torch.float8_e4m3fn and c.x2_dtype == fp4:
        return "w4a8"
    if c.x1.dtype == c.x2.dtype == torch.int8 and c.x1_dtype is c.x2_dtype is None:
        return "int8" if c.pertoken_scale is not None else "static"
    if c.x1.dtype in FP8 and c.x2.dtype in FP8 and c.x2_dtype is None:
        return _fp8_mode(c)
    packed = [
        n for n, d in (("x1", c.x1_dtype), ("x2", c.x2_dtype)) if getattr(c, n).dtype == torch.uint8 and not d
    ]
    advice = f"pass {packed[0]}_dtype=torch_npu.float4_e2m1fn_x2" if packed else "quantize both sides alike"
    refuse("matmul.dtypes", c=c, advice=advice)


def _fp8_mode(c: QuantMatmulCall) -> str:
    groups = list(c.group_sizes or [])
    if groups[-1:] == [128]:
        return "block"
    byte_scales = c.scale.element_size() == 1 or c.scale_dtype is not None or groups
    return "mxfp8" if byte_scales else "fp8"


def is_transposed(t: Tensor) -> bool:
    """A view whose last two axes are exchanged, as the adapter tells: strides (1, rows)."""
    if t.dim() < 2 or t.shape[-1] == t.shape[-2] == 1:
        return False
    return t.stride(-2) == 1 and t.stride(-1) == t.shape[-2]


# ---- int8, fp8 and 128 x 128 blocks -------------------------------------------------------------


def check_int8(c: QuantMatmulCall) -> Checked:
    n = c.x2.shape[-1]
    check_matrices(c, *k_of_both(c), fix="x2 = weight.t() for a weight [N, K]")
    check_no_groups(c)
    check_no_offset(c)
    out = contract.output_dtype(c.output_dtype, WIDE[:2], "int8 with a scale per token")
    require(c.scale.dtype != torch.bfloat16 or out == torch.bfloat16, "matmul.bf16_scale", c=c)
    allowed = (torch.float32, torch.bfloat16) if out == torch.bfloat16 else (torch.float32,)
    check_scale_per_channel(c, n, allowed)
    check_bias(c, n, (torch.int32, out, torch.float32), fix="bias in float32, or in the dtype of the output")
    return (*c.x1.shape[:-1], n), out


def check_static(c: QuantMatmulCall) -> Checked:
    n = c.x2.shape[-1]
    check_matrices(c, *k_of_both(c), fix="x2 = weight.t() for a weight [N, K]")
    check_no_groups(c)
    allowed = (torch.int8, torch.int32, torch.float16, torch.bfloat16)
    out = contract.output_dtype(1 if c.output_dtype is None else c.output_dtype, allowed, "static int8")
    wide = (
        (torch.float32, torch.bfloat16)
        if out in (torch.bfloat16, torch.int32)
        else (torch.int64, torch.float32)
    )
    check_scale_per_channel(c, n, wide)
    floats = (torch.bfloat16, torch.float32) if out == torch.bfloat16 else ()
    check_bias(c, n, (torch.int32, *floats), fix="quant_bias in int32")
    require(c.offset is None or (out == torch.int8 and c.offset.dim() == 1), "matmul.static_offset")
    return (*c.x1.shape[:-1], n), out


def check_fp8(c: QuantMatmulCall) -> Checked:
    n = c.x2.shape[-1]
    check_matrices(c, *k_of_both(c), fix="x2 = weight.t() for a weight [N, K]")
    require(c.pertoken_scale is not None, "matmul.fp8_scale")
    check_no_groups(c)
    check_no_offset(c)
    check_scale_per_channel(c, n, (torch.float32,))
    out = contract.output_dtype(c.output_dtype, WIDE, "FP8")
    check_bias(c, n, (torch.float32,), fix="bias.float(), once, when the weight is loaded")
    return (*c.x1.shape[:-1], n), out


def check_block(c: QuantMatmulCall) -> Checked:
    n, (k1, k2) = c.x2.shape[-1], k_of_both(c)
    check_matrices(c, k1, k2, fix="x2 = weight.t() for a weight [N, K]")
    groups = list(c.group_sizes or [])
    require(
        groups in ([1, 128, 128], [128, 128, 128]) and c.x1.dim() == 2,
        "matmul.block_groups",
        groups=groups,
        c=c,
    )
    check_no_offset(c)
    rows, wide, high = -(-c.x1.shape[0] // groups[0]), -(-k1 // 128), -(-n // 128)
    given = None if c.pertoken_scale is None else tuple(c.pertoken_scale.shape)
    require(
        given == (rows, wide) and tuple(c.scale.shape) == (wide, high),
        "matmul.block_scales",
        c=c,
        given=given,
        rows=rows,
        wide=wide,
        high=high,
    )
    check_transposes(c, is_transposed(c.scale))
    out = contract.output_dtype(c.output_dtype, WIDE, "128 x 128 blocks")
    require(c.bias is None, "matmul.block_bias")
    return (*c.x1.shape[:-1], n), out


# ---- MXFP8, MXFP4 and W4A8 ----------------------------------------------------------------------

_EXAMPLE = (
    "npu_quant_matmul(q, w.transpose(0, 1), ws.transpose(0, 1), pertoken_scale=s, bias=bias_fp32, "
    "scale_dtype=293, pertoken_scale_dtype=293, output_dtype=x.dtype, group_sizes=[1, 1, 32])"
)


def check_mx(c: QuantMatmulCall, mode: str) -> Checked:
    """MXFP8, MXFP4 and W4A8."""
    w4a8 = mode == "w4a8"
    _scale_dtypes(c)
    transposed = is_transposed(c.x2)
    n, k1, k2 = _mx_sizes(c, mode, transposed)
    check_matrices(c, k1, k2, fix="x2 = weight.transpose(0, 1) for a weight [N, K] or packed [N, K / 2]")
    if w4a8:
        require(c.x1.dim() == 2 and transposed and k1 % 8 == 0, "matmul.w4a8_shapes", c=c)
    _groups(c, [[0, 0, 32], [1, 1, 32]] if w4a8 else [[1, 1, 32]], mode)
    _mx_scales(c, n, k1, transposed)
    check_no_offset(c)
    if nz.fractal(c.x2) is not None:
        _nz_weight(c, mode, n, k1)
    out = contract.output_dtype(c.output_dtype, WIDE[:2] if w4a8 else WIDE, mode)
    if w4a8:
        _w4a8_bias(c, n, out)
    else:
        check_bias(c, n, (torch.float32,), fix="bias.float(), once, when the weight is loaded")
    return (*c.x1.shape[:-1], n), out


def _mx_sizes(c: QuantMatmulCall, mode: str, transposed: bool) -> tuple[int, int, int]:
    """N, K of x1, K of x2, with packed FP4 counted in numbers."""
    rows, columns = c.x2.shape[-2:]
    if mode == "mxfp8":
        return columns, c.x1.shape[-1], rows
    k1 = c.x1.shape[-1] * (1 if mode == "w4a8" else 2)
    n, k2 = (columns, rows * 2) if transposed else (columns * 2, rows)
    require(k1 > 2 and n > 1, "matmul.fp4_sizes", k1=k1, n=n)
    return n, k1, k2


def _scale_dtypes(c: QuantMatmulCall) -> None:
    """E8M0 scales are uint8, so the call must say what they are."""
    require(c.pertoken_scale is not None, "matmul.mx_pertoken", _EXAMPLE=_EXAMPLE)
    assert c.pertoken_scale is not None
    for name, dtype, tensor in (
        ("scale", c.scale_dtype, c.scale),
        ("pertoken_scale", c.pertoken_scale_dtype, c.pertoken_scale),
    ):
        require(dtype is not None, "matmul.mx_scale_dtype_missing", c=c, name=name, _EXAMPLE=_EXAMPLE)
        require(dtype == contract.SCALE_E8M0, "matmul.mx_scale_dtype", name=name, dtype=dtype)
        require(tensor.element_size() == 1, "matmul.mx_scale_bytes", name=name, tensor=tensor)


def _groups(c: QuantMatmulCall, allowed: list[list[int]], mode: str) -> None:
    groups = c.group_sizes
    if groups is None:
        got = "the pertoken_scale dim num must be 1, please check scale dim num (group_sizes is missing)"
    elif len(groups) != 3:
        got = "group_sizes's length must be 3, please check group_sizes's length"
    elif groups[2] not in (32, 128):
        got = (
            "When group_sizes[2] > 1, group_sizes[2] must be equal to 32 or 128, but group_sizes[2] is "
            f"{groups[2]}"
        )
    elif mode == "w4a8":
        got = (
            "when the dtype of input is A8W4, group_sizes's value must be [0,0,32] or [1,1,32], "
            "please check group_sizes's value"
        )
    else:
        got = f"group_sizes={list(groups)} for {mode}"
    require(
        groups is not None and list(groups) in allowed,
        "matmul.groups",
        got=got,
        allowed=allowed,
        last=allowed[-1],
    )


def _mx_scales(c: QuantMatmulCall, n: int, k: int, transposed: bool) -> None:
    assert c.pertoken_scale is not None
    pairs = -(-k // 64)
    wanted1, wanted2 = (*c.x1.shape[:-1], pairs, 2), (pairs, n, 2)
    given1, given2 = tuple(c.pertoken_scale.shape), tuple(c.scale.shape)
    if len(given1) >= 2 and len(given2) == 3 and given1[-2] != given2[0]:
        refuse("matmul.mx_blocks", given2=given2, given1=given1, wanted1=wanted1, wanted2=wanted2)
    require(
        given1 == wanted1 and given2 == wanted2,
        "matmul.mx_scales",
        given1=given1,
        given2=given2,
        wanted1=wanted1,
        wanted2=wanted2,
    )
    view = c.scale.stride() == (2, 2 * pairs, 1)
    check_transposes(c, view or 1 in (n, pairs), plain=c.scale.is_contiguous() and not transposed)


def _w4a8_bias(c: QuantMatmulCall, n: int, out: torch.dtype) -> None:
    if c.bias is None:
        return
    require(c.bias.dim() == 2, "matmul.w4a8_bias_axes", n=n)
    require(tuple(c.bias.shape) == (1, n) and c.bias.dtype == out, "matmul.w4a8_bias", c=c, n=n, out=out)


def _nz_weight(c: QuantMatmulCall, mode: str, n: int, k: int) -> None:
    tag = nz.fractal(c.x2)
    assert tag is not None
    if mode == "mxfp8":
        require(c.x2.dtype == torch.float8_e4m3fn, "matmul.nz_e5m2", c=c)
        return
    require(tag.customized, "matmul.nz_fp4")
    require(mode != "w4a8" or (k % 8 == 0 and n % 8 == 0), "matmul.nz_w4a8", k=k, n=n)


# ---- checks that modes share --------------------------------------------------------------------


def check_matrices(c: QuantMatmulCall, k1: int, k2: int, fix: str) -> None:
    require(k1 == k2, "matmul.k", k1=k1, k2=k2, fix=fix)
    require(2 <= c.x1.dim() <= 6, "matmul.x1_axes")
    require(c.x2.dim() == 2, "matmul.x2_axes", c=c)
    require(not is_transposed(c.x1) or c.x1.is_contiguous(), "matmul.x1_transposed")
    require(c.y_scale is None, "matmul.y_scale")


def check_transposes(c: QuantMatmulCall, scale_transposed: bool, plain: bool = False) -> None:
    require(scale_transposed == is_transposed(c.x2) or plain, "matmul.transposes")


def check_no_offset(c: QuantMatmulCall) -> None:
    require(c.offset is None, "matmul.offset")


def check_no_groups(c: QuantMatmulCall) -> None:
    require(not c.group_sizes or not any(c.group_sizes), "matmul.no_groups", c=c)


def check_bias(c: QuantMatmulCall, n: int, allowed: tuple[torch.dtype, ...], fix: str) -> None:
    if c.bias is None:
        return
    require(c.bias.dtype in allowed, "matmul.bias_dtype", c=c, allowed=allowed, fix=fix)
    if c.bias.dim() == 3:
        require(c.x1.dim() == 3 and tuple(c.bias.shape) == (c.x1.shape[0], 1, n), "matmul.bias_batch", n=n)
    else:
        require(tuple(c.bias.shape) == (n,), "matmul.bias_shape", c=c, n=n)


def check_scale_per_channel(c: QuantMatmulCall, n: int, allowed: tuple[torch.dtype, ...]) -> None:
    """1-D scales: [N] or [1] of x2, [M] of x1."""
    require(c.scale.dim() == 1, "matmul.scale_axes", n=n)
    require(c.scale.shape[0] in (1, n), "matmul.scale_length", c=c, n=n)
    require(c.scale.dtype in allowed, "matmul.scale_dtype", c=c, allowed=allowed)
    if c.pertoken_scale is not None:
        check_scale_per_token(c)


def check_scale_per_token(c: QuantMatmulCall) -> None:
    assert c.pertoken_scale is not None
    require(c.pertoken_scale.dim() == 1 and c.x1.dim() == 2, "matmul.pertoken_axes")
    require(
        tuple(c.pertoken_scale.shape) == (c.x1.shape[0],) and c.pertoken_scale.dtype == torch.float32,
        "matmul.pertoken",
        c=c,
    )


def k_of_both(c: QuantMatmulCall) -> tuple[int, int]:
    return c.x1.shape[-1], c.x2.shape[-2]


# ---- all modes ----------------------------------------------------------------------------------

MODE_CHECKS: dict[str, Callable[[QuantMatmulCall], Checked]] = {
    "int8": check_int8,
    "static": check_static,
    "fp8": check_fp8,
    "block": check_block,
    "mxfp8": lambda c: check_mx(c, "mxfp8"),
    "mxfp4": lambda c: check_mx(c, "mxfp4"),
    "w4a8": lambda c: check_mx(c, "w4a8"),
}
