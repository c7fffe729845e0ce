"""encode and decode, the reference in plain PyTorch. `formats` says what there is.

Rules that hold for every format:

- Blocks lie along `axis`; a last block or group that is short is filled up with zeros, which are not stored.
- Codes are packed along `axis` too: `encode(x, f, axis=a)` is `encode(x.movedim(a, -1), f)` moved back.
- A block, row or group of zeros decodes to zeros. A block or row with an infinity or a NaN decodes to NaN.
- Numbers beyond the largest element saturate. A code that was rounded up to 2^128 decodes to infinity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx import elements, msms, scales
from ascendit.mx.encoded import Encoded, checked_axis
from ascendit.mx.formats import E2M1, Format, lookup, resolve_rounding, resolve_rule

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def encode(
    x: Tensor, format: str, *, axis: int = -1, scale_rule: str | None = None, rounding: str | None = None
) -> Encoded:
    """Codes and scales of `x`, a bfloat16, float16 or float32 tensor of any shape with at least one axis.

    `format`: a name in `formats.FORMATS`. `scale_rule`: one of its rules, the first by default.
    `rounding`: rint (default), half_away, floor; msModelSlim's rules bring their own.
    Float16 is taken as it is, where the NPU makes it bfloat16 first (other ties of max:6 and max:7).
    UsageError E-USE-01 for a name, rule, rounding, dtype or axis that does not go together.
    """
    form = lookup(format)
    rule = resolve_rule(form, scale_rule)
    mode = resolve_rounding(form, rule, rounding)
    _check_input(x, form, rule)
    last = checked_axis(axis, x.ndim)
    if not x.shape[last]:
        raise UsageError(
            f"axis {axis} of a tensor {tuple(x.shape)}: nothing lies along it",
            needs="at least one value",
            fix="leave empty tensors out",
            code="E-USE-01",
        )
    rows = x.detach().movedim(last, -1).contiguous()
    dual = None
    if form.kind == "block":
        codes, scale = _encode_blocks(rows, form, rule, mode)
    elif form.kind == "dual":
        codes, scale, dual = _encode_dual(rows, form, rule, mode)
        dual = dual.movedim(-1, last).contiguous().unsqueeze(-1)
    else:
        codes, scale = _encode_rows(rows, form, rule, mode)
    if form.packed:
        codes = elements.pack(codes)
    codes = codes.movedim(-1, last).contiguous().view(getattr(torch, form.codes_dtype))
    return Encoded(codes, scale.movedim(-1, last).contiguous(), dual, format, axis, tuple(x.shape))


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values, computed in float32 and rounded once to `dtype`: code x scale, and then x dual_scale.

    Exact for MX formats in bfloat16 and float32, unless the number leaves their range.
    """
    form = lookup(encoded.format)
    if form.kind == "tile":
        return _decode_tiles(encoded, form).to(dtype)
    last = encoded.axis % len(encoded.shape)
    length = encoded.shape[last]
    codes = encoded.codes.movedim(last, -1)
    scale = encoded.scale.movedim(last, -1)
    if form.element is None:
        values = codes.to(torch.float32)
    else:
        raw = codes.contiguous().view(torch.uint8)
        values = elements.to_values(elements.unpack(raw, length) if form.packed else raw, form.element)
    if form.kind == "row":
        values = values * scale
    else:
        blocks = scales.split_blocks(values, form.block) * scales.from_bytes(scale).unsqueeze(-1)
        values = scales.join_blocks(blocks, length)
    if encoded.dual_scale is not None:
        groups = scales.split_blocks(values, form.coarse)
        dual = encoded.dual_scale.squeeze(-1).movedim(last, -1)
        values = scales.join_blocks(groups * dual.unsqueeze(-1), length)
    return values.to(dtype).movedim(-1, last).contiguous()


def sqnr(a: Tensor, b: Tensor) -> float:
    """Signal to quantization noise in dB, `a` being the signal: 10 log10(sum a^2 / sum (a - b)^2).

    inf if they are equal, -inf if only `a` is zero, nan if one of them is not finite. Sums are float32.
    """
    wide, other = a.detach().to(torch.float32), b.detach().to(torch.float32)
    if wide.shape != other.shape:
        raise UsageError(
            f"tensors of shape {tuple(a.shape)} and {tuple(b.shape)}",
            needs="the same shape",
            fix="compare the decoded tensor with the one that was encoded",
            code="E-USE-01",
        )
    noise = wide - other
    if not bool(noise.isfinite().all()):
        return math.nan
    signal_power, noise_power = _power(wide), _power(noise)
    if noise_power == -math.inf:
        return math.inf
    return signal_power - noise_power


def _power(x: Tensor) -> float:
    """10 log10(sum x^2), safe from overflow and underflow of the squares."""
    top = float(x.abs().max()) if x.numel() else 0.0
    if top == 0.0:
        return -math.inf
    return 20 * math.log10(top) + 10 * math.log10(float((x / top).square().sum()))


# ---- encoding -----------------------------------------------------------------------------------


def _encode_blocks(rows: Tensor, form: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    """[.., K] -> uint8 codes [.., K] and E8M0 bytes [.., n]."""
    assert form.element is not None
    blocks = scales.split_blocks(rows, form.block)
    finite = blocks.isfinite().all(-1)
    blocks = blocks.where(finite.unsqueeze(-1), 0)
    if rule.startswith("msms:"):
        codes, exponents = msms.encode_blocks(blocks, form.element, rule.removeprefix("msms:"))
    else:
        wide = blocks.to(torch.float32)
        exponents = scales.shared_exponents(wide.abs().amax(-1), form.element, rule)
        scaled = wide * scales.power_of_two(-exponents).unsqueeze(-1)
        codes = elements.to_codes(scaled, form.element, rounding)
    return _finish(codes, exponents, finite, form, rows.shape[-1])


def _finish(
    codes: Tensor, exponents: Tensor, finite: Tensor, form: Format, length: int
) -> tuple[Tensor, Tensor]:
    """Codes of blocks that are not `finite` to NaN, blocks to rows, exponents to bytes."""
    assert form.element is not None
    codes = codes.where(finite.unsqueeze(-1), form.element.nan or 0)
    return scales.join_blocks(codes, length), scales.to_bytes(exponents, finite)


def _encode_dual(rows: Tensor, form: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor, Tensor]:
    """[.., K] -> uint8 codes [.., K], E8M0 bytes [.., n], float32 [.., ceil(K / 512)].

    `floor` is npu_dynamic_dual_level_mx_quant: amax over the finite values of 512, times float32(1 / 6), 0 if
    that is subnormal; values divided by it, rounded to the dtype of the input, 0 if it is 0; then
    `floor` on blocks of 32. A block with an infinity or a NaN gets byte 255, its 15 neighbours do not see it.
    """
    length = rows.shape[-1]
    finite = scales.split_blocks(rows, form.block).isfinite().all(-1)
    if rule == "msms:dualscale":
        clean = rows.where(rows.isfinite(), 0)
        codes, exponents, dual = msms.encode_dual(clean, form.coarse, form.block)
    else:
        groups = scales.split_blocks(rows.where(rows.isfinite(), 0).to(torch.float32), form.coarse)
        dual = groups.abs().amax(-1) * (1 / 6)
        dual = torch.where(dual < 2.0**-126, 0.0, dual)
        divided = groups / torch.where(dual == 0, torch.inf, dual).unsqueeze(-1)
        wide = scales.join_blocks(divided, length).to(rows.dtype).to(torch.float32)
        blocks = scales.split_blocks(wide, form.block)
        exponents = scales.shared_exponents(blocks.abs().amax(-1), E2M1, rule)
        scaled = blocks * scales.power_of_two(-exponents).unsqueeze(-1)
        codes = elements.to_codes(scaled, E2M1, rounding)
    return (*_finish(codes, exponents, finite, form, length), dual)


def _encode_rows(rows: Tensor, form: Format, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    """[.., K] -> int8 or uint8 codes [.., K] and float32 scale [.., 1].

    `amax` is npu_dynamic_quant on A5: scale = amax x float32(1 / 127) or (1 / 448), code = round(x / scale).
    On A2 and A3 one code in 6000 differs by 1. A row of zeros has scale 0, one that is not finite scale NaN.
    """
    finite = rows.isfinite().all(-1, keepdim=True)
    rows = rows.where(finite, 0)
    if rule.startswith("msms:"):
        codes, scale = msms.encode_int8(rows, -127 if rule.endswith("legacy") else -128)
        return codes, scale.where(finite, torch.nan)
    wide = rows.to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True) * (1 / (form.element.max if form.element else 127))
    steps = wide / torch.where(scale == 0, torch.inf, scale)
    if form.element is None:
        codes = _round(steps, rounding).clamp(-128, 127).to(torch.int8)
    else:
        codes = elements.to_codes(steps, form.element, rounding).where(finite, form.element.nan or 0)
    return codes, scale.where(finite, torch.nan)


def _round(steps: Tensor, rounding: str) -> Tensor:
    """float32 to whole numbers, see `formats.ROUNDINGS`."""
    if rounding == "rint":
        return torch.round(steps)
    if rounding == "floor":
        return torch.floor(steps)
    whole = steps.trunc()
    return whole + ((steps - whole).abs() >= 0.5).to(steps.dtype) * steps.sign()


def _decode_tiles(encoded: Encoded, form: Format) -> Tensor:
    """FP8 checkpoints with `weight_scale_inv`: code x scale of its tile; the last tiles may be short."""
    assert form.element is not None
    values = elements.to_values(encoded.codes.view(torch.uint8), form.element)
    scale = encoded.scale
    for axis, length in enumerate(encoded.shape):
        scale = scale.repeat_interleave(form.block, axis).narrow(axis, 0, length)
    return values * scale


# ---- checks -------------------------------------------------------------------------------------


def _check_input(x: Tensor, form: Format, rule: str) -> None:
    allowed = (torch.bfloat16, torch.float32) if rule.startswith("msms:") else INPUT_DTYPES
    if form.kind == "tile":
        raise UsageError(
            f"encode to {form.name}",
            needs="a format that is written: this one is only read",
            fix="use fp8 (one scale per row) or mxfp8",
            code="E-USE-01",
        )
    if x.dtype not in allowed:
        raise UsageError(
            f"a tensor of {x.dtype} for {form.name} with scale rule {rule!r}",
            needs=f"one of {', '.join(str(d).removeprefix('torch.') for d in allowed)}",
            fix="convert it first, so that the rounding is yours",
            code="E-USE-01",
        )
