"""Quantized linear layers with the matmuls of an Ascend NPU; the contract is in `kernels/reference.py`.

`prepare_weight` converts the layouts once: a weight [N, K] and its paired scales [N, K / 64, 2] become
transposed views (a contiguous scale is refused), packed FP4 is uint8, level 0 of the dual scale is
[K / 512, N], the bias is float32. FRACTAL_NZ is a separate cast; it may not be sliced or copied afterwards.

Every call passes its dtypes: E8M0 scales are uint8, which CANN misreads without `scale_dtype`; without
`output_dtype` the result is int8; FP4 is the number 296, since torch_npu allocates twice the length for
torch.float4_e2m1fn_x2; and `x1_dtype` is for packed bytes only, never for float8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.device.device import Device
from ascendit.device.limits import check_dtype, check_rule, check_w4a8, check_weight
from ascendit.device.operator_support import capability
from ascendit.errors import EnvironmentProblem
from ascendit.kernels.kernel import Activation, PreparedWeight, QuantLinearKernel
from ascendit.kernels.reference import INT8_TILE
from ascendit.mx import layouts
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import lookup
from ascendit.ops.open_device import internal_format
from ascendit.quant.schemes import scheme_of
from ascendit.twin.contract import FP4_E2M1, FP8_E4M3, SCALE_E8M0
from ascendit.twin.nz import FRACTAL_NZ, ND

NZ_SCHEMES = ("int8", "mxfp8", "mxfp4")
"""Schemes that may use FRACTAL_NZ. mxfp4_dualscale always does; for fp8 it is not documented."""


# ---- weights ------------------------------------------------------------------------------------


def prepare_weight(
    encoded: Encoded,
    bias: Tensor | None,
    device: torch.device,
    *,
    nz: bool = False,
    internal_format: Callable[[], AbstractContextManager[Any]],
) -> PreparedWeight:
    """See `Schemes.prepare_weight`. Dual-scale weights are always FRACTAL_NZ, which their matmul requires.

    `internal_format`: context that allows FRACTAL_NZ during the cast. Raises UsageError (E-QNT-01) for a
    shape that the matmul does not support, before anything is moved; EnvironmentProblem (E-CAP-01) if the
    cast fails.
    """
    scheme = encoded.format
    check_weight(scheme, *encoded.shape)
    qdata = encoded.qdata.to(device)
    qdata = qdata.view(getattr(torch, lookup(scheme).qdata_dtype))
    scale, dual = _scales(encoded)
    scale = scale.to(device)
    if scheme == "mxfp4_dualscale" or (nz and scheme in NZ_SCHEMES):
        qdata = _to_nz(qdata, internal_format)
    if scheme != "mxfp4_dualscale":
        qdata = qdata.transpose(0, 1)
        scale = scale.transpose(0, 1) if scale.dim() == 3 else scale
    bias = None if bias is None else bias.to(device, torch.float32)
    row = bias.to(torch.bfloat16).view(1, -1) if bias is not None and scheme == "mxfp4" else None
    n, k = encoded.shape
    return PreparedWeight(
        scheme, (n, k), qdata, scale, None if dual is None else dual.to(device), bias=bias, row_bias=row
    )


def stored(weight: PreparedWeight) -> Encoded:
    """The inverse of `prepare_weight`: qdata [N, K] and scales, in dtypes and layout as on disk."""
    qdata, scale = weight.qdata, weight.scale
    if weight.scheme != "mxfp4_dualscale":
        qdata = qdata.transpose(0, 1)
        scale = scale.transpose(0, 1) if scale.dim() == 3 else scale
    if int(torch.ops.npu.get_npu_format(qdata)) == FRACTAL_NZ:  # after transposing back: a5 refuses a view
        qdata = torch.ops.npu.npu_format_cast(qdata, ND)
    fmt = lookup(weight.scheme)
    qdata = qdata.contiguous().view(getattr(torch, fmt.qdata_dtype))
    if fmt.kind == "row":
        return Encoded(qdata, scale.view(-1, 1), None, weight.scheme, -1, weight.shape)
    unpaired = layouts.from_pairs(scale, -(-weight.shape[1] // 32))
    dual = None if weight.dual_scale is None else layouts.from_npu_dual(weight.dual_scale)
    return Encoded(qdata, unpaired, dual, weight.scheme, -1, weight.shape)


def _scales(encoded: Encoded) -> tuple[Tensor, Tensor | None]:
    """float32 [N]; for MX pairs [N, K / 64, 2], padded with byte 0, and level 0 as [K / 512, N]."""
    if lookup(encoded.format).kind == "row":
        return encoded.scale.flatten(), None
    dual = None if encoded.dual_scale is None else layouts.to_npu_dual(encoded.dual_scale)
    return layouts.to_pairs(encoded.scale), dual


def _to_nz(qdata: Tensor, internal_format: Callable[[], AbstractContextManager[Any]]) -> Tensor:
    """Cast to FRACTAL_NZ. Packed FP4 is cast as int8: a cast of uint8 would block it as 8-bit elements."""
    options: dict[str, Any] = {}
    if qdata.dtype == torch.uint8:
        qdata, options = qdata.view(torch.int8), {"customize_dtype": torch.int8}
    with internal_format():
        cast: Tensor = torch.ops.npu.npu_format_cast(qdata, FRACTAL_NZ, **options)
    if (layout := int(torch.ops.npu.get_npu_format(cast))) != FRACTAL_NZ:
        raise EnvironmentProblem(
            f"npu_format_cast of a weight {tuple(qdata.shape)} returned format {layout}",
            needs="format 29 (FRACTAL_NZ)",
            fix="nz=False: only mxfp4_dualscale needs this format; if it does, run ascendit doctor",
            code="E-CAP-01",
        )
    return cast


# ---- activations --------------------------------------------------------------------------------


def quantize_activation(
    x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
) -> Activation:
    """See `Schemes.quantize_activation`. One kernel, two with `mul_scale`.

    Raises UsageError: E-QNT-01 for a K that W4A8 does not support, E-USE-01 for another dtype or scale rule.
    """
    resolved = scheme_of(scheme)
    if scheme == "w4a8":
        check_w4a8(x.shape[-1])
    check_dtype(scheme, str(x.dtype).removeprefix("torch."))
    check_rule(scheme, rule or resolved.rule)
    quantized = QUANTIZERS[resolved.activation](_smoothed(x, mul_scale), rule or resolved.rule)
    return Activation(resolved, tuple(x.shape[:-1]), x.shape[-1], x.dtype, *quantized)


def _smoothed(x: Tensor, mul_scale: Tensor | None) -> Tensor:
    """x [.., K] as rows [M, K], times `mul_scale` [K] in float32 and rounded once."""
    rows = x.flatten(0, -2)
    return rows if mul_scale is None else torch.mul(rows, mul_scale, out=torch.empty_like(rows))


def _per_token(rows: Tensor, rule: str, **options: Any) -> tuple[Tensor, ...]:
    qdata, scale = torch.ops.npu.npu_dynamic_quant(rows, **options)
    return qdata, scale


def _mx(rows: Tensor, rule: str, dst_type: int) -> tuple[Tensor, ...]:
    qdata, scale = torch.ops.npu.npu_dynamic_mx_quant(
        rows, dst_type=dst_type, **scale_algorithm(rule, dst_type)
    )
    return qdata, scale


def _dual(rows: Tensor, rule: str) -> tuple[Tensor, ...]:
    qdata, level0, level1 = torch.ops.npu.npu_dynamic_dual_level_mx_quant(rows)
    return qdata, level1, level0


QUANTIZERS: Mapping[str, Callable[[Tensor, str], tuple[Tensor, ...]]] = {
    "int8": _per_token,
    "fp8": lambda t, rule: _per_token(t, rule, dst_type=torch.float8_e4m3fn),
    "mxfp8": lambda t, rule: _mx(t, rule, FP8_E4M3),
    "mxfp4": lambda t, rule: _mx(t, rule, FP4_E2M1),
    "mxfp4_dualscale": _dual,
}


def scale_algorithm(rule: str, dst_type: int) -> dict[str, Any]:
    """Arguments of npu_dynamic_mx_quant for a scale rule that `device.limits` allows."""
    if rule.startswith("max:") and dst_type == FP4_E2M1:
        return {"scale_alg": 2, "dst_type_max": float(rule.removeprefix("max:"))}
    return {"scale_alg": {"floor": 0, "ceil": 1}[rule]}


# ---- matmuls ------------------------------------------------------------------------------------


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`. One kernel."""
    return MATMULS[a.scheme.name](a, weight).view(*a.lead, weight.shape[0])


def _per_channel(a: Activation, w: PreparedWeight) -> Tensor:
    """int8 and fp8: one float32 scale per token and per output channel."""
    out: Tensor = torch.ops.npu.npu_quant_matmul(
        a.qdata, w.qdata, w.scale, pertoken_scale=a.scale, bias=w.bias, output_dtype=a.dtype
    )
    return out


def _block_scaled(a: Activation, w: PreparedWeight, bias: Tensor | None, **options: Any) -> Tensor:
    out: Tensor = torch.ops.npu.npu_quant_matmul(
        a.qdata,
        w.qdata,
        w.scale,
        pertoken_scale=a.scale,
        bias=bias,
        output_dtype=a.dtype,
        scale_dtype=SCALE_E8M0,
        pertoken_scale_dtype=SCALE_E8M0,
        **options,
    )
    return out


def _mxfp8(a: Activation, w: PreparedWeight) -> Tensor:
    return _block_scaled(a, w, w.bias, group_sizes=[1, 1, 32])


def _mxfp4(a: Activation, w: PreparedWeight) -> Tensor:
    return _block_scaled(a, w, w.bias, group_sizes=[1, 1, 32], x1_dtype=FP4_E2M1, x2_dtype=FP4_E2M1)


def _w4a8(a: Activation, w: PreparedWeight) -> Tensor:
    """The bias [1, N] must have the dtype of the output; it was prepared as bfloat16."""
    bias = None if w.row_bias is None else w.row_bias.to(a.dtype)
    return _block_scaled(a, w, bias, group_sizes=[0, 0, 32], x2_dtype=FP4_E2M1)


def _dual_level(a: Activation, w: PreparedWeight) -> Tensor:
    out: Tensor = torch.ops.npu.npu_dual_level_quant_matmul(
        a.qdata, w.qdata, a.dual_scale, w.dual_scale, a.scale, w.scale, bias=w.bias, output_dtype=a.dtype
    )
    return out


MATMULS: Mapping[str, Callable[[Activation, PreparedWeight], Tensor]] = {
    "int8": _per_channel,
    "fp8": _per_channel,
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
    "mxfp4_dualscale": _dual_level,
    "w4a8": _w4a8,
}


# ---- int8 with one scale per 128 x 128 ----------------------------------------------------------


@dataclass(frozen=True)
class TileMatmul:
    """The kernel of int8_block: npu_quant_matmul with group_sizes [1, 128, 128]; the output is bfloat16.

    No chip accepts an int8 activation with one scale per 128 x 128 values: each scale is repeated for its 128
    rows. a2 and a3 require K in multiples of 512, N in multiples of 256 and a bias, so qdata, scales and bias
    are padded with zeros. Only a5 has an operator that quantizes 128 x 128 values; a2 and a3 use PyTorch.
    """

    chip: str

    @property
    def multiples(self) -> tuple[int, int]:
        """The multiples of (N, K) that the chip requires."""
        return (256, 512) if self.restricted else (1, 1)

    @property
    def restricted(self) -> bool:
        """Whether the chip requires a bias and multiples of N and K."""
        return self.chip != "a5"

    @property
    def has_quantizer(self) -> bool:
        """Whether the chip has an operator that quantizes 128 x 128 values."""
        return capability("npu_dynamic_block_quant", "int8_block").support_on(self.chip) == "yes"

    def kernel(self, scheme: str) -> QuantLinearKernel:
        quantizer = "npu_dynamic_block_quant" if self.has_quantizer else "PyTorch"
        return QuantLinearKernel(
            scheme,
            "npu",
            self.quantized_linear,
            f"native: NPU matmul in blocks of 128 x 128, activation quantized by {quantizer}",
            prepare=self.prepare_weight,
            quantize_activation=self.quantize_activation,
            stored=self.stored,
        )

    def prepare_weight(
        self, encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
    ) -> PreparedWeight:
        """int8 [K, N] and float32 scale [K / 128, N / 128] as transposed views; bias float32 [N].

        `nz` is ignored: this matmul does not take FRACTAL_NZ.
        """
        (n, k), (rows, columns) = encoded.shape, map(_padded_size, encoded.shape, self.multiples)
        qdata = _padded(encoded.qdata.to(device), rows, columns)
        scale = _padded(encoded.scale.to(device), -(-rows // INT8_TILE), -(-columns // INT8_TILE))
        if bias is not None or self.restricted:
            values = torch.zeros(n) if bias is None else bias
            bias = F.pad(values.to(device, torch.float32), (0, rows - n))
        return PreparedWeight(encoded.format, (n, k), qdata.t(), scale.t(), bias=bias)

    def stored(self, weight: PreparedWeight) -> Encoded:
        """The inverse of `prepare_weight`: int8 [N, K] and float32 scale [ceil(N / 128), ceil(K / 128)]."""
        n, k = weight.shape
        qdata = weight.qdata.t()[:n, :k].contiguous()
        scale = weight.scale.t()[: -(-n // INT8_TILE), : -(-k // INT8_TILE)].contiguous()
        return Encoded(qdata, scale, None, weight.scheme, -1, weight.shape)

    def quantize_activation(
        self, x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
    ) -> Activation:
        """See `Schemes.quantize_activation`. int8 [M, K], float32 scale [M, ceil(K / 128)], padded along K.

        Raises UsageError (E-USE-01) for any other dtype than bfloat16, or any other scale rule.
        """
        resolved = scheme_of(scheme)
        check_dtype(scheme, str(x.dtype).removeprefix("torch."))
        check_rule(scheme, rule or resolved.rule)
        rows = _smoothed(x, mul_scale)
        (m, k), columns = rows.shape, _padded_size(x.shape[-1], self.multiples[1])
        if self.has_quantizer:
            qdata, scale = torch.ops.npu.npu_dynamic_block_quant(
                rows, dst_type=torch.int8, row_block_size=INT8_TILE, col_block_size=INT8_TILE
            )
        else:
            qdata, scale = _quantize_tiles(rows, columns)
        scale = scale.unsqueeze(1).expand(-1, INT8_TILE, -1).flatten(0, 1)[:m].contiguous()
        return Activation(resolved, tuple(x.shape[:-1]), k, x.dtype, qdata, scale)

    def quantized_linear(self, a: Activation, weight: PreparedWeight) -> Tensor:
        """See `Schemes.quantized_linear`. Runs one kernel."""
        out: Tensor = torch.ops.npu.npu_quant_matmul(
            a.qdata,
            weight.qdata,
            weight.scale,
            pertoken_scale=a.scale,
            bias=weight.bias,
            output_dtype=a.dtype,
            group_sizes=[1, INT8_TILE, INT8_TILE],
        )
        return out[:, : weight.shape[0]].reshape(*a.lead, weight.shape[0])


def _quantize_tiles(rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """bfloat16 [M, K] -> int8 [M, columns], float32 [ceil(M / 128), ceil(columns / 128)]; padded with zeros.

    The numbers of `mx.encode` with fewer kernels: only `abs`, `amax`, the cast, the division, `round` and the
    cast to int8 run on the complete activation.
    """
    m, tile = len(rows), INT8_TILE
    padded = _padded(rows, _padded_size(m, tile), _padded_size(columns, tile))
    tiles = padded.unflatten(1, (-1, tile)).unflatten(0, (padded.shape[0] // tile, tile))
    scale = tiles.abs().amax((1, 3), keepdim=True).to(torch.float32) / 127
    scale = scale.where(scale.isfinite(), torch.nan)
    steps = (tiles.to(torch.float32) / scale.where(scale != 0, 1)).round_()
    qdata = steps.to(torch.int8).flatten(2).flatten(0, 1)
    return qdata[:m, :columns], scale.flatten(2).squeeze(1)


def _padded_size(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(t: Tensor, rows: int, columns: int) -> Tensor:
    """A matrix padded with zeros to [rows, columns]; `t` if it has that shape, where F.pad would copy it."""
    below, right = rows - t.shape[0], columns - t.shape[1]
    return F.pad(t, (0, right, 0, below)) if below or right else t


def list_kernels(device: Device) -> tuple[QuantLinearKernel, ...]:
    """One kernel for each scheme that this chip has a matmul for; others are refused or emulated."""
    prepare = partial(prepare_weight, internal_format=partial(internal_format, device, True))
    return tuple(
        TileMatmul(str(device.chip)).kernel(scheme)
        if lookup(scheme_of(scheme).weight).tile
        else QuantLinearKernel(
            scheme,
            "npu",
            quantized_linear,
            "native: NPU matmul",
            prepare=prepare,
            quantize_activation=quantize_activation,
            stored=stored,
        )
        for scheme in sorted(device.native_schemes)
    )
