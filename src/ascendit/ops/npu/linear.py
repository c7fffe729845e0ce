"""Quantized linear layers with the matmuls of an Ascend NPU; `kernels/reference.py` has the contract.

Layouts are made once, in `prepare_weight`: a weight [N, K] and its scales in pairs [N, K / 64, 2] both as
transposed views (a contiguous scale is refused), packed FP4 as uint8, level 0 of the dual scale as
[K / 512, N], the bias as float32. FRACTAL_NZ is a cast of its own; nothing may slice or copy it afterwards.

Every call names its dtypes: E8M0 scales are uint8, so without `scale_dtype` CANN misreads them; without
`output_dtype` the result is int8; FP4 is the number 296, since torch.float4_e2m1fn_x2 makes torch_npu
allocate twice the length; and `x1_dtype` is for packed bytes only, never for float8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ascendit.device.device import Device
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels.kernel import Activation, PreparedWeight, QuantLinearKernel
from ascendit.mx import layouts
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import lookup
from ascendit.ops.open_device import internal_format
from ascendit.quant.schemes import scheme_of
from ascendit.twin.contract import FP4_E2M1, FP8_E4M3, SCALE_E8M0
from ascendit.twin.nz import FRACTAL_NZ, ND

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)
NZ_SCHEMES = ("int8", "mxfp8", "mxfp4")
"""Where FRACTAL_NZ is a choice. mxfp4_dualscale has no other; of fp8 no document says that it has one."""
W4A8_K = 8
"""What K must be a multiple of."""


# ---- weights ------------------------------------------------------------------------------------


def prepare_weight(
    encoded: Encoded,
    bias: Tensor | None,
    device: torch.device,
    *,
    nz: bool = False,
    internal_format: Callable[[], AbstractContextManager[Any]],
) -> PreparedWeight:
    """See `Schemes.prepare_weight`. Dual-scale weights are FRACTAL_NZ in any case, as their matmul wants.

    `internal_format`: allows FRACTAL_NZ while a weight is cast. UsageError E-QNT-01 for a shape that the
    matmul does not take, before anything is moved.
    """
    scheme = encoded.format
    _check_shape(scheme, *encoded.shape)
    qdata = encoded.qdata.to(device)
    qdata = qdata.view(getattr(torch, lookup(scheme).qdata_dtype))
    scale, dual = _scales(encoded)
    scale = scale.to(device)
    if scheme == "mxfp4_dualscale" or (nz and scheme in NZ_SCHEMES):
        qdata = _to_nz(qdata, internal_format)
    if scheme != "mxfp4_dualscale":
        qdata = qdata.transpose(0, 1)
        scale = scale.transpose(0, 1) if scale.dim() == 3 else scale
    wide = None if bias is None else bias.to(device, torch.float32)
    row = wide.to(torch.bfloat16).view(1, -1) if wide is not None and scheme == "mxfp4" else None
    n, k = encoded.shape
    return PreparedWeight(
        scheme, (n, k), qdata, scale, None if dual is None else dual.to(device), bias=wide, row_bias=row
    )


def stored(weight: PreparedWeight) -> Encoded:
    """The inverse of `prepare_weight`."""
    qdata, scale = weight.qdata, weight.scale
    if weight.scheme != "mxfp4_dualscale":
        qdata = qdata.transpose(0, 1)
        scale = scale.transpose(0, 1) if scale.dim() == 3 else scale
    if int(torch.ops.npu.get_npu_format(qdata)) == FRACTAL_NZ:  # as it was cast: a5 refuses a transposed view
        qdata = torch.ops.npu.npu_format_cast(qdata, ND)
    form = lookup(weight.scheme)
    qdata = qdata.contiguous().view(getattr(torch, form.qdata_dtype))
    if form.kind == "row":
        return Encoded(qdata, scale.view(-1, 1), None, weight.scheme, -1, weight.shape)
    plain = layouts.from_pairs(scale, -(-weight.shape[1] // 32))
    dual = None if weight.dual_scale is None else layouts.from_npu_dual(weight.dual_scale)
    return Encoded(qdata, plain, dual, weight.scheme, -1, weight.shape)


def _scales(encoded: Encoded) -> tuple[Tensor, Tensor | None]:
    """float32 [N], or pairs [N, K / 64, 2] filled up with byte 0 and level 0 as [K / 512, N]."""
    if lookup(encoded.format).kind == "row":
        return encoded.scale.flatten(), None
    dual = None if encoded.dual_scale is None else layouts.to_npu_dual(encoded.dual_scale)
    return layouts.to_pairs(encoded.scale), dual


def _check_shape(scheme: str, n: int, k: int) -> None:
    """FP4 matmuls read two codes from a byte along K; a short last block of 32 is fine in all of them."""
    if lookup(scheme).packed and (k % 2 or k <= 2 or n < 2):
        raise UsageError(
            f"a weight of N = {n} and K = {k} in {scheme}",
            needs="an even K above 2 and N above 1 for the FP4 matmuls of an NPU",
            fix="keep this layer: --keep PATTERN, or a recipe that gives it mxfp8",
            code="E-QNT-01",
        )


def _to_nz(qdata: Tensor, internal_format: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """FRACTAL_NZ. Packed FP4 is cast as int8 bytes: a uint8 cast blocks it as 8-bit numbers."""
    given: dict[str, Any] = {}
    if qdata.dtype == torch.uint8:
        qdata, given = qdata.view(torch.int8), {"customize_dtype": torch.int8}
    with internal_format():
        cast: Tensor = torch.ops.npu.npu_format_cast(qdata, FRACTAL_NZ, **given)
    if (found := int(torch.ops.npu.get_npu_format(cast))) != FRACTAL_NZ:
        raise EnvironmentProblem(
            f"npu_format_cast of a weight {tuple(qdata.shape)} gave format {found}",
            needs="29 (FRACTAL_NZ)",
            fix="ascendit doctor: torch_npu and CANN may not belong together; without nz only"
            " mxfp4_dualscale needs it",
            code="E-CAP-01",
        )
    return cast


# ---- activations --------------------------------------------------------------------------------


def quantize_activation(
    x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
) -> Activation:
    """See `Schemes.quantize_activation`. One kernel, and one more with a `mul_scale`."""
    row = scheme_of(scheme)
    if scheme == "w4a8" and x.shape[-1] % W4A8_K:
        raise UsageError(
            f"K = {x.shape[-1]} in w4a8",
            needs=f"a multiple of {W4A8_K} for the W4A8 matmul of an NPU",
            fix="--step-policy default:w4a4, or keep this layer: --keep PATTERN",
            code="E-QNT-01",
        )
    if x.dtype not in ACTIVATION_DTYPES:
        raise UsageError(
            f"tokens of {x.dtype} for {scheme}",
            needs="bfloat16 or float16, which the quantizers of an NPU take",
            fix="--set dtype=bfloat16",
        )
    tokens = x.flatten(0, -2)
    if mul_scale is not None:
        tokens = torch.mul(tokens, mul_scale, out=torch.empty_like(tokens))  # float32, rounded once
    given = QUANTIZERS[row.activation](tokens, rule or row.rule)
    return Activation(row, tuple(x.shape[:-1]), x.shape[-1], x.dtype, *given)


def _per_token(tokens: Tensor, rule: str, **given: Any) -> tuple[Tensor, ...]:
    _only("amax", rule)
    qdata, scale = torch.ops.npu.npu_dynamic_quant(tokens, **given)
    return qdata, scale


def _mx(tokens: Tensor, rule: str, dst_type: int) -> tuple[Tensor, ...]:
    qdata, scale = torch.ops.npu.npu_dynamic_mx_quant(
        tokens, dst_type=dst_type, **scale_algorithm(rule, dst_type)
    )
    return qdata, scale


def _dual(tokens: Tensor, rule: str) -> tuple[Tensor, ...]:
    _only("floor", rule)
    qdata, level0, level1 = torch.ops.npu.npu_dynamic_dual_level_mx_quant(tokens)
    return qdata, level1, level0


QUANTIZERS: Mapping[str, Callable[[Tensor, str], tuple[Tensor, ...]]] = {
    "int8": _per_token,
    "fp8": lambda t, rule: _per_token(t, rule, dst_type=torch.float8_e4m3fn),
    "mxfp8": lambda t, rule: _mx(t, rule, FP8_E4M3),
    "mxfp4": lambda t, rule: _mx(t, rule, FP4_E2M1),
    "mxfp4_dualscale": _dual,
}


def scale_algorithm(rule: str, dst_type: int) -> dict[str, Any]:
    """A scale rule of `mx.formats` as arguments of npu_dynamic_mx_quant. UsageError for others."""
    if rule == "floor":
        return {"scale_alg": 0}
    if rule == "ceil" and dst_type == FP8_E4M3:
        return {"scale_alg": 1}
    if rule.startswith("max:") and dst_type == FP4_E2M1:
        return {"scale_alg": 2, "dst_type_max": float(rule.removeprefix("max:"))}
    raise _no_rule(rule, "floor, ceil" if dst_type == FP8_E4M3 else "floor, max:<6 to 12>")


def _only(known: str, rule: str) -> None:
    if rule != known:
        raise _no_rule(rule, known)


def _no_rule(rule: str, known: str) -> UsageError:
    return UsageError(
        f"scale rule {rule!r} for an activation on an NPU",
        needs=known,
        fix="leave the rule out",
    )


# ---- matmuls ------------------------------------------------------------------------------------


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`. One kernel."""
    return MATMULS[a.scheme.name](a, weight).view(*a.lead, weight.shape[0])


def _plain(a: Activation, w: PreparedWeight) -> Tensor:
    """int8 and fp8: one float32 scale a token, one a channel."""
    out: Tensor = torch.ops.npu.npu_quant_matmul(
        a.qdata, w.qdata, w.scale, pertoken_scale=a.scale, bias=w.bias, output_dtype=a.dtype
    )
    return out


def _block_scaled(a: Activation, w: PreparedWeight, bias: Tensor | None, **given: Any) -> Tensor:
    out: Tensor = torch.ops.npu.npu_quant_matmul(
        a.qdata,
        w.qdata,
        w.scale,
        pertoken_scale=a.scale,
        bias=bias,
        output_dtype=a.dtype,
        scale_dtype=SCALE_E8M0,
        pertoken_scale_dtype=SCALE_E8M0,
        **given,
    )
    return out


def _mxfp8(a: Activation, w: PreparedWeight) -> Tensor:
    return _block_scaled(a, w, w.bias, group_sizes=[1, 1, 32])


def _mxfp4(a: Activation, w: PreparedWeight) -> Tensor:
    return _block_scaled(a, w, w.bias, group_sizes=[1, 1, 32], x1_dtype=FP4_E2M1, x2_dtype=FP4_E2M1)


def _w4a8(a: Activation, w: PreparedWeight) -> Tensor:
    """The bias [1, N] has the dtype of the output here; bfloat16 was prepared."""
    bias = None if w.row_bias is None else w.row_bias.to(a.dtype)
    return _block_scaled(a, w, bias, group_sizes=[0, 0, 32], x2_dtype=FP4_E2M1)


def _dual_level(a: Activation, w: PreparedWeight) -> Tensor:
    out: Tensor = torch.ops.npu.npu_dual_level_quant_matmul(
        a.qdata, w.qdata, a.dual_scale, w.dual_scale, a.scale, w.scale, bias=w.bias, output_dtype=a.dtype
    )
    return out


MATMULS: Mapping[str, Callable[[Activation, PreparedWeight], Tensor]] = {
    "int8": _plain,
    "fp8": _plain,
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
    "mxfp4_dualscale": _dual_level,
    "w4a8": _w4a8,
}


def list_kernels(device: Device) -> tuple[QuantLinearKernel, ...]:
    """The schemes that this chip has a matmul for; the others are refused, or decoded where asked."""
    prepare = partial(prepare_weight, internal_format=partial(internal_format, device, True))
    return tuple(
        QuantLinearKernel(
            scheme,
            "npu",
            quantized_linear,
            "native: its own matmul",
            prepare=prepare,
            quantize_activation=quantize_activation,
            stored=stored,
        )
        for scheme in sorted(device.native_schemes)
    )
