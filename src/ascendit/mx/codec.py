"""Encode a tensor into quantized values and scales, decode it, and measure the error.

`formats` is the table of formats, `reference` defines their numbers, `encoder` has the fast paths. Always:

- Blocks run along `axis`; a partial last block or group is padded with zeros, which are not stored.
- FP4 is packed along `axis` too: `encode(x, f, axis=a)` is `encode(x.movedim(a, -1), f)` moved back.
- A block, row or group of zeros decodes to zeros. A block or row with an infinity or a NaN decodes to NaN.
- Values beyond the largest element saturate. A value that is rounded up to 2^128 decodes to infinity.
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
    """A quantized tensor and its scales. For a weight [N, K] and `axis=-1`: the tensors of a checkpoint.

    `qdata`: [.., K], packed formats [.., ceil(K / 2)]; int8, float8_e4m3fn, float8_e5m2 or uint8, depending
    on the format (float8 may also be passed as uint8).
    `scale`: E8M0 uint8 [.., ceil(K / 32)]; int8 and fp8: float32 [.., 1]; tiles: float32
    [ceil(N / 128), ceil(K / 128)].
    `dual_scale`: float32 [.., ceil(K / 512), 1] for mxfp4_dualscale, else None.
    `shape`: shape of the decoded tensor. `axis`: the axis that blocks run along, of length K.
    Raises UsageError (E-USE-01) if a shape or dtype does not match the format.
    """

    qdata: Tensor
    scale: Tensor
    dual_scale: Tensor | None
    format: str
    axis: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        fmt = lookup(self.format)
        axis = checked_axis(self.axis, len(self.shape))
        object.__setattr__(self, "shape", tuple(self.shape))
        expected = zip(("qdata", "scale", "dual_scale"), fmt.shapes(self.shape, axis), strict=True)
        dtypes = {
            "qdata": (getattr(torch, fmt.qdata_dtype), torch.int8 if fmt.element is None else torch.uint8),
            "scale": (getattr(torch, fmt.scale_dtype),),
            "dual_scale": (torch.float32,),
        }
        for name, shape in expected:
            tensor: Tensor | None = getattr(self, name)
            actual = None if tensor is None else tuple(tensor.shape)
            if actual != shape or (tensor is not None and tensor.dtype not in dtypes[name]):
                dtype = "" if tensor is None else tensor.dtype
                raise UsageError(
                    f"{name} {actual} {dtype} for {self.format} of {self.shape}",
                    needs=f"{name} {shape} of {' or '.join(dict.fromkeys(map(str, dtypes[name])))}",
                    fix="pass the tensors as mx.encode returns them; mx.layouts converts device layouts back",
                )


def checked_axis(axis: int, ndim: int) -> int:
    """Return `axis` counted from the front. Raises UsageError (E-USE-01) if it is out of range."""
    if not -ndim <= axis < ndim:
        raise UsageError(
            f"axis {axis} of a tensor with {ndim} axes",
            needs=f"{-ndim} to {ndim - 1}" if ndim else "a tensor with at least one axis",
            fix="pass the axis that the matmul sums over, -1 for a weight [N, K]",
        )
    return axis % ndim


def encode(
    x: Tensor, format: str, *, axis: int = -1, scale_rule: str | None = None, rounding: str | None = None
) -> Encoded:
    """Quantize `x` [.., K, ..], bfloat16, float16 or float32, with K at `axis`.

    Returns an `Encoded`, whose tensors have the shapes and dtypes listed there. `format`: a name in
    `formats.FORMATS`. `scale_rule`: one of its rules, the first by default. `rounding`: rint (default),
    half_away or floor; msModelSlim's rules have a fixed rounding. float16 is encoded directly; the NPU
    converts it to bfloat16 first (other ties with max:6 and max:7). Raises UsageError (E-USE-01) for an
    unknown format, a rule, rounding or dtype that the format does not support, an `axis` out of range, or an
    empty axis.
    """
    fmt = lookup(format)
    rule = resolve_rule(fmt, scale_rule)
    mode = resolve_rounding(fmt, rule, rounding)
    check_dtype(x.dtype, fmt, rule)
    last = checked_axis(axis, x.ndim)
    if not x.shape[last]:
        raise UsageError(
            f"axis {axis} of a tensor {tuple(x.shape)} is empty",
            needs="at least one value",
            fix="skip empty tensors",
        )
    if fmt.tile and x.ndim != 2:
        raise UsageError(
            f"a tensor {tuple(x.shape)} for {fmt.name}",
            needs=f"a matrix: {fmt.tile} x {fmt.tile} values share one scale",
            fix="flatten the leading axes first: x.flatten(0, -2)",
        )
    parts = encoder.encode_rows(x.detach().movedim(last, -1).contiguous(), fmt, rule, mode)
    qdata, scale, dual = (None if p is None else p.movedim(-1, last).contiguous() for p in parts)
    assert qdata is not None and scale is not None
    qdata = qdata.view(getattr(torch, fmt.qdata_dtype))
    return Encoded(qdata, scale, None if dual is None else dual.unsqueeze(-1), format, axis, tuple(x.shape))


def check_dtype(dtype: torch.dtype, fmt: Format, rule: str) -> None:
    """Raise UsageError (E-USE-01) if the rule does not support this dtype."""
    allowed = (torch.bfloat16, torch.float32) if rule.startswith("msms:") else INPUT_DTYPES
    if dtype not in allowed:
        raise UsageError(
            f"a tensor of {dtype} for {fmt.name} with scale rule {rule!r}",
            needs=f"one of {', '.join(str(d).removeprefix('torch.') for d in allowed)}",
            fix="convert the tensor to one of these dtypes first",
        )


def decode(encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantize to a tensor [.., K, ..] of `encoded.shape` and `dtype`, on the same device.

    element x scale, then x dual_scale, computed in float32 and rounded once to `dtype`. For MX formats
    bfloat16 and float32 are exact, unless a value is out of range.
    """
    fmt = lookup(encoded.format)
    if fmt.kind == "tile":
        return _decode_tiles(encoded, fmt).to(dtype)
    last = encoded.axis % len(encoded.shape)
    length = encoded.shape[last]
    qdata = encoded.qdata.movedim(last, -1)
    scale = encoded.scale.movedim(last, -1)
    values = _elements(qdata, fmt, length)
    if fmt.kind == "row":
        values = values * scale
    else:
        blocks = scales.split_blocks(values, fmt.block) * scales.from_bytes(scale).unsqueeze(-1)
        values = scales.join_blocks(blocks, length)
    if encoded.dual_scale is not None:
        groups = scales.split_blocks(values, fmt.coarse)
        dual = encoded.dual_scale.squeeze(-1).movedim(last, -1)
        values = scales.join_blocks(groups * dual.unsqueeze(-1), length)
    return values.to(dtype).movedim(-1, last).contiguous()


def _decode_tiles(encoded: Encoded, fmt: Format) -> Tensor:
    """Dequantize a matrix [N, K] to float32: element x scale of its tile. The last tiles may be short."""
    values = _elements(encoded.qdata, fmt, encoded.shape[-1])
    scale = encoded.scale
    for axis, length in enumerate(encoded.shape):
        scale = scale.repeat_interleave(fmt.tile, axis).narrow(axis, 0, length)
    return values * scale


def _elements(qdata: Tensor, fmt: Format, length: int) -> Tensor:
    """float32 [.., length], without a scale."""
    if fmt.element is None:
        return qdata.to(torch.float32)
    return elements.decode_stored(qdata.contiguous().view(torch.uint8), fmt.element, length)


def sqnr(a: Tensor, b: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, 10 log10(sum a^2 / sum (a - b)^2), of a signal `a` [..].

    `b` has the same shape; both may have any dtype. Sums are float32. inf if they are equal, -inf if only `a`
    is zero, nan if either is not finite. Raises UsageError (E-USE-01) if the shapes differ.
    """
    signal, other = a.detach().to(torch.float32), b.detach().to(torch.float32)
    if signal.shape != other.shape:
        raise UsageError(
            f"tensors of shape {tuple(a.shape)} and {tuple(b.shape)}",
            needs="the same shape",
            fix="compare the decoded tensor with the original",
        )
    noise = signal - other
    if not bool(noise.isfinite().all()):
        return math.nan
    return decibels(_energy(signal), _energy(noise))


def _energy(x: Tensor) -> float:
    """sum x^2 of float32 values; squares neither overflow nor underflow."""
    top = float(x.abs().max()) if x.numel() else 0.0
    return top**2 * float((x / top).square().sum()) if top else 0.0


def decibels(signal: float, noise: float, *, cap: float = math.inf) -> float:
    """10 log10(signal / noise) of two energies, clamped to [-cap, cap]; NaN if either is not finite.

    Zero noise gives `cap`, even if the signal is zero too; noise with zero signal gives -cap.
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise <= 0:
        return cap
    ratio = signal / noise
    return max(-cap, min(cap, 10 * math.log10(ratio))) if ratio > 0 else -cap
