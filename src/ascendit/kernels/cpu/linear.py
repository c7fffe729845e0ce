"""Quantized linear layers on a CPU, compiled (`native/linear.cpp`) or by PyTorch.

Weights stay as they are on disk, in memory too. `native/linear.cpp` makes tiles of them that stay in the
cache, which costs a few percent of the product:

- int8: products of bytes, summed exactly, on AVX-512 VNNI; twice as fast as BF16.
- mxfp4 and its dual scale: twice a number is a whole number up to 12, so blocks are products of bytes too,
  exact, and their sums are scaled in float32.
- mxfp8, fp8, w4a8: a code times a power of two is a BF16 number, so the product runs on AVX-512 BF16 with
  sums in float32. Decoded once, a weight takes the memory of BF16 besides, and saves those few percent.

Values that BF16 does not have (below 2^-126, above 2^103), a K that is no multiple of 32, and machines
without such a processor or without a compiler go to PyTorch:

- int8: `torch._int_mm` sums the products exactly.
- mxfp8, mxfp4 and w4a8 where oneDNN multiplies BF16: both sides decoded to BF16, which is exact. PyTorch
  rounds the sums before it adds a bias; so the bias goes in as three more columns of the weight, whose BF16
  numbers sum up to it, times tokens of 1. Then there is one rounding, as with a float32 bias.
- The rest (fp8, dual scales, tokens in other dtypes, numbers that BF16 does not have): decoded to float32.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels import reference
from ascendit.kernels.kernel import Activation, Emulate, PreparedWeight, QuantLinearKernel
from ascendit.mx import elements, scales
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import lookup
from ascendit.native.build import Built, declared, native
from ascendit.quant.schemes import LINEAR_SCHEMES

KINDS = {"int8": 0, "fp8": 1, "mxfp8": 2, "mxfp4": 3, "mxfp4_dualscale": 4, "w4a8": 5}
"""Scheme -> its number in linear.cpp."""
IN_BYTES = ("int8", "mxfp4", "mxfp4_dualscale")
"""Schemes whose compiled products need no decoding. A weight in mxfp4 may still meet tokens in w4a8."""
BLOCK, COLUMNS, STRETCH, CHUNK = 32, 64, 512, 1024
"""Values of an MX block; channels and values of a tile; tokens that linear.cpp takes at a time."""
_kept = threading.local()
LINEAR_SIGNATURES = {
    "linear": "iiiii" + "p" * 11 + "i",
    "unsupported_blocks": "iiiipp",
    "decode_tiles": "iiiippp",
    "smooth": "iiippp",
}
LARGEST_INT_WIDTH = 1 << 16
"""Above this K sums of int8 products might leave int32."""
IN_BF16 = ("mxfp8", "mxfp4", "w4a8")
"""Schemes whose numbers are BF16, scales and all."""
BIAS_COLUMNS = 3
"""For a float32 bias: 3 x 8 bits of mantissa."""


@functools.cache
def library() -> Built:
    """The compiled kernels, or why there are none."""
    return declared(native("linear"), LINEAR_SIGNATURES)


def list_kernels(emulate: Emulate | None) -> tuple[QuantLinearKernel, ...]:
    """One for each scheme. Emulated are those that are decoded to another format first."""
    built, once = library(), emulate == "decode-once"
    if built.library is None:
        return tuple(_torch_kernel(scheme, emulate, built.reason) for scheme in LINEAR_SCHEMES)
    how = "decoded once to BF16" if once else "decoded tile by tile to BF16 on each use"
    return tuple(
        QuantLinearKernel(
            scheme,
            "cpu",
            quantized_linear,
            f"{'native: products of bytes' if scheme in IN_BYTES else f'emulated: {how}'}, {built.reason}",
            needs="native/linear.cpp",
            prepare=prepare_tiles if once else prepare_weight,
            quantize_activation=quantize_activation,
            stored=reference.stored,
        )
        for scheme in LINEAR_SCHEMES
    )


def _torch_kernel(scheme: str, emulate: Emulate | None, why: str) -> QuantLinearKernel:
    """Without the compiled kernels; `why` there are none."""
    once = emulate == "decode-once"
    how = f"emulated: decoded {'once' if once else 'on each use'} to"
    prepare = reference.prepare_weight
    if scheme == "int8":
        reason = f"native: torch._int_mm, {why}"
    elif scheme in IN_BF16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reason, prepare = f"{how} BF16 by PyTorch, {why}", prepare_columns if once else prepare
    else:
        return reference.quant_linear_kernel(scheme, emulate, f"{how} float32 by PyTorch, {why}")
    return QuantLinearKernel(
        scheme,
        "cpu",
        torch_linear,
        reason,
        prepare=prepare,
        quantize_activation=reference.quantize_activation,
        stored=reference.stored,
    )


# ---- compiled: weights --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FallbackWeight(PreparedWeight):
    """One that the tiles cannot hold; PyTorch multiplies it."""


def prepare_weight(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """As on disk; a `FallbackWeight` if the tiles cannot hold it."""
    weight = reference.prepare_weight(encoded, bias, device)
    weight = replace(weight, qdata=weight.qdata.contiguous(), scale=weight.scale.contiguous())
    if _fits(weight):
        return weight
    return FallbackWeight(**{f.name: getattr(weight, f.name) for f in fields(weight)})


def prepare_tiles(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """The same with its tiles, bfloat16 [N up to a multiple of 64, K]: 3 to 5 times the memory."""
    weight = prepare_weight(encoded, bias, device)
    if isinstance(weight, FallbackWeight) or weight.scheme in ("int8", "mxfp4_dualscale"):
        return weight
    n, k = weight.shape
    tiles = torch.empty(-(-n // COLUMNS) * COLUMNS, k, dtype=torch.bfloat16)
    at = weight.qdata.data_ptr(), weight.scale.data_ptr(), tiles.data_ptr()
    _call("decode_tiles", KINDS[weight.scheme], n, k, torch.get_num_threads(), *at)
    return replace(weight, decoded=tiles)


def _fits(weight: PreparedWeight) -> bool:
    n, k = weight.shape
    if k % BLOCK or not n:
        return False
    if weight.scheme in ("int8", "fp8"):
        return weight.scheme == "fp8" or k <= LARGEST_INT_WIDTH
    bits = 8 if weight.scheme == "mxfp8" else 4
    at = weight.qdata.data_ptr(), weight.scale.data_ptr()
    return not _call("unsupported_blocks", bits, n, k, torch.get_num_threads(), *at)


# ---- compiled: activations and products ---------------------------------------------------------


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
    return reference.quantize_activation(x, scheme, mul_scale, rule)


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`."""
    m, (n, k) = a.qdata.shape[0], weight.shape
    if isinstance(weight, FallbackWeight):
        return torch_linear(a, weight)
    wide = a.dtype != torch.bfloat16
    out = torch.empty(m, n, dtype=torch.float32 if wide else torch.bfloat16)
    scheme = a.scheme.name
    int8, decoded = scheme == "int8", None if scheme in IN_BYTES else weight.decoded
    work = _room(min(m, CHUNK) * -(-k // STRETCH) * STRETCH * 2)
    sums = torch.empty(m, dtype=torch.int32) if int8 else None
    tensors = (a.qdata, a.scale, a.dual_scale, weight.qdata, weight.scale, weight.dual_scale)
    at = (_at(t) for t in (*tensors, decoded, weight.bias, work, sums, out))
    doubtful = _call("linear", KINDS[scheme], m, n, k, torch.get_num_threads(), *at, wide)
    if doubtful:
        return torch_linear(a, replace(weight, decoded=None))
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


# ---- PyTorch ------------------------------------------------------------------------------------


def prepare_columns(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """The same with `decoded`: bfloat16 [N, K + 3], the bias in the last columns."""
    weight = reference.prepare_weight(encoded, bias, device)
    return replace(weight, decoded=_weight_columns(weight))


def torch_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`. `weight.decoded` is from `prepare_columns`, or None."""
    if a.scheme.name == "int8" and 1 < a.width <= LARGEST_INT_WIDTH:  # _int_mm errs at K = 1
        return _int8_linear(a, weight)
    if a.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        columns = _weight_columns(weight) if weight.decoded is None else weight.decoded
        tokens = None if columns is None else _bf16(a.qdata, a.scale, a.scheme.activation, a.width)
        if columns is not None and tokens is not None:
            ones = tokens.new_ones(tokens.shape[0], columns.shape[1] - a.width)
            return F.linear(torch.cat((tokens, ones), 1), columns).view(*a.lead, weight.shape[0])
    return reference.quantized_linear(a, replace(weight, decoded=None))


def _int8_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """int32 sums, and then the scales of token and channel and the bias in float32."""
    sums = torch._int_mm(a.qdata, weight.qdata.t())
    out = sums.to(torch.float32).mul_(a.scale.view(-1, 1)).mul_(weight.scale.view(1, -1))
    if weight.bias is not None:
        out += weight.bias
    return out.to(a.dtype).view(*a.lead, weight.shape[0])


def _weight_columns(weight: PreparedWeight) -> Tensor | None:
    """bfloat16 [N, K], with a bias [N, K + 3]; None where that is not exact."""
    values = _bf16(weight.qdata, weight.scale, weight.scheme, weight.shape[1])
    if values is None or weight.bias is None:
        return values
    left, parts = weight.bias, [values]
    for _ in range(BIAS_COLUMNS):
        parts.append(left.to(torch.bfloat16).unsqueeze(1))
        left = left - parts[-1].squeeze(1).to(torch.float32)
    return torch.cat(parts, 1) if not bool(left.any()) else None


def _bf16(qdata: Tensor, scale: Tensor, name: str, width: int) -> Tensor | None:
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
        values = elements.decode_stored(qdata, form.element, width).to(torch.bfloat16)
    else:
        values = qdata.view(torch.float8_e4m3fn).to(torch.bfloat16)
    powers = scales.from_bytes(scale).to(torch.bfloat16)
    return values.view(-1, form.block).mul_(powers.view(-1, 1)).view(-1, width)
