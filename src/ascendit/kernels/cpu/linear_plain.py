"""Linear layers on codes on a CPU in plain PyTorch: without a compiler, or what tiles cannot hold.

- int8: `torch._int_mm` sums the products exactly.
- mxfp8, mxfp4 and w4a8 where oneDNN multiplies BF16: both sides decoded to BF16, which is exact. PyTorch
  rounds the sums before it adds a bias; so the bias goes in as three more columns of the weight, whose BF16
  numbers sum up to it, times tokens of 1. Then there is one rounding, as with a float32 bias.
- The rest (fp8, dual scales, tokens in other dtypes, numbers that BF16 does not have): decoded to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.mx import elements, scales
from ascendit.mx.encoded import Encoded
from ascendit.mx.formats import lookup
from ascendit.ops.quant_linear import (
    DECODED,
    REFERENCE,
    SCHEMES,
    Activation,
    Emulate,
    LinearChoice,
    LinearForm,
    PreparedWeight,
    quantize_activation,
)
from ascendit.ops.quant_linear import quantized_linear as reference_linear

if TYPE_CHECKING:
    from ascendit.device.backends import Device

LARGEST_INT_WIDTH = 1 << 16
"""Above this K sums of int8 products might leave int32."""
IN_BF16 = ("mxfp8", "mxfp4", "w4a8")
"""Schemes whose numbers are BF16, scales and all."""
MORE = 3
"""Columns for a float32 bias: 3 x 8 bits of mantissa."""


def forms(emulate: Emulate | None, why: str) -> Mapping[str, LinearChoice]:
    """All schemes; `why`: what the faster ones lack."""
    once = emulate == "decode-once"
    how = f"emulated: decoded {'once' if once else 'on each use'} to"
    wide = LinearChoice(DECODED if once else REFERENCE, f"{how} float32 by PyTorch, {why}")
    prepare = _prepare_decoded if once else REFERENCE.prepare_weight
    form = LinearForm("cpu", prepare, quantize_activation, quantized_linear, REFERENCE.stored)
    bf16 = LinearChoice(form, f"{how} BF16 by PyTorch, {why}")
    fast = IN_BF16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
    integers = replace(form, prepare_weight=REFERENCE.prepare_weight)
    found = {scheme: bf16 if scheme in fast else wide for scheme in SCHEMES}
    return found | {"int8": LinearChoice(integers, f"native: torch._int_mm, {why}")}


def _prepare_decoded(
    encoded: Encoded, bias: Tensor | None, device: Device, *, nz: bool = False
) -> PreparedWeight:
    weight = REFERENCE.prepare_weight(encoded, bias, device)
    return replace(weight, decoded=_weight_columns(weight))


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`. `weight.decoded` is what this form prepared, or None."""
    if a.scheme.name == "int8" and 1 < a.width <= LARGEST_INT_WIDTH:  # _int_mm errs at K = 1
        return _int8_linear(a, weight)
    if a.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        columns = _weight_columns(weight) if weight.decoded is None else weight.decoded
        tokens = None if columns is None else _bf16(a.codes, a.scale, a.scheme.activation, a.width)
        if columns is not None and tokens is not None:
            ones = tokens.new_ones(tokens.shape[0], columns.shape[1] - a.width)
            return F.linear(torch.cat((tokens, ones), 1), columns).view(*a.lead, weight.shape[0])
    return reference_linear(a, replace(weight, decoded=None))


def _int8_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """int32 sums, and then the scales of token and channel and the bias in float32."""
    sums = torch._int_mm(a.codes, weight.codes.t())
    out = sums.to(torch.float32).mul_(a.scale.view(-1, 1)).mul_(weight.scale.view(1, -1))
    if weight.bias is not None:
        out += weight.bias
    return out.to(a.dtype).view(*a.lead, weight.shape[0])


def _weight_columns(weight: PreparedWeight) -> Tensor | None:
    """bfloat16 [N, K], with a bias [N, K + 3]; None where that is not exact."""
    values = _bf16(weight.codes, weight.scale, weight.scheme, weight.shape[1])
    if values is None or weight.bias is None:
        return values
    left, parts = weight.bias, [values]
    for _ in range(MORE):
        parts.append(left.to(torch.bfloat16).unsqueeze(1))
        left = left - parts[-1].squeeze(1).to(torch.float32)
    return torch.cat(parts, 1) if not bool(left.any()) else None


def _bf16(codes: Tensor, scale: Tensor, name: str, width: int) -> Tensor | None:
    """As `mx.decode`, bfloat16 [rows, width]; None where a block may hold a number that is none."""
    form = lookup(name)
    if form.kind != "block" or form.element is None or width % form.block:
        return None
    first = 1 - (form.element.emin - form.element.mbits)
    last = 2 * scales.BIAS - form.element.emax
    odd = (scale < first) | (scale > last)
    if bool((odd & (scale != scales.NAN_BYTE)).any()):
        return None
    if form.packed:
        values = elements.values_of(codes, form.element, width).to(torch.bfloat16)
    else:
        values = codes.view(torch.float8_e4m3fn).to(torch.bfloat16)
    powers = scales.from_bytes(scale).to(torch.bfloat16)
    return values.view(-1, form.block).mul_(powers.view(-1, 1)).view(-1, width)
