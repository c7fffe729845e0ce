"""The steps of `steps.py` by the kernels of `triton_kernels.py`: one pass over memory each."""

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
"""Groups of 512 numbers that one program encodes or decodes."""
ROW_BLOCK = 1024
MATMUL_TILE, LARGE_MATMUL_TILE = (128, 128, 64), (256, 128, 64)
"""Tokens, channels and numbers of K that one program of `matmul` takes at a time. The large one is for more
than MANY tokens; with a dual scale, and so two sums for each pair, the registers cannot hold it."""
MANY = 1024
TALL = 8
"""Tiles of tokens that run one below the other, so that they read the same weight from the cache."""
DOT = "bfloat16"
"""Type in which tiles are multiplied. The interpreter can only do float32."""


@functools.cache
def triton_steps() -> tuple[LinearSteps | None, str]:
    """The steps in Triton, or None, and why."""
    if triton_kernels.triton is None:
        return None, "Triton is not installed"
    return LinearSteps(
        "Triton", to_values, to_codes, decode_weight, finish, matmul
    ), triton_kernels.triton.__version__


def to_values(x: Tensor, format: str, rule: str, mul_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """See `steps.to_values`."""
    form, m, k = lookup(format), *x.shape
    if not _has_kernel(format, rule):
        return PLAIN.to_values(x, format, rule, mul_scale)
    values = torch.empty(m, width_of(k), dtype=torch.bfloat16, device=x.device)
    if form.kind == "row":
        return values, _quantize_rows(x, format, mul_scale, values, qdata=False)
    outer = torch.empty(m, -(-k // GROUP), device=x.device) if form.coarse else None
    _quantize_blocks(x, format, rule, mul_scale, values, None, outer)
    return values, outer


def to_codes(x: Tensor, format: str, rule: str, mul_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `steps.to_codes`."""
    m, k = x.shape
    if not _has_kernel(format, rule):
        return PLAIN.to_codes(x, format, rule, mul_scale)
    qdata = torch.empty(m, padded(k), dtype=torch.int8 if format == "int8" else torch.uint8, device=x.device)
    if lookup(format).kind == "row":
        scale = _quantize_rows(x, format, mul_scale, qdata, qdata=True)
    else:
        scale = torch.empty(m, -(-k // 32), dtype=torch.uint8, device=x.device)
        _quantize_blocks(x, format, rule, mul_scale, qdata, scale, None)
    return qdata if format == "int8" else qdata.view(torch.float8_e4m3fn), scale


def _has_kernel(format: str, rule: str) -> bool:
    """The rules that are two integers; msModelSlim's are not. UsageError for one that does not exist."""
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
        triton_kernels.quantize_blocks, (x.shape[0], programs), x, _or(mul, x), out, _or(scale, x),
        _or(dual, x), x.shape[1], width, x.stride(0), -(-x.shape[1] // 32), groups,
        SHIFT=shift, THRESHOLD=threshold, MASK=scales.fraction_mask(rule, element), **_constants(element),
        SMOOTH=mul is not None, DUAL=dual is not None, CODES=scale is not None,
        ONES=0 if has_outer_scales(format) else BIAS_PARTS, GROUPS=GROUPS_PER_PROGRAM,
    )  # fmt: skip


def _quantize_rows(x: Tensor, format: str, mul: Tensor | None, out: Tensor, *, qdata: bool) -> Tensor:
    x, scale = dense_rows(x), torch.empty(x.shape[0], device=x.device)
    element = lookup(format).element
    launch(
        triton_kernels.quantize_rows, (x.shape[0],), x, _or(mul, x), out, scale, x.shape[1],
        out.shape[1], x.stride(0), STEP=1 / (element.max if element else 127), FP8=element is not None,
        CODES=qdata, SMOOTH=mul is not None, BLOCK=ROW_BLOCK,
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
        _or(bias, qdata), values, k, width, qdata.stride(0), encoded.scale.shape[1], KIND=_kind(encoded),
        SCALED=scaled, BIAS=bias is not None, BLOCKS=GROUP * GROUPS_PER_PROGRAM // 32,
    )  # fmt: skip
    return values


def finish(sums: Tensor, row: Tensor | None, column: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """See `steps.finish`."""
    m, n = out.shape
    assert out.is_contiguous() and sums.stride(1) == 1
    launch(
        triton_kernels.finish, (m, -(-n // ROW_BLOCK)), sums, _or(row, sums), _or(column, sums),
        _or(bias, sums), out, n, sums.stride(0), ROW=row is not None, COLUMN=column is not None,
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
    """Values [M, width] times a weight [N, K] on codes, decoded tile by tile, or `decoded` [N, width].

    + bias, float32 [N]; rounded once to `dtype`. `outer`: for the dual scale [M, groups], else None.
    """
    m, (n, k) = values.shape[0], encoded.shape
    out = torch.empty(m, n, dtype=dtype, device=values.device)
    weight = _raw(encoded) if decoded is None else decoded
    dual = steps.outer_scale(encoded)
    tokens, channels, depth = LARGE_MATMUL_TILE if outer is None and m > MANY else MATMUL_TILE
    launch(
        triton_kernels.matmul, (-(-m // tokens) * -(-n // channels),), values, weight, encoded.scale,
        _or(outer, values), _or(dual, values), _or(bias, values), out, m, n, k, values.stride(0),
        weight.stride(0), encoded.scale.shape[1], -(-k // GROUP),
        KIND=_kind(encoded) if decoded is None else "bf16", GROUP=0 if outer is None else GROUP,
        BIAS=bias is not None, EVEN=k % depth == 0, DOT=getattr(triton_kernels.tl, DOT),
        BM=tokens, BN=channels, BK=depth, TALL=TALL, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def _kind(encoded: Encoded) -> str:
    element = lookup(encoded.format).element
    return element.name if element else "int8"


def _raw(encoded: Encoded) -> Tensor:
    """Codes as bytes: Triton needs no float8 for them."""
    return encoded.qdata if encoded.qdata.dtype == torch.int8 else encoded.qdata.view(torch.uint8)


def dense_rows(x: Tensor) -> Tensor:
    """With the numbers of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer is needed, though the kernel will not use it."""
    return other if tensor is None else tensor


def _constants(element: Element) -> dict[str, Any]:
    return {
        "MBITS": element.mbits, "EMIN": element.emin, "MAX": element.max,
        "NAN": 0 if element is E2M1 else element.nan,
    }  # fmt: skip


def launch(
    kernel: Callable[..., Any], grid: tuple[int, ...], first: Tensor, *args: Any, **given: Any
) -> None:
    """On the card of `first`, which need not be the current one."""
    if 0 in grid:
        return
    launcher: Any = kernel
    with torch.cuda.device_of(first):
        launcher[grid](first, *args, **given, enable_fp_fusion=False)
