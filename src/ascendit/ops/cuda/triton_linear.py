"""The steps of `steps.py` in Triton (`triton_kernels.py`), each in one pass over memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascendit.mx import scales
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import E2M1, Element, lookup, resolve_rule
from ascendit.ops.cuda import steps, triton_kernels
from ascendit.ops.cuda.steps import BIAS_PARTS, GROUP, PLAIN, LinearSteps, has_outer_scales, padded, width_of

GROUPS_PER_PROGRAM = 2
"""Groups of 512 elements that one program quantizes or dequantizes."""
ROW_BLOCK = 1024
"""Elements of a row that one program processes at a time."""
MATMUL_TILE, LARGE_MATMUL_TILE = (128, 128, 64), (256, 128, 64)
"""Rows, channels and K of one tile of `matmul`. The large one is for more than MANY_ROWS rows; with a dual
scale, which needs two accumulators, it does not fit the registers."""
MANY_ROWS = 1024
GROUP_M = 8
"""Consecutive row tiles that run together, so that they read the same weight from the cache."""
DOT = "bfloat16"
"""dtype in which tiles are multiplied. The interpreter supports only float32."""


@functools.cache
def triton_steps() -> tuple[LinearSteps | None, str]:
    """The steps in Triton and its version; or None and the reason."""
    if triton_kernels.triton is None:
        return None, "Triton is not installed"
    return LinearSteps(
        "Triton", fake_quantize, quantize, decode_weight, finish, matmul
    ), triton_kernels.triton.__version__


def fake_quantize(
    x: Tensor, format: str, rule: str, mul_scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """See `steps.fake_quantize`."""
    fmt, m, k = lookup(format), *x.shape
    if not _has_kernel(format, rule):
        return PLAIN.fake_quantize(x, format, rule, mul_scale)
    values = torch.empty(m, width_of(k), dtype=torch.bfloat16, device=x.device)
    if fmt.kind == "row":
        return values, _quantize_rows(x, format, mul_scale, values, qdata=False)
    outer = torch.empty(m, -(-k // GROUP), device=x.device) if fmt.coarse else None
    _quantize_blocks(x, format, rule, mul_scale, values, None, outer)
    return values, outer


def quantize(x: Tensor, format: str, rule: str, mul_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `steps.quantize`."""
    m, k = x.shape
    if not _has_kernel(format, rule):
        return PLAIN.quantize(x, format, rule, mul_scale)
    qdata = torch.empty(m, padded(k), dtype=torch.int8 if format == "int8" else torch.uint8, device=x.device)
    if lookup(format).kind == "row":
        scale = _quantize_rows(x, format, mul_scale, qdata, qdata=True)
    else:
        scale = torch.empty(m, -(-k // 32), dtype=torch.uint8, device=x.device)
        _quantize_blocks(x, format, rule, mul_scale, qdata, scale, None)
    return qdata if format == "int8" else qdata.view(torch.float8_e4m3fn), scale


def _has_kernel(format: str, rule: str) -> bool:
    """Whether Triton implements a scale rule: all but msModelSlim's.

    Raises UsageError for an unknown rule.
    """
    return not resolve_rule(lookup(format), rule).startswith("msms:")


def _quantize_blocks(
    x: Tensor,
    format: str,
    rule: str,
    mul: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    dual: Tensor | None,
) -> None:
    element = lookup(format).element
    assert element is not None
    x = dense_rows(x)
    width, groups = out.shape[1], -(-x.shape[1] // GROUP)
    programs = -(-width // (GROUP * GROUPS_PER_PROGRAM))
    shift, threshold = scales.thresholds(rule, element)
    launch(
        triton_kernels.quantize_blocks, (x.shape[0], programs), x, _ptr(mul, x), out, _ptr(scale, x),
        _ptr(dual, x), x.shape[1], width, x.stride(0), -(-x.shape[1] // 32), groups,
        SHIFT=shift, THRESHOLD=threshold, MASK=scales.fraction_mask(rule, element), **_constants(element),
        SMOOTH=mul is not None, DUAL=dual is not None, QDATA=scale is not None,
        ONES=0 if has_outer_scales(format) else BIAS_PARTS, GROUPS=GROUPS_PER_PROGRAM,
    )  # fmt: skip


def _quantize_rows(x: Tensor, format: str, mul: Tensor | None, out: Tensor, *, qdata: bool) -> Tensor:
    x, scale = dense_rows(x), torch.empty(x.shape[0], device=x.device)
    element = lookup(format).element
    launch(
        triton_kernels.quantize_rows, (x.shape[0],), x, _ptr(mul, x), out, scale, x.shape[1],
        out.shape[1], x.stride(0), STEP=1 / (element.max if element else 127), FP8=element is not None,
        QDATA=qdata, SMOOTH=mul is not None, BLOCK=ROW_BLOCK,
    )  # fmt: skip
    return scale


def decode_weight(encoded: Encoded, bias: Tensor | None) -> Tensor:
    """See `steps.decode_weight`."""
    n, k = encoded.shape
    width, qdata, outer = width_of(k), _raw(encoded), has_outer_scales(encoded.format)
    bias = None if outer else bias
    values = torch.empty(n, width, dtype=torch.bfloat16, device=qdata.device)
    scaled = lookup(encoded.format).kind != "row"
    launch(
        triton_kernels.decode_weight, (n, -(-width // (GROUP * GROUPS_PER_PROGRAM))), qdata, encoded.scale,
        _ptr(bias, qdata), values, k, width, qdata.stride(0), encoded.scale.shape[1], KIND=_element(encoded),
        SCALED=scaled, BIAS=bias is not None, BLOCKS=GROUP * GROUPS_PER_PROGRAM // 32,
    )  # fmt: skip
    return values


def finish(sums: Tensor, row: Tensor | None, column: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """See `steps.finish`."""
    m, n = out.shape
    assert out.is_contiguous() and sums.stride(1) == 1
    launch(
        triton_kernels.finish, (m, -(-n // ROW_BLOCK)), sums, _ptr(row, sums), _ptr(column, sums),
        _ptr(bias, sums), out, n, sums.stride(0), ROW=row is not None, COLUMN=column is not None,
        BIAS=bias is not None, BLOCK=ROW_BLOCK,
    )  # fmt: skip


def matmul(
    values: Tensor,
    outer: Tensor | None,
    encoded: Encoded,
    decoded: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """values [M, width_of(K)] bfloat16 @ weight.T + bias [N] float32 -> [M, N] in `dtype`, rounded once.

    The weight is `decoded` [N, width_of(K)] bfloat16, or `encoded` [N, K], dequantized tile by tile. `outer`:
    float32 [M, groups] for the dual scale, else None.
    """
    m, (n, k) = values.shape[0], encoded.shape
    out = torch.empty(m, n, dtype=dtype, device=values.device)
    weight = _raw(encoded) if decoded is None else decoded
    dual = steps.outer_scale(encoded)
    rows, channels, depth = LARGE_MATMUL_TILE if outer is None and m > MANY_ROWS else MATMUL_TILE
    launch(
        triton_kernels.matmul, (-(-m // rows) * -(-n // channels),), values, weight, encoded.scale,
        _ptr(outer, values), _ptr(dual, values), _ptr(bias, values), out, m, n, k, values.stride(0),
        weight.stride(0), encoded.scale.shape[1], -(-k // GROUP),
        KIND=_element(encoded) if decoded is None else "bf16", GROUP=0 if outer is None else GROUP,
        BIAS=bias is not None, EVEN=k % depth == 0, DOT=getattr(triton_kernels.tl, DOT),
        BM=rows, BN=channels, BK=depth, GROUP_M=GROUP_M, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def _element(encoded: Encoded) -> str:
    element = lookup(encoded.format).element
    return element.name if element else "int8"


def _raw(encoded: Encoded) -> Tensor:
    """qdata as int8 or uint8: Triton does not need the float8 dtype."""
    return encoded.qdata if encoded.qdata.dtype == torch.int8 else encoded.qdata.view(torch.uint8)


def dense_rows(x: Tensor) -> Tensor:
    """`x` [.., D] of any dtype with a contiguous last axis; a copy only if needed."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _ptr(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A launch needs a pointer even for an absent tensor."""
    return other if tensor is None else tensor


def _constants(element: Element) -> dict[str, Any]:
    return {
        "MBITS": element.mbits, "EMIN": element.emin, "MAX": element.max,
        "NAN": 0 if element is E2M1 else element.nan,
    }  # fmt: skip


def launch(
    kernel: Callable[..., Any], grid: tuple[int, ...], first: Tensor, *args: Any, **constants: Any
) -> None:
    """Run a Triton kernel on the device of `first` ([..], any dtype), which need not be the current one.

    Products and sums are rounded separately, unless `constants` has `enable_fp_fusion`.
    """
    if 0 in grid:
        return
    launcher: Any = kernel
    with torch.cuda.device_of(first):
        launcher[grid](first, *args, **{"enable_fp_fusion": False, **constants})
