"""The arguments of npu_quant_matmul, which mode they mean, and the checks that modes share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.twin import dtypes
from ascendit.twin.faults import refuse, require

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Call:
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

    def with_scale(self, scale: Tensor) -> Call:
        return dataclasses.replace(self, scale=scale)


Shape = tuple[int, ...]
Checked = tuple[Shape, torch.dtype]


def is_transposed(t: Tensor) -> bool:
    """A view whose last two axes are exchanged, as the adapter tells: strides (1, rows)."""
    if t.dim() < 2 or t.shape[-1] == t.shape[-2] == 1:
        return False
    return t.stride(-2) == 1 and t.stride(-1) == t.shape[-2]


def mode_of(c: Call) -> str:
    """int8, static, fp8, mxfp8, mxfp4, w4a8 or block. Refuses other pairs of dtypes."""
    fp4 = dtypes.E2M1
    for name, dtype in (("x1", c.x1_dtype), ("x2", c.x2_dtype)):
        tensor: Tensor = getattr(c, name)
        if dtype is not None and (dtype != fp4 or tensor.dtype in (*FP8, *WIDE)):
            refuse(
                f"Pass {name}_dtype only when {name} is not a native PyTorch dtype (e.g. "
                "torch_npu.float4_e2m1fn_x2, torch_npu.hifloat8, torch_npu.float4_e1m2fn_x2); "
                f"otherwise omit it. Invalid {name}_dtype: {dtypes.spelled(dtype)}",
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


def _fp8_mode(c: Call) -> str:
    groups = list(c.group_sizes or [])
    if groups[-1:] == [128]:
        return "block"
    byte_scales = c.scale.element_size() == 1 or c.scale_dtype is not None or groups
    return "mxfp8" if byte_scales else "fp8"


# ---- shared parts ---------------------------------------------------------------------------------------


def matrices(c: Call, k1: int, k2: int, fix: str) -> None:
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


def no_offset(c: Call) -> None:
    require(c.offset is None, "offset is given", needs="none in this mode", fix="leave offset out")


def bias(c: Call, n: int, allowed: tuple[torch.dtype, ...], fix: str) -> None:
    if c.bias is None:
        return
    require(
        c.bias.dtype in allowed,
        f"bias of {c.bias.dtype} for an output of {dtypes.spelled(c.output_dtype)}",
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


def per_channel(c: Call, n: int, allowed: tuple[torch.dtype, ...]) -> None:
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
        per_token(c)


def per_token(c: Call) -> None:
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


def no_groups(c: Call) -> None:
    require(
        not c.group_sizes or not any(c.group_sizes),
        f"group_sizes={c.group_sizes}",
        needs="none: one scale per token and per channel",
        fix="leave group_sizes out",
    )


def plain_k(c: Call) -> tuple[int, int]:
    return c.x1.shape[-1], c.x2.shape[-2]


def same_transpose(c: Call, scale_transposed: bool, plain: bool = False) -> None:
    require(
        scale_transposed == is_transposed(c.x2) or plain,
        "Input x2 tensor and scale tensor's transpose are not same, please check input.",
        needs="x2 and scale both transposed views, or both contiguous",
        fix="weight.transpose(0, 1) and weight_scale.transpose(0, 1), never .contiguous()",
    )
