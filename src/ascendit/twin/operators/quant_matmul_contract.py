"""Argument checks of npu_quant_matmul: the mode that a call selects, and the checks of that mode.

Error texts are those of torch_npu's adapter and Meta kernel. On a card the eager adapter runs few of these
checks: a call without group_sizes or scale_dtype reaches CANN, which fails or selects another mode, and a
contiguous scale is misread. The twin runs all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ascendit.twin import contract, nz
from ascendit.twin.contract import SCALE_E8M0, Call
from ascendit.twin.registry import current_chip

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OUTPUT_DTYPES = (BF16, FP16, FP32)

Shape = tuple[int, ...]
Checked = tuple[Shape, torch.dtype]
"""Shape and dtype of the output."""


def mode_of(c: Call) -> str:
    """The mode of a call, a key of `quant_matmul.MODES`.

    Raises TwinError (E-TWN-01) for pairs of dtypes without a mode.
    """
    fp4, sides = contract.FP4_E2M1, (("x1", c.x1, c.x1_dtype), ("x2", c.x2, c.x2_dtype))
    for name, tensor, dtype in sides:
        native = dtype is not None and (dtype != fp4 or tensor.dtype in (*FP8, *OUTPUT_DTYPES))
        c.require(not native, "matmul.dtype_of_native", name=name, dtype=dtype, tensor=tensor)
        one_byte = dtype is None or tensor.element_size() == 1
        c.require(one_byte, "matmul.dtype_itemsize", name=name, tensor=tensor)
    if c.x1_dtype == c.x2_dtype == fp4:
        return "mxfp4"
    if c.x1.dtype == torch.float8_e4m3fn and c.x2_dtype == fp4:
        return "w4a8"
    if c.x1.dtype == c.x2.dtype == torch.int8 and c.x1_dtype is c.x2_dtype is None:
        if c.pertoken_scale is None:
            return "static"
        return "int8_block" if _has_tiles(c) else "int8"
    if c.x1.dtype in FP8 and c.x2.dtype in FP8 and c.x2_dtype is None:
        return _fp8_mode(c)
    packed = [name for name, tensor, dtype in sides if tensor.dtype == torch.uint8 and not dtype]
    advice = "quantize x1 and x2 to the same format"
    if packed:
        advice = f"pass {packed[0]}_dtype=torch_npu.float4_e2m1fn_x2"
    contract.refuse("matmul.dtypes", **vars(c), advice=advice)


def _fp8_mode(c: Call) -> str:
    if _has_tiles(c):
        return "block"
    byte_scales = c.scale.element_size() == 1 or c.scale_dtype is not None or c.group_sizes
    return "mxfp8" if byte_scales else "fp8"


def _has_tiles(c: Call) -> bool:
    return list(c.group_sizes or [])[-1:] == [128]


def is_transposed(t: Tensor) -> bool:
    """Whether `t` [.., R, C] of any dtype is a transposed view, by the adapter's rule: strides (1, R)."""
    if t.dim() < 2 or t.shape[-1] == t.shape[-2] == 1:
        return False
    return t.stride(-2) == 1 and t.stride(-1) == t.shape[-2]


def check(c: Call, mode: str) -> Checked:
    """Shape and dtype of the output. Raises TwinError (E-TWN-01) for arguments that are invalid in `mode`."""
    if mode in SCALE_AND_BIAS:
        return _check_channels(c, mode)
    return _check_block(c, mode) if mode in ("block", "int8_block") else _check_mx(c, mode)


Dtypes = tuple[torch.dtype, ...]
SCALE_AND_BIAS: Mapping[str, Mapping[torch.dtype, tuple[Dtypes, Dtypes]]] = {
    "int8": {
        BF16: ((FP32, BF16), (torch.int32, BF16, FP32)),
        FP16: ((FP32,), (torch.int32, FP16, FP32)),
    },
    "static": {
        torch.int8: ((torch.int64, FP32), (torch.int32,)),
        torch.int32: ((FP32, BF16), (torch.int32,)),
        FP16: ((torch.int64, FP32), (torch.int32,)),
        BF16: ((FP32, BF16), (torch.int32, BF16, FP32)),
    },
    "fp8": dict.fromkeys(OUTPUT_DTYPES, ((FP32,), (FP32,))),
}
"""Mode -> dtype of the output -> the dtypes allowed for `scale` and for the bias."""
_LABELS = {"int8": "int8 with a scale per token", "static": "static int8", "fp8": "FP8"}
_BIAS_FIX = {"int8": "bias in float32, or in the dtype of the output", "static": "quant_bias in int32"}
_FP32_BIAS = "bias.float(), once, when the weight is loaded"


def _check_channels(c: Call, mode: str) -> Checked:
    """int8, static int8 and fp8: `scale` [N] or [1], `pertoken_scale` [M]."""
    n = c.x2.shape[-1]
    _check_matrices(c, c.x1.shape[-1], c.x2.shape[-2], fix="x2 = weight.t() for a weight [N, K]")
    c.require(mode != "fp8" or c.pertoken_scale is not None, "matmul.fp8_scale")
    c.require(not c.group_sizes or not any(c.group_sizes), "matmul.no_groups")
    c.require(mode == "static" or c.offset is None, "matmul.offset")
    number = 1 if mode == "static" and c.output_dtype is None else c.output_dtype
    out = contract.output_dtype(number, tuple(SCALE_AND_BIAS[mode]), _LABELS[mode])
    scales, biases = SCALE_AND_BIAS[mode][out]
    c.require(mode != "int8" or out == BF16 or c.scale.dtype != BF16, "matmul.bf16_scale")
    c.require(c.scale.dim() == 1, "matmul.scale_axes", n=n)
    c.require(c.scale.shape[0] in (1, n), "matmul.scale_length", n=n)
    c.require(c.scale.dtype in scales, "matmul.scale_dtype", allowed=scales)
    if (pertoken := c.pertoken_scale) is not None:
        c.require(pertoken.dim() == 1 and c.x1.dim() == 2, "matmul.pertoken_axes")
        c.require(len(pertoken) == len(c.x1) and pertoken.dtype == FP32, "matmul.pertoken")
    _check_bias(c, n, biases, _BIAS_FIX.get(mode, _FP32_BIAS))
    c.require(c.offset is None or (out == torch.int8 and c.offset.dim() == 1), "matmul.static_offset")
    return (*c.x1.shape[:-1], n), out


def _check_block(c: Call, mode: str) -> Checked:
    """A scale per 128 x 128 of x2, and per 128 of a row of x1; of FP8 also per 128 x 128 of x1."""
    k, n = c.x1.shape[-1], c.x2.shape[-1]
    _check_matrices(c, k, c.x2.shape[-2], fix="x2 = weight.t() for a weight [N, K]")
    groups, int8 = list(c.group_sizes), mode == "int8_block"
    c.require(not int8 or groups == [1, 128, 128], "matmul.int8_block_groups", groups=groups)
    valid = groups in ([1, 128, 128], [128, 128, 128]) and c.x1.dim() == 2
    c.require(valid, "matmul.block_groups", groups=groups)
    c.require(c.offset is None, "matmul.offset")
    m_tiles, k_tiles, n_tiles = -(-len(c.x1) // groups[0]), -(-k // 128), -(-n // 128)
    pertoken = None if c.pertoken_scale is None else tuple(c.pertoken_scale.shape)
    _check_shapes(c, "matmul.block_scales", pertoken, (m_tiles, k_tiles), (k_tiles, n_tiles))
    transposed = is_transposed(c.x2)
    same = is_transposed(c.scale) == transposed or (int8 and 1 in c.scale.shape)
    c.require(same, "matmul.transposes")
    out = contract.output_dtype(c.output_dtype, (BF16,) if int8 else OUTPUT_DTYPES, "128 x 128 blocks")
    if int8:
        _check_int8_block(c, k, n)
    else:
        c.require(c.bias is None, "matmul.block_bias")
    return (*c.x1.shape[:-1], n), out


def _check_int8_block(c: Call, k: int, n: int) -> None:
    """The kernel of a2 and a3 needs whole tiles of its own, a transposed x2 and a bias."""
    floats = c.scale.dtype == c.pertoken_scale.dtype == FP32
    c.require(floats, "matmul.int8_block_scales")
    c.require(nz.fractal(c.x2) is None, "matmul.int8_block_nz")
    _check_bias(c, n, (FP32,), _FP32_BIAS)
    if (chip := current_chip()) != "a5":
        c.require(k % 512 == n % 256 == 0, "matmul.int8_block_sizes", k=k, n=n, chip=chip)
        c.require(is_transposed(c.x2), "matmul.int8_block_x2", chip=chip)
        c.require(c.bias is not None, "matmul.int8_block_bias", chip=chip)


def _check_mx(c: Call, mode: str) -> Checked:
    w4a8 = mode == "w4a8"
    _check_scale_dtypes(c)
    transposed = is_transposed(c.x2)
    n, k1, k2 = _mx_sizes(c, mode, transposed)
    _check_matrices(c, k1, k2, fix="x2 = weight.transpose(0, 1) for a weight [N, K] or packed [N, K / 2]")
    c.require(not w4a8 or (c.x1.dim() == 2 and transposed and k1 % 8 == 0), "matmul.w4a8_shapes")
    _check_groups(c, [[0, 0, 32], [1, 1, 32]] if w4a8 else [[1, 1, 32]], mode)
    _check_mx_scales(c, n, k1, transposed)
    c.require(c.offset is None, "matmul.offset")
    if (tag := nz.fractal(c.x2)) is not None:
        fp8 = mode == "mxfp8"
        c.require(not fp8 or c.x2.dtype == torch.float8_e4m3fn, "matmul.nz_e5m2")
        c.require(fp8 or tag.customized, "matmul.nz_fp4")
        c.require(not w4a8 or k1 % 8 == n % 8 == 0, "matmul.nz_w4a8", k=k1, n=n)
    out = contract.output_dtype(c.output_dtype, OUTPUT_DTYPES[:2] if w4a8 else OUTPUT_DTYPES, mode)
    if not w4a8:
        _check_bias(c, n, (FP32,), _FP32_BIAS)
    elif c.bias is not None:
        c.require(c.bias.dim() == 2, "matmul.w4a8_bias_axes", n=n)
        c.require(tuple(c.bias.shape) == (1, n) and c.bias.dtype == out, "matmul.w4a8_bias", n=n, out=out)
    return (*c.x1.shape[:-1], n), out


def _mx_sizes(c: Call, mode: str, transposed: bool) -> tuple[int, int, int]:
    """N, K of x1, K of x2, counted in elements for packed FP4."""
    rows, columns = c.x2.shape[-2:]
    if mode == "mxfp8":
        return columns, c.x1.shape[-1], rows
    k1 = c.x1.shape[-1] * (1 if mode == "w4a8" else 2)
    n, k2 = (columns, rows * 2) if transposed else (columns * 2, rows)
    c.require(k1 > 2 and n > 1, "matmul.fp4_sizes", k1=k1, n=n)
    return n, k1, k2


def _check_scale_dtypes(c: Call) -> None:
    """E8M0 scales are uint8, so the call must name their dtype."""
    c.require(c.pertoken_scale is not None, "matmul.mx_pertoken")
    for name in ("scale", "pertoken_scale"):
        dtype, tensor = getattr(c, f"{name}_dtype"), getattr(c, name)
        c.require(dtype is not None, "matmul.mx_scale_dtype_missing", name=name)
        c.require(dtype == SCALE_E8M0, "matmul.mx_scale_dtype", name=name, dtype=dtype)
        c.require(tensor.element_size() == 1, "matmul.mx_scale_bytes", name=name, tensor=tensor)


def _check_groups(c: Call, allowed: list[list[int]], mode: str) -> None:
    groups = None if c.group_sizes is None else list(c.group_sizes)
    if groups is None:
        refusal = "matmul.groups_missing"
    elif len(groups) != 3:
        refusal = "matmul.groups_length"
    elif groups[2] not in (32, 128):
        refusal = "matmul.groups_last"
    else:
        refusal = "matmul.groups_w4a8" if mode == "w4a8" else "matmul.groups"
    c.require(groups in allowed, refusal, mode=mode, allowed=allowed, last=allowed[-1])


def _check_mx_scales(c: Call, n: int, k: int, transposed: bool) -> None:
    pairs = -(-k // 64)
    expected = ((*c.x1.shape[:-1], pairs, 2), (pairs, n, 2))
    pertoken = tuple(c.pertoken_scale.shape)
    k_differs = len(pertoken) >= 2 and c.scale.dim() == 3 and pertoken[-2] != len(c.scale)
    _check_shapes(c, "matmul.mx_blocks" if k_differs else "matmul.mx_scales", pertoken, *expected)
    same_layout = (c.scale.stride() == (2, 2 * pairs, 1) or 1 in (n, pairs)) == transposed
    c.require(same_layout or (c.scale.is_contiguous() and not transposed), "matmul.transposes")


def _check_matrices(c: Call, k1: int, k2: int, fix: str) -> None:
    c.require(k1 == k2, "matmul.k", k1=k1, k2=k2, fix=fix)
    c.require(2 <= c.x1.dim() <= 6, "matmul.x1_axes")
    c.require(c.x2.dim() == 2, "matmul.x2_axes")
    c.require(not is_transposed(c.x1) or c.x1.is_contiguous(), "matmul.x1_transposed")
    c.require(c.y_scale is None, "matmul.y_scale")


def _check_shapes(
    c: Call, refusal: str, pertoken: Shape | None, expected_pertoken: Shape, expected_scale: Shape
) -> None:
    """`pertoken`: the shape of `pertoken_scale`."""
    scale = tuple(c.scale.shape)
    shapes = {"pertoken_shape": pertoken, "scale_shape": scale}
    shapes |= {"expected_pertoken": expected_pertoken, "expected_scale": expected_scale}
    c.require((pertoken, scale) == (expected_pertoken, expected_scale), refusal, **shapes)


def _check_bias(c: Call, n: int, allowed: Dtypes, fix: str) -> None:
    if c.bias is None:
        return
    c.require(c.bias.dtype in allowed, "matmul.bias_dtype", allowed=allowed, fix=fix)
    if c.bias.dim() == 3:
        batched = c.x1.dim() == 3 and tuple(c.bias.shape) == (len(c.x1), 1, n)
        c.require(batched, "matmul.bias_batch", n=n)
    else:
        c.require(tuple(c.bias.shape) == (n,), "matmul.bias_shape", n=n)
