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
            refuse(
                f"Pass {name}_dtype only when {name} is not a native PyTorch dtype (e.g. "
                "torch_npu.float4_e2m1fn_x2, torch_npu.hifloat8, torch_npu.float4_e1m2fn_x2); "
                f"otherwise omit it. Invalid {name}_dtype: {contract.spell_dtype(dtype)}",
                needs=f"{name}_dtype=296 for packed FP4 bytes, none for {tensor.dtype}",
                fix=f"leave {name}_dtype out",
            )
        require(
            dtype is None or tensor.element_size() == 1,
            f"When {name}_dtype is not None, {name} must be a 1 byte tensor, but the byte size of {name} is"
            f"{tensor.element_size()}",
            needs="packed FP4 as uint8 or int8",
            fix=f"view {name} as torch.uint8",
        )
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
    refuse(
        f"x1 of {c.x1.dtype} with x2 of {c.x2.dtype}",
        needs="int8 x int8, FP8 x FP8, FP4 x FP4 or e4m3 x FP4; FP4 is uint8 with x1_dtype, x2_dtype = 296",
        fix=f"pass {packed[0]}_dtype=torch_npu.float4_e2m1fn_x2" if packed else "quantize both sides alike",
    )


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
    require(
        c.scale.dtype != torch.bfloat16 or out == torch.bfloat16,
        "When scale's dtype is bfloat16, output_dtype must be bfloat16 or int32, but output_dtype is "
        f"{contract.spell_dtype(c.output_dtype)}",
        needs="a float32 scale for a float16 output",
        fix="weight_scale.float()",
    )
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
    require(
        c.offset is None or (out == torch.int8 and c.offset.dim() == 1),
        "the offset dim num must be 1, please check offset dim num",
        needs="an offset [N] with an int8 output only",
        fix="leave offset out",
    )
    return (*c.x1.shape[:-1], n), out


def check_fp8(c: QuantMatmulCall) -> Checked:
    n = c.x2.shape[-1]
    check_matrices(c, *k_of_both(c), fix="x2 = weight.t() for a weight [N, K]")
    require(
        c.pertoken_scale is not None,
        "FP8 without pertoken_scale",
        needs="pertoken_scale [M] in float32",
        fix="quantize the activation with npu_dynamic_quant(x, dst_type=torch.float8_e4m3fn)",
    )
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
        f"group_sizes={groups} for x1 {tuple(c.x1.shape)}",
        needs="[1, 128, 128] or [128, 128, 128], and x1 [M, K]",
        fix="group_sizes=[1, 128, 128]",
    )
    check_no_offset(c)
    rows, wide, high = -(-c.x1.shape[0] // groups[0]), -(-k1 // 128), -(-n // 128)
    given = None if c.pertoken_scale is None else tuple(c.pertoken_scale.shape)
    require(
        given == (rows, wide) and tuple(c.scale.shape) == (wide, high),
        "In mx, B-B, G-B quantification, k dimension of scale and pertoken_scale must be equal, "
        f"please check the sizes of scale and pertoken_scale: {tuple(c.scale.shape)}, {given}",
        needs=f"pertoken_scale {(rows, wide)}, scale {(wide, high)}, float32",
        fix="one scale per 128 x 128 of the weight",
    )
    check_transposes(c, is_transposed(c.scale))
    out = contract.output_dtype(c.output_dtype, WIDE, "128 x 128 blocks")
    require(c.bias is None, "bias with 128 x 128 blocks", needs="none", fix="add the bias afterwards")
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
        require(
            c.x1.dim() == 2 and transposed and k1 % 8 == 0,
            "a8w4_float ND only support x1 not transpose and x2 transpose and k dim of x1 should be 2 "
            f"multiple of k dim of x2, please check k dim of x1 and x2: x1 {tuple(c.x1.shape)}",
            needs="x1 [M, K] with K a multiple of 8, x2 a transposed view of [N, K / 2]",
            fix="x.reshape(-1, K), and weight.transpose(0, 1) without .contiguous()",
        )
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
    require(k1 > 2 and n > 1, f"FP4 with K = {k1} and N = {n}", needs="K > 2 and N > 1", fix="keep it in FP8")
    return n, k1, k2


def _scale_dtypes(c: QuantMatmulCall) -> None:
    """E8M0 scales are uint8, so the call must say what they are."""
    require(
        c.pertoken_scale is not None,
        "when the pertoken_scale is None, group_sizes's value must be 0, please check group_sizes's value",
        needs="pertoken_scale, the scales of the activation",
        fix=_EXAMPLE,
    )
    assert c.pertoken_scale is not None
    for name, dtype, tensor in (
        ("scale", c.scale_dtype, c.scale),
        ("pertoken_scale", c.pertoken_scale_dtype, c.pertoken_scale),
    ):
        require(
            dtype is not None,
            "When group_sizes's value is not 0, scale_dtype and pertoken_scale_dtype are None, dtype of "
            f"scale and pertoken_scale must be both float32, but scale's dtype is {c.scale.dtype} "
            f"pertoken_scale's dtype is {c.pertoken_scale.dtype} ({name}_dtype is missing)",
            needs="scale_dtype and pertoken_scale_dtype = torch_npu.float8_e8m0fnu (293): torch_npu takes "
            "the call without them and CANN misreads it",
            fix=_EXAMPLE,
        )
        require(
            dtype == contract.SCALE_E8M0,
            f"The {name}_dtype supported for torch_npu.float8_e8m0fnu, but {name}_dtype is "
            f"{contract.spell_dtype(dtype)}",
            needs="293",
            fix=f"{name}_dtype=torch_npu.float8_e8m0fnu",
        )
        require(
            tensor.element_size() == 1,
            f"When {name}_dtype is not None, {name} must be a 1 byte tensor, but the byte size of {name} is"
            f"{tensor.element_size()}",
            needs="E8M0 bytes",
            fix="pass the scale as npu_dynamic_mx_quant returned it",
        )


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
        got,
        needs="group_sizes=" + " or ".join(map(str, allowed)),
        fix=f"group_sizes={allowed[-1]}",
    )


def _mx_scales(c: QuantMatmulCall, n: int, k: int, transposed: bool) -> None:
    assert c.pertoken_scale is not None
    pairs = -(-k // 64)
    wanted1, wanted2 = (*c.x1.shape[:-1], pairs, 2), (pairs, n, 2)
    given1, given2 = tuple(c.pertoken_scale.shape), tuple(c.scale.shape)
    if len(given1) >= 2 and len(given2) == 3 and given1[-2] != given2[0]:
        refuse(
            "In mx, B-B, G-B quantification, k dimension of scale and pertoken_scale must be equal, "
            f"please check the sizes of scale and pertoken_scale: {given2}, {given1}",
            needs=f"pertoken_scale {wanted1}, scale {wanted2}",
            fix="fill an odd number of blocks up with byte 0, view as [N, K / 64, 2], then transpose(0, 1)",
        )
    require(
        given1 == wanted1 and given2 == wanted2,
        f"pertoken_scale {given1}, scale {given2}",
        needs=f"pertoken_scale {wanted1}, scale {wanted2}",
        fix="mx.layouts.to_pairs(weight_scale).transpose(0, 1)",
    )
    view = c.scale.stride() == (2, 2 * pairs, 1)
    check_transposes(c, view or 1 in (n, pairs), plain=c.scale.is_contiguous() and not transposed)


def _w4a8_bias(c: QuantMatmulCall, n: int, out: torch.dtype) -> None:
    if c.bias is None:
        return
    require(
        c.bias.dim() == 2,
        "in a8w4 float, bias_dim_num should be 2 , please check bias dim num ",
        needs=f"bias [1, {n}]",
        fix="bias.view(1, -1)",
    )
    require(
        tuple(c.bias.shape) == (1, n) and c.bias.dtype == out,
        f"bias {tuple(c.bias.shape)} of {c.bias.dtype}",
        needs=f"[1, {n}] of {out}, the dtype of the output",
        fix="bias.to(x.dtype).view(1, -1)",
    )


def _nz_weight(c: QuantMatmulCall, mode: str, n: int, k: int) -> None:
    tag = nz.fractal(c.x2)
    assert tag is not None
    if mode == "mxfp8":
        require(
            c.x2.dtype == torch.float8_e4m3fn,
            f"FRACTAL_NZ weight of {c.x2.dtype}",
            needs="float8_e4m3fn",
            fix="keep an e5m2 weight in ND",
        )
        return
    require(
        tag.customized,
        "FRACTAL_NZ weight of packed FP4 that was cast without customize_dtype",
        needs="bytes blocked as FP4",
        fix="npu_format_cast(w.view(torch.int8), 29, customize_dtype=torch.int8)",
    )
    require(
        mode != "w4a8" or (k % 8 == 0 and n % 8 == 0),
        f"W4A8 with a FRACTAL_NZ weight of K = {k}, N = {n}",
        needs="K and N multiples of 8",
        fix="keep this weight in ND",
    )


# ---- checks that modes share --------------------------------------------------------------------


def check_matrices(c: QuantMatmulCall, k1: int, k2: int, fix: str) -> None:
    require(
        k1 == k2,
        f"k dim of x1 and x2 need be same, please check k dim of x1 and x2 ({k1} and {k2})",
        needs="x1 [.., M, K] and x2 [K, N]",
        fix=fix,
    )
    require(
        2 <= c.x1.dim() <= 6,
        "x1 dim num should be 2 ~ 6, please check x1 dim num",
        needs="x1 [M, K]",
        fix="x.reshape(-1, K)",
    )
    require(
        c.x2.dim() == 2,
        f"x2 {tuple(c.x2.shape)}",
        needs="x2 [K, N]",
        fix="the twin computes one weight at a time",
    )
    require(
        not is_transposed(c.x1) or c.x1.is_contiguous(),
        "x1 is a transposed view",
        needs="x1 [.., M, K] as the quantizer returns it",
        fix="quantize the activation along its last axis",
    )
    require(c.y_scale is None, "y_scale is given", needs="none in this mode", fix="leave y_scale out")


def check_transposes(c: QuantMatmulCall, scale_transposed: bool, plain: bool = False) -> None:
    require(
        scale_transposed == is_transposed(c.x2) or plain,
        "Input x2 tensor and scale tensor's transpose are not same, please check input.",
        needs="x2 and scale both transposed views, or both contiguous",
        fix="weight.transpose(0, 1) and weight_scale.transpose(0, 1), never .contiguous()",
    )


def check_no_offset(c: QuantMatmulCall) -> None:
    require(c.offset is None, "offset is given", needs="none in this mode", fix="leave offset out")


def check_no_groups(c: QuantMatmulCall) -> None:
    require(
        not c.group_sizes or not any(c.group_sizes),
        f"group_sizes={c.group_sizes}",
        needs="none: one scale per token and per channel",
        fix="leave group_sizes out",
    )


def check_bias(c: QuantMatmulCall, n: int, allowed: tuple[torch.dtype, ...], fix: str) -> None:
    if c.bias is None:
        return
    require(
        c.bias.dtype in allowed,
        f"bias of {c.bias.dtype} for an output of {contract.spell_dtype(c.output_dtype)}",
        needs=" or ".join(str(d) for d in allowed),
        fix=fix,
    )
    if c.bias.dim() == 3:
        require(
            c.x1.dim() == 3 and tuple(c.bias.shape) == (c.x1.shape[0], 1, n),
            "when bias dim is 3, out dim need to be 3",
            needs=f"bias [{n}], or [B, 1, {n}] for x1 [B, M, K]",
            fix="bias.flatten()",
        )
    else:
        require(
            tuple(c.bias.shape) == (n,),
            "bias_first_dim should be equal to x2 n dim, please check bias 1st dim value "
            f"{tuple(c.bias.shape)}",
            needs=f"bias [{n}]",
            fix="bias.flatten()",
        )


def check_scale_per_channel(c: QuantMatmulCall, n: int, allowed: tuple[torch.dtype, ...]) -> None:
    """1-D scales: [N] or [1] of x2, [M] of x1."""
    require(
        c.scale.dim() == 1,
        "the scale dim num must be 1, please check scale dim num",
        needs=f"scale [{n}]",
        fix="weight_scale.flatten(); for MX scales pass group_sizes=[1, 1, 32]",
    )
    require(
        c.scale.shape[0] in (1, n),
        "the scale 1st dim value must be 1 or x2 n dim value, please check scale 1st dim value "
        f"({c.scale.shape[0]})",
        needs=f"scale [{n}]",
        fix="one scale per output channel",
    )
    require(
        c.scale.dtype in allowed,
        f"scale of {c.scale.dtype}",
        needs=" or ".join(str(d) for d in allowed),
        fix="weight_scale.float()",
    )
    if c.pertoken_scale is not None:
        check_scale_per_token(c)


def check_scale_per_token(c: QuantMatmulCall) -> None:
    assert c.pertoken_scale is not None
    require(
        c.pertoken_scale.dim() == 1 and c.x1.dim() == 2,
        "the pertoken_scale dim num must be 1, please check scale dim num",
        needs="x1 [M, K] and pertoken_scale [M]",
        fix="flatten the activation to [tokens, K] before quantizing it",
    )
    require(
        tuple(c.pertoken_scale.shape) == (c.x1.shape[0],) and c.pertoken_scale.dtype == torch.float32,
        f"pertoken_scale {tuple(c.pertoken_scale.shape)} of {c.pertoken_scale.dtype}",
        needs=f"[{c.x1.shape[0]}] of float32",
        fix="pass the scale as npu_dynamic_quant returned it",
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
