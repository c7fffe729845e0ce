"""What npu_quant_matmul takes in its MX modes: MXFP8, MXFP4 and W4A8."""

from __future__ import annotations

import torch

from ascendit.twin import dtypes, nz
from ascendit.twin.faults import refuse, require
from ascendit.twin.operators.quant_matmul_call import (
    WIDE,
    Call,
    Checked,
    bias,
    is_transposed,
    matrices,
    no_offset,
    same_transpose,
)

_EXAMPLE = (
    "npu_quant_matmul(q, w.transpose(0, 1), ws.transpose(0, 1), pertoken_scale=s, bias=bias_fp32, "
    "scale_dtype=293, pertoken_scale_dtype=293, output_dtype=x.dtype, group_sizes=[1, 1, 32])"
)


def check_mx(c: Call, mode: str) -> Checked:
    """MXFP8, MXFP4 and W4A8."""
    w4a8 = mode == "w4a8"
    _scale_dtypes(c)
    transposed = is_transposed(c.x2)
    n, k1, k2 = _mx_sizes(c, mode, transposed)
    matrices(c, k1, k2, fix="x2 = weight.transpose(0, 1) for a weight [N, K] or packed [N, K / 2]")
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
    no_offset(c)
    if nz.fractal(c.x2) is not None:
        _nz_weight(c, mode, n, k1)
    out = dtypes.output_dtype(c.output_dtype, WIDE[:2] if w4a8 else WIDE, mode)
    if w4a8:
        _w4a8_bias(c, n, out)
    else:
        bias(c, n, (torch.float32,), fix="bias.float(), once, when the weight is loaded")
    return (*c.x1.shape[:-1], n), out


def _mx_sizes(c: Call, mode: str, transposed: bool) -> tuple[int, int, int]:
    """N, K of x1, K of x2, with packed FP4 counted in numbers."""
    rows, columns = c.x2.shape[-2:]
    if mode == "mxfp8":
        return columns, c.x1.shape[-1], rows
    k1 = c.x1.shape[-1] * (1 if mode == "w4a8" else 2)
    n, k2 = (columns, rows * 2) if transposed else (columns * 2, rows)
    require(k1 > 2 and n > 1, f"FP4 with K = {k1} and N = {n}", needs="K > 2 and N > 1", fix="keep it in FP8")
    return n, k1, k2


def _scale_dtypes(c: Call) -> None:
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
            dtype == dtypes.E8M0,
            f"The {name}_dtype supported for torch_npu.float8_e8m0fnu, but {name}_dtype is "
            f"{dtypes.spelled(dtype)}",
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


def _groups(c: Call, allowed: list[list[int]], mode: str) -> None:
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


def _mx_scales(c: Call, n: int, k: int, transposed: bool) -> None:
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
    same_transpose(c, view or 1 in (n, pairs), plain=c.scale.is_contiguous() and not transposed)


def _w4a8_bias(c: Call, n: int, out: torch.dtype) -> None:
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


def _nz_weight(c: Call, mode: str, n: int, k: int) -> None:
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
