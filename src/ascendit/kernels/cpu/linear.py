"""Linear layers on codes on a CPU; `ops/quant_linear.py` has the contract.

Weights stay as they are on disk, in memory too. `native/linear.cpp` makes tiles of them that stay in the
cache, which costs a few percent of the product:

- int8: products of bytes, summed exactly, on AVX-512 VNNI; twice as fast as BF16.
- mxfp4 and its dual scale: twice a number is a whole number up to 12, so blocks are products of bytes too,
  exact, and their sums are scaled in float32.
- mxfp8, fp8, w4a8: a code times a power of two is a BF16 number, so the product runs on AVX-512 BF16 with
  sums in float32. Decoded once, a weight takes the memory of BF16 besides, and saves those few percent.

What no BF16 number is (below 2^-126, above 2^103), a K that is no multiple of 32, and machines without such a
processor or without a compiler take the plain way of `kernels/cpu/linear_plain.py`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ascendit.kernels.cpu import linear_plain as plain
from ascendit.mx.encoded import Encoded
from ascendit.native.build import Built, declared, native
from ascendit.ops.quant_linear import (
    REFERENCE,
    Activation,
    Emulate,
    LinearChoice,
    LinearForm,
    PreparedWeight,
)

if TYPE_CHECKING:
    from ascendit.device.backends import Device

KINDS = {"int8": 0, "fp8": 1, "mxfp8": 2, "mxfp4": 3, "mxfp4_dualscale": 4, "w4a8": 5}
"""Scheme -> its number in linear.cpp."""
IN_BYTES = ("int8", "mxfp4", "mxfp4_dualscale")
"""Schemes whose products need no decoding. A weight in mxfp4 may still meet tokens in w4a8."""
BLOCK, COLUMNS, STRETCH, CHUNK = 32, 64, 512, 1024
"""Values of an MX block; channels and values of a tile; tokens that linear.cpp takes at a time."""
_kept = threading.local()
SIGNATURES = {
    "linear": "iiiii" + "p" * 11 + "i",
    "doubtful_blocks": "iiiipp",
    "decode_tiles": "iiiippp",
    "smooth": "iiippp",
}


@dataclass(frozen=True, eq=False)
class PlainWeight(PreparedWeight):
    """One that the tiles cannot hold."""


@functools.cache
def library() -> Built:
    """The compiled kernels, or why there are none."""
    return declared(native("linear"), SIGNATURES)


def forms(device: Device, emulate: Emulate | None) -> Mapping[str, LinearChoice]:
    """All schemes. Emulated are those that are decoded to another format first."""
    built = library()
    if built.library is None:
        return plain.forms(emulate, built.reason)
    once = emulate == "decode-once"
    form = LinearForm(
        "cpu", prepare_decoded if once else prepare_weight, quantize_activation, quantized_linear, stored
    )
    how = "decoded once to BF16" if once else "decoded tile by tile to BF16 on each use"
    decoding = LinearChoice(form, f"emulated: {how}, {built.reason}")
    integers = LinearChoice(form, f"native: products of bytes, {built.reason}")
    return {scheme: integers if scheme in IN_BYTES else decoding for scheme in KINDS}


stored = REFERENCE.stored


# ---- weights ------------------------------------------------------------------------------------


def prepare_weight(
    encoded: Encoded, bias: Tensor | None, device: Device, *, nz: bool = False
) -> PreparedWeight:
    """As on disk; a `PlainWeight` if the tiles cannot hold it."""
    weight = REFERENCE.prepare_weight(encoded, bias, device)
    weight = replace(weight, codes=weight.codes.contiguous(), scale=weight.scale.contiguous())
    return (
        weight if _fits(weight) else PlainWeight(**{f.name: getattr(weight, f.name) for f in fields(weight)})
    )


def prepare_decoded(
    encoded: Encoded, bias: Tensor | None, device: Device, *, nz: bool = False
) -> PreparedWeight:
    """The same with its tiles, bfloat16 [N up to a multiple of 64, K]: 3 to 5 times the memory."""
    weight = prepare_weight(encoded, bias, device)
    if isinstance(weight, PlainWeight) or weight.scheme in ("int8", "mxfp4_dualscale"):
        return weight
    n, k = weight.shape
    tiles = torch.empty(-(-n // COLUMNS) * COLUMNS, k, dtype=torch.bfloat16)
    at = weight.codes.data_ptr(), weight.scale.data_ptr(), tiles.data_ptr()
    _call("decode_tiles", KINDS[weight.scheme], n, k, torch.get_num_threads(), *at)
    return replace(weight, decoded=tiles)


def _fits(weight: PreparedWeight) -> bool:
    n, k = weight.shape
    if k % BLOCK or not n:
        return False
    if weight.scheme in ("int8", "fp8"):
        return weight.scheme == "fp8" or k <= plain.LARGEST_INT_WIDTH
    bits = 8 if weight.scheme == "mxfp8" else 4
    at = weight.codes.data_ptr(), weight.scale.data_ptr()
    return not _call("doubtful_blocks", bits, n, k, torch.get_num_threads(), *at)


# ---- tokens and products ------------------------------------------------------------------------


def quantize_activation(
    x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
) -> Activation:
    """See `Schemes.quantize_activation`; `mul_scale` in one pass."""
    if mul_scale is not None and x.dtype == torch.bfloat16 and mul_scale.shape == x.shape[-1:]:
        x, by = x.contiguous(), mul_scale.to(torch.float32).contiguous()
        smoothed, k = torch.empty_like(x), x.shape[-1]
        at = x.data_ptr(), by.data_ptr(), smoothed.data_ptr()
        _call("smooth", x.numel() // max(k, 1), k, torch.get_num_threads(), *at)
        x, mul_scale = smoothed, None
    return REFERENCE.quantize_activation(x, scheme, mul_scale, rule)


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`."""
    m, (n, k) = a.codes.shape[0], weight.shape
    if isinstance(weight, PlainWeight):
        return plain.quantized_linear(a, weight)
    wide = a.dtype != torch.bfloat16
    out = torch.empty(m, n, dtype=torch.float32 if wide else torch.bfloat16)
    scheme = a.scheme.name
    int8, decoded = scheme == "int8", None if scheme in IN_BYTES else weight.decoded
    work = _room(min(m, CHUNK) * -(-k // STRETCH) * STRETCH * 2)
    sums = torch.empty(m, dtype=torch.int32) if int8 else None
    tensors = (a.codes, a.scale, a.dual_scale, weight.codes, weight.scale, weight.dual_scale)
    at = (_at(t) for t in (*tensors, decoded, weight.bias, work, sums, out))
    doubtful = _call("linear", KINDS[scheme], m, n, k, torch.get_num_threads(), *at, wide)
    if doubtful:
        return plain.quantized_linear(a, replace(weight, decoded=None))
    return out.to(a.dtype).view(*a.lead, n)


def _room(nbytes: int) -> Tensor:
    """Memory for the tokens of a chunk, kept by each thread: 28 MB for K = 13824. Fresh pages cost time."""
    found: Tensor | None = getattr(_kept, "room", None)
    if found is None or found.nbytes < nbytes:
        found = _kept.room = torch.empty(nbytes, dtype=torch.uint8)
    return found


def _call(name: str, *given: int) -> int:
    return int(getattr(library().library, name)(*given))


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
