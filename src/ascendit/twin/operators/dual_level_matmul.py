"""npu_dual_level_quant_matmul: FP4 x FP4 with an E8M0 scale per 32 values and a float32 one per 512."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import layouts
from ascendit.mx.codec import Encoded
from ascendit.twin import contract, cpu_kernels, nz
from ascendit.twin.contract import require
from ascendit.twin.registry import Out, operator


@operator("npu_dual_level_quant_matmul")
def npu_dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    bias: Tensor | None,
    output_dtype: int,
) -> Iterator[Any]:
    """x1 packed [M, K / 2], x2 packed [N, K / 2] in FRACTAL_NZ, read as transposed -> [M, N]."""
    _check_matrices(x1, x2)
    m, n, k = x1.shape[0], x2.shape[0], 2 * x1.shape[1]
    groups, pairs = math.ceil(k / 512), math.ceil(k / 64)
    float32, byte = torch.float32, torch.uint8
    for name, tensor, shape, dtype, fix in (
        ("x1_level0_scale", x1_level0_scale, (m, groups), float32, "as the quantizer returned it"),
        (
            "x2_level0_scale",
            x2_level0_scale,
            (groups, n),
            float32,
            "weight_dual_scale.squeeze(-1).t().contiguous()",
        ),
        ("x1_level1_scale", x1_level1_scale, (m, pairs, 2), byte, "as the quantizer returned it"),
        (
            "x2_level1_scale",
            x2_level1_scale,
            (n, pairs, 2),
            byte,
            "weight_scale.view(N, -1, 2), not transposed",
        ),
    ):
        require(
            tuple(tensor.shape) == shape and (tensor.dtype == dtype or dtype == byte == _bytes(tensor)),
            f"{name} {tuple(tensor.shape)} of {tensor.dtype}",
            needs=f"{shape} of {dtype}",
            fix=fix,
        )
        require(tensor.is_contiguous(), f"{name} is not contiguous", needs="a contiguous tensor", fix=fix)
    require(
        bias is None or (tuple(bias.shape) == (n,) and bias.dtype == float32),
        f"bias {bias is not None and (tuple(bias.shape), bias.dtype)}",
        needs=f"{(n,)} of float32",
        fix="bias.float(), once, when the weight is loaded",
    )
    dtype = contract.output_dtype(output_dtype, (torch.bfloat16, torch.float16), "dual-level FP4")
    yield Out((m, n), dtype)
    tokens = _encoded(x1, x1_level1_scale, x1_level0_scale.unsqueeze(-1))
    weight = _encoded(nz.from_nz(x2), x2_level1_scale, layouts.from_npu_dual(x2_level0_scale))
    yield cpu_kernels.linear(tokens, weight, bias, dtype)


def _encoded(codes: Tensor, pairs: Tensor, coarse: Tensor) -> Encoded:
    """Packed codes [R, K / 2], pairs [R, K / 64, 2] and coarse scales [R, K / 512, 1]."""
    k = 2 * codes.shape[1]
    fine = layouts.from_pairs(pairs.view(torch.uint8), -(-k // 32))
    return Encoded(codes.view(torch.uint8), fine, coarse, "mxfp4_dualscale", -1, (len(codes), k))


def _check_matrices(x1: Tensor, x2: Tensor) -> None:
    for name, tensor in (("x1", x1), ("x2", x2)):
        require(
            tensor.dim() == 2,
            f"The shape dimension of {name} is only supported to be 2, but it is {tensor.dim()}",
            needs="packed x1 [M, K / 2] and x2 [N, K / 2]",
            fix="flatten the activation to [tokens, K] before quantizing it",
        )
        require(
            tensor.element_size() == 1,
            f"{name} of {tensor.dtype}",
            needs="packed FP4 as uint8 or int8",
            fix="pack two codes to a byte",
        )
    tag = nz.fractal(x2)
    require(
        tag is not None or nz.is_fake(x2),
        "x2 only supports NZ format.",
        needs="x2 in FRACTAL_NZ",
        fix="npu_format_cast(w.view(torch.int8), 29, customize_dtype=torch.int8), once, when it is loaded",
    )
    require(
        tag is None or tag.customized,
        "x2 was cast to FRACTAL_NZ without customize_dtype",
        needs="packed FP4 viewed as int8 and cast with customize_dtype=torch.int8",
        fix="npu_format_cast(w.view(torch.int8), 29, customize_dtype=torch.int8)",
    )
    require(
        x1.shape[1] == x2.shape[1],
        f"The k of x1 and x2 should be equal. but x1_k_dim is {2 * x1.shape[1]}, "
        f"x2_k_dim is {2 * x2.shape[1]}",
        needs="x2 [N, K / 2], not transposed",
        fix="pass the weight as it is stored; the operator transposes it",
    )
    require(
        x1.is_contiguous(), "x1 is not contiguous", needs="x1 [M, K / 2]", fix="as the quantizer returned it"
    )


def _bytes(t: Tensor) -> torch.dtype | None:
    """uint8 for what is a byte per number: E8M0 may come as uint8 or float8_e8m0fnu."""
    return torch.uint8 if t.dtype in (torch.uint8, torch.float8_e8m0fnu) else None
