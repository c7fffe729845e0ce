"""Encode a tensor into codes and scales, decode it, and measure the error.

`formats` is the table of formats, `reference` defines their codes, `encoder` makes them fast. Everywhere:

- Blocks run along `axis`; a short last block or group is padded with zeros, which are not stored.
- Codes are packed along `axis` too: `encode(x, f, axis=a)` is `encode(x.movedim(a, -1), f)` moved back.
- A block, row or group of zeros decodes to zeros. A block or row with an infinity or a NaN decodes to NaN.
- Numbers beyond the largest element saturate. A code that was rounded up to 2^128 decodes to infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx import elements, encoder, scales
from ascendit.mx.formats import Format, lookup, resolve_rounding, resolve_rule

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tensor as codes and scales. For `axis=-1` and a weight [N, K] these are the tensors of a checkpoint.

    `codes`: [.., K], packed formats [.., ceil(K / 2)]; int8, float8_e4m3fn, float8_e5m2 or uint8 as the
    format says (float8 codes are also taken as uint8).
    `scale`: E8M0 uint8 [.., ceil(K / 32)]; int8 and fp8: float32 [.., 1]; fp8_128x128: float32
    [ceil(N / 128), ceil(K / 128)].
    `dual_scale`: float32 [.., ceil(K / 512), 1] for mxfp4_dualscale, else None.
    `shape` is that of the decoded tensor, `axis` the one along which blocks run, of length K.
    UsageError E-USE-01 if shapes or dtypes disagree.
    """

    qdata: Tensor
    scale: Tensor
    dual_scale: Tensor | None
    format: str
    axis: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        form = lookup(self.format)
        axis = checked_axis(self.axis, len(self.shape))
        object.__setattr__(self, "shape", tuple(self.shape))
        wanted = zip(("qdata", "scale", "dual_scale"), form.shapes(self.shape, axis), strict=True)
        dtypes = {
            "qdata": (getattr(torch, form.qdata_dtype), torch.int8 if form.element is None else torch.uint8),
            "scale": (torch.uint8,) if form.kind in ("block", "dual") else (torch.float32,),
            "dual_scale": (torch.float32,),
        }
        for name, shape in wanted:
            tensor: Tensor | None = getattr(self, name)
            found = None if tensor is None else tuple(tensor.shape)
            if found != shape or (tensor is not None and tensor.dtype not in dtypes[name]):
                dtype = "" if tensor is None else tensor.dtype
                raise UsageError(
                    f"{name} {found} {dtype} for {self.format} of {self.shape}",
                    needs=f"{name} {shape} of {' or '.join(map(str, dtypes[name]))}",
                    fix="give the tensors as mx.encode returns them; mx.layouts undoes devices' layouts",
                )


def checked_axis(axis: int, ndim: int) -> int:
    """`axis` counted from the front. UsageError E-USE-01 if there is no such axis."""
    if not -ndim <= axis < ndim:
        raise UsageError(
            f"axis {axis} of a tensor with {ndim} axes",
            needs=f"{-ndim} to {ndim - 1}" if ndim else "a tensor with at least one axis",
            fix="the axis is the one that the matmul sums over, -1 for a weight [N, K]",
        )
    return axis % ndim


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
    check_dtype(x.dtype, form, rule)
    last = checked_axis(axis, x.ndim)
    if not x.shape[last]:
        raise UsageError(
            f"axis {axis} of a tensor {tuple(x.shape)}: nothing lies along it",
            needs="at least one value",
            fix="leave empty tensors out",
        )
    parts = encoder.encode_rows(x.detach().movedim(last, -1).contiguous(), form, rule, mode)
    qdata, scale, dual = (None if p is None else p.movedim(-1, last).contiguous() for p in parts)
    assert qdata is not None and scale is not None
    qdata = qdata.view(getattr(torch, form.qdata_dtype))
    return Encoded(qdata, scale, None if dual is None else dual.unsqueeze(-1), format, axis, tuple(x.shape))


def check_dtype(dtype: torch.dtype, form: Format, rule: str) -> None:
    """UsageError E-USE-01 if a tensor of this dtype cannot be encoded so."""
    allowed = (torch.bfloat16, torch.float32) if rule.startswith("msms:") else INPUT_DTYPES
    if form.kind == "tile":
        raise UsageError(
            f"encode to {form.name}",
            needs="a format that is written: this one is only read",
            fix="use fp8 (one scale per row) or mxfp8",
        )
    if dtype not in allowed:
        raise UsageError(
            f"a tensor of {dtype} for {form.name} with scale rule {rule!r}",
            needs=f"one of {', '.join(str(d).removeprefix('torch.') for d in allowed)}",
            fix="convert it first, so that the rounding is yours",
        )


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values, computed in float32 and rounded once to `dtype`: code x scale, and then x dual_scale.

    Exact for MX formats in bfloat16 and float32, unless the number leaves their range.
    """
    form = lookup(encoded.format)
    if form.kind == "tile":
        return _decode_tiles(encoded, form).to(dtype)
    last = encoded.axis % len(encoded.shape)
    length = encoded.shape[last]
    qdata = encoded.qdata.movedim(last, -1)
    scale = encoded.scale.movedim(last, -1)
    if form.element is None:
        values = qdata.to(torch.float32)
    else:
        raw = qdata.contiguous().view(torch.uint8)
        values = elements.decode_stored(raw, form.element, length)
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


def _decode_tiles(encoded: Encoded, form: Format) -> Tensor:
    """FP8 checkpoints with `weight_scale_inv`: code x scale of its tile; the last tiles may be short."""
    assert form.element is not None
    values = elements.decode_stored(encoded.qdata.view(torch.uint8), form.element, encoded.shape[-1])
    scale = encoded.scale
    for axis, length in enumerate(encoded.shape):
        scale = scale.repeat_interleave(form.block, axis).narrow(axis, 0, length)
    return values * scale


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
        )
    noise = wide - other
    if not bool(noise.isfinite().all()):
        return math.nan
    return decibels(_energy(wide), _energy(noise))


def _energy(x: Tensor) -> float:
    """sum x^2 of float32 values, safe from overflow and underflow of the squares."""
    top = float(x.abs().max()) if x.numel() else 0.0
    return top**2 * float((x / top).square().sum()) if top else 0.0


def decibels(signal: float, noise: float, *, cap: float = math.inf) -> float:
    """10 log10(signal / noise) of two powers, within [-cap, cap]; NaN if one of them is not finite.

    No noise gives `cap`, even without a signal; noise without a signal gives -cap.
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise <= 0:
        return cap
    ratio = signal / noise
    return max(-cap, min(cap, 10 * math.log10(ratio))) if ratio > 0 else -cap
