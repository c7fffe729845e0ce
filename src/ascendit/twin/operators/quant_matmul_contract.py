"""What npu_quant_matmul takes, by mode. Texts are those of torch_npu's adapter and Meta kernel.

On a card the eager adapter runs few of these checks: a call without group_sizes or scale_dtype reaches CANN,
which fails or takes another mode. The twin makes them all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ascendit.twin import dtypes
from ascendit.twin.faults import require
from ascendit.twin.operators import quant_matmul_mx as mx
from ascendit.twin.operators.quant_matmul_call import (
    WIDE,
    Call,
    Checked,
    bias,
    is_transposed,
    matrices,
    no_groups,
    no_offset,
    per_channel,
    plain_k,
    same_transpose,
)


def check_int8(c: Call) -> Checked:
    n = c.x2.shape[-1]
    matrices(c, *plain_k(c), fix="x2 = weight.t() for a weight [N, K]")
    no_groups(c)
    no_offset(c)
    out = dtypes.output_dtype(c.output_dtype, WIDE[:2], "int8 with a scale per token")
    require(
        c.scale.dtype != torch.bfloat16 or out == torch.bfloat16,
        "When scale's dtype is bfloat16, output_dtype must be bfloat16 or int32, but output_dtype is "
        f"{dtypes.spelled(c.output_dtype)}",
        needs="a float32 scale for a float16 output",
        fix="weight_scale.float()",
    )
    allowed = (torch.float32, torch.bfloat16) if out == torch.bfloat16 else (torch.float32,)
    per_channel(c, n, allowed)
    bias(c, n, (torch.int32, out, torch.float32), fix="bias in float32, or in the dtype of the output")
    return (*c.x1.shape[:-1], n), out


def check_static(c: Call) -> Checked:
    n = c.x2.shape[-1]
    matrices(c, *plain_k(c), fix="x2 = weight.t() for a weight [N, K]")
    no_groups(c)
    allowed = (torch.int8, torch.int32, torch.float16, torch.bfloat16)
    out = dtypes.output_dtype(1 if c.output_dtype is None else c.output_dtype, allowed, "static int8")
    wide = (
        (torch.float32, torch.bfloat16)
        if out in (torch.bfloat16, torch.int32)
        else (torch.int64, torch.float32)
    )
    per_channel(c, n, wide)
    floats = (torch.bfloat16, torch.float32) if out == torch.bfloat16 else ()
    bias(c, n, (torch.int32, *floats), fix="quant_bias in int32")
    require(
        c.offset is None or (out == torch.int8 and c.offset.dim() == 1),
        "the offset dim num must be 1, please check offset dim num",
        needs="an offset [N] with an int8 output only",
        fix="leave offset out",
    )
    return (*c.x1.shape[:-1], n), out


def check_fp8(c: Call) -> Checked:
    n = c.x2.shape[-1]
    matrices(c, *plain_k(c), fix="x2 = weight.t() for a weight [N, K]")
    require(
        c.pertoken_scale is not None,
        "FP8 without pertoken_scale",
        needs="pertoken_scale [M] in float32",
        fix="quantize the activation with npu_dynamic_quant(x, dst_type=torch.float8_e4m3fn)",
    )
    no_groups(c)
    no_offset(c)
    per_channel(c, n, (torch.float32,))
    out = dtypes.output_dtype(c.output_dtype, WIDE, "FP8")
    bias(c, n, (torch.float32,), fix="bias.float(), once, when the weight is loaded")
    return (*c.x1.shape[:-1], n), out


def check_block(c: Call) -> Checked:
    n, (k1, k2) = c.x2.shape[-1], plain_k(c)
    matrices(c, k1, k2, fix="x2 = weight.t() for a weight [N, K]")
    groups = list(c.group_sizes or [])
    require(
        groups in ([1, 128, 128], [128, 128, 128]) and c.x1.dim() == 2,
        f"group_sizes={groups} for x1 {tuple(c.x1.shape)}",
        needs="[1, 128, 128] or [128, 128, 128], and x1 [M, K]",
        fix="group_sizes=[1, 128, 128]",
    )
    no_offset(c)
    rows, wide, high = -(-c.x1.shape[0] // groups[0]), -(-k1 // 128), -(-n // 128)
    given = None if c.pertoken_scale is None else tuple(c.pertoken_scale.shape)
    require(
        given == (rows, wide) and tuple(c.scale.shape) == (wide, high),
        "In mx, B-B, G-B quantification, k dimension of scale and pertoken_scale must be equal, "
        f"please check the sizes of scale and pertoken_scale: {tuple(c.scale.shape)}, {given}",
        needs=f"pertoken_scale {(rows, wide)}, scale {(wide, high)}, float32",
        fix="one scale per 128 x 128 of the weight",
    )
    same_transpose(c, is_transposed(c.scale))
    out = dtypes.output_dtype(c.output_dtype, WIDE, "128 x 128 blocks")
    require(c.bias is None, "bias with 128 x 128 blocks", needs="none", fix="add the bias afterwards")
    return (*c.x1.shape[:-1], n), out


CHECKS: dict[str, Callable[[Call], Checked]] = {
    "int8": check_int8,
    "static": check_static,
    "fp8": check_fp8,
    "block": check_block,
    "mxfp8": lambda c: mx.check_mx(c, "mxfp8"),
    "mxfp4": lambda c: mx.check_mx(c, "mxfp4"),
    "w4a8": lambda c: mx.check_mx(c, "w4a8"),
}
