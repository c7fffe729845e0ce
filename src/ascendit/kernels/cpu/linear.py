"""CPU kernels of quantized linear layers: compiled (`native/linear.cpp`) or PyTorch.

Weights keep their stored layout in memory. `native/linear.cpp` unpacks tiles of them that fit the cache; this
takes a few percent of the matmul:

- int8: exact int8 dot products on AVX-512 VNNI, twice as fast as BF16.
- int8_block: the same for each 128 of K; their sums, times the scales of both tiles, are added in float64.
- mxfp4, mxfp4_dualscale: twice an FP4 value is an integer of at most 12, so each block is an exact int8 dot
  product too; the sums are scaled in float32.
- mxfp8, fp8, w4a8: an element times a power of two is exact in BF16, so the matmul runs on AVX-512 BF16 with
  float32 accumulation. With decode-once the weight is also stored in BF16, which saves those few percent.

PyTorch takes over for values outside BF16 (below 2^-126, above 2^103), for a K that is not a multiple of 32,
and on machines without AVX-512 or a compiler:

- int8: `torch._int_mm`, exact sums. int8_block: float32 matmuls of 128 of K, exact too.
- mxfp8, mxfp4 and w4a8 if oneDNN has a BF16 matmul: both operands dequantized to BF16, which is exact.
  PyTorch would round the sums before adding a bias, so the bias is split into three extra BF16 columns of the
  weight that add up to it, multiplied by ones. The result is rounded once, as with a float32 bias.
- All others (fp8, dual scales, activations of other dtypes, values not representable in BF16): dequantized to
  float32.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels import reference
from ascendit.kernels.kernel import Activation, Emulate, PreparedWeight, QuantLinearKernel
from ascendit.mx import elements, scales
from ascendit.mx.codec import Encoded
from ascendit.mx.formats import lookup
from ascendit.mx.native_encoder import prefer_large_pages
from ascendit.native.build import Built, declared, native
from ascendit.quant.schemes import LINEAR_SCHEMES


@dataclass(frozen=True)
class Variant:
    """How this processor multiplies in one scheme."""

    kind: int
    """Number of the scheme in linear.cpp."""
    int8_dot: bool = False
    """Multiplied as int8 without dequantization."""
    bf16_exact: bool = False
    """The dequantized values, scales included, are exact in BF16."""


VARIANTS: Mapping[str, Variant] = {
    "int8": Variant(0, int8_dot=True),
    "int8_block": Variant(6, int8_dot=True),
    "fp8": Variant(1),
    "mxfp8": Variant(2, bf16_exact=True),
    "mxfp4": Variant(3, int8_dot=True, bf16_exact=True),
    "mxfp4_dualscale": Variant(4, int8_dot=True),
    "w4a8": Variant(5, bf16_exact=True),
}
BLOCK, COLUMNS, STRETCH, CHUNK = 32, 64, 512, 1024
"""Elements of an MX block; output channels and K of a tile; rows that linear.cpp takes at a time."""
_thread = threading.local()
LINEAR_SIGNATURES = {
    "linear": "iiiii" + "p" * 11 + "i",
    "unsupported_blocks": "iiiipp",
    "decode_tiles": "iiiippp",
    "smooth": "iiippp",
}
LARGEST_INT_WIDTH = 1 << 16
"""Largest K whose int8 dot product cannot overflow int32."""
BIAS_COLUMNS = 3
"""BF16 columns that hold a float32 bias: 3 x 8 bits of mantissa."""


@functools.cache
def library() -> Built:
    """The compiled kernels, or the reason for their absence."""
    return declared(native("linear"), LINEAR_SIGNATURES)


def list_kernels(emulate: Emulate | None) -> tuple[QuantLinearKernel, ...]:
    """One kernel for each scheme; those that dequantize first are labelled emulated."""
    built, once = library(), emulate == "decode-once"
    if built.library is None:
        return tuple(_torch_kernel(scheme, emulate, built.reason) for scheme in LINEAR_SCHEMES)
    method = "decoded once to BF16" if once else "decoded tile by tile to BF16 on each use"
    return tuple(
        _torch_kernel(scheme, emulate, "not in native/linear.cpp")
        if scheme not in VARIANTS
        else QuantLinearKernel(
            scheme,
            "cpu",
            quantized_linear,
            f"{'native: int8 dot' if VARIANTS[scheme].int8_dot else f'emulated: {method}'}, {built.reason}",
            needs="native/linear.cpp",
            prepare=prepare_tiles if once else prepare_weight,
            quantize_activation=quantize_activation,
            stored=reference.stored,
        )
        for scheme in LINEAR_SCHEMES
    )


def _torch_kernel(scheme: str, emulate: Emulate | None, absence: str) -> QuantLinearKernel:
    """The PyTorch kernel. `absence`: why the compiled one is missing."""
    once = emulate == "decode-once"
    method = f"emulated: decoded {'once' if once else 'on each use'} to"
    prepare = reference.prepare_weight
    if scheme in INT8_LINEARS:
        reason = f"native: {INT8_LINEARS[scheme][0]}, {absence}"
    elif scheme in VARIANTS and VARIANTS[scheme].bf16_exact and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reason, prepare = f"{method} BF16 by PyTorch, {absence}", prepare_columns if once else prepare
    else:
        return reference.quant_linear_kernel(scheme, emulate, f"{method} float32 by PyTorch, {absence}")
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
    """A weight that linear.cpp does not support; PyTorch multiplies it."""


def prepare_weight(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """Keep weight [N, K] and scales as stored, bias [N] as float32; `FallbackWeight` if linear.cpp cannot
    use it.
    """
    weight = reference.prepare_weight(encoded, bias, device)
    weight = replace(weight, qdata=weight.qdata.contiguous(), scale=weight.scale.contiguous())
    if _is_supported(weight):
        return weight
    return FallbackWeight(**{f.name: getattr(weight, f.name) for f in fields(weight)})


def prepare_tiles(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """`prepare_weight`, and `decoded` as bfloat16 tiles [N rounded up to 64, K]: 3 to 5 times the memory."""
    weight = prepare_weight(encoded, bias, device)
    if isinstance(weight, FallbackWeight) or all(
        VARIANTS[s.name].int8_dot for s in LINEAR_SCHEMES.values() if s.weight == weight.scheme
    ):
        return weight
    n, k = weight.shape
    tiles = torch.empty(-(-n // COLUMNS) * COLUMNS, k, dtype=torch.bfloat16)
    pointers = weight.qdata.data_ptr(), weight.scale.data_ptr(), tiles.data_ptr()
    _call("decode_tiles", VARIANTS[weight.scheme].kind, n, k, torch.get_num_threads(), *pointers)
    return replace(weight, decoded=tiles)


def _is_supported(weight: PreparedWeight) -> bool:
    """Whether linear.cpp can multiply this weight exactly."""
    (n, k), fmt = weight.shape, lookup(weight.scheme)
    if fmt.tile:
        return n > 0
    if k % BLOCK or not n:
        return False
    if fmt.scale_dtype == "float32":
        return k <= LARGEST_INT_WIDTH or fmt.element is not None
    bits = 4 if fmt.packed else 8
    pointers = weight.qdata.data_ptr(), weight.scale.data_ptr()
    return not _call("unsupported_blocks", bits, n, k, torch.get_num_threads(), *pointers)


# ---- compiled: activations and products ---------------------------------------------------------


def quantize_activation(
    x: Tensor, scheme: str, mul_scale: Tensor | None = None, rule: str | None = None
) -> Activation:
    """See `Schemes.quantize_activation`. Multiplies by `mul_scale` in one compiled pass."""
    if mul_scale is not None and x.dtype == torch.bfloat16 and mul_scale.shape == x.shape[-1:]:
        x, factors = x.contiguous(), mul_scale.to(torch.float32).contiguous()
        smoothed, k = torch.empty_like(x), x.shape[-1]
        pointers = x.data_ptr(), factors.data_ptr(), smoothed.data_ptr()
        _call("smooth", x.numel() // max(k, 1), k, torch.get_num_threads(), *pointers)
        x, mul_scale = smoothed, None
    return reference.quantize_activation(x, scheme, mul_scale, rule)


def quantized_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`."""
    m, (n, k) = a.qdata.shape[0], weight.shape
    if isinstance(weight, FallbackWeight):
        return torch_linear(a, weight)
    to_float32 = a.dtype != torch.bfloat16
    out = prefer_large_pages(torch.empty(m, n, dtype=torch.float32 if to_float32 else torch.bfloat16))
    scheme = a.scheme.name
    variant, int8 = VARIANTS[scheme], scheme == "int8"
    workspace = _workspace(min(m, CHUNK) * -(-k // STRETCH) * STRETCH * 2)
    sums = torch.empty(m, dtype=torch.int32) if int8 else None
    tensors = (a.qdata, a.scale, a.dual_scale, weight.qdata, weight.scale, weight.dual_scale)
    decoded = None if variant.int8_dot else weight.decoded
    pointers = (_pointer(t) for t in (*tensors, decoded, weight.bias, workspace, sums, out))
    unsupported = _call("linear", variant.kind, m, n, k, torch.get_num_threads(), *pointers, to_float32)
    if unsupported:
        return torch_linear(a, replace(weight, decoded=None))
    return out.to(a.dtype).view(*a.lead, n)


def _workspace(nbytes: int) -> Tensor:
    """Scratch memory for a chunk of rows, reused by each thread (28 MB for K = 13824): new pages are slow."""
    workspace: Tensor | None = getattr(_thread, "workspace", None)
    if workspace is None or workspace.nbytes < nbytes:
        workspace = _thread.workspace = torch.empty(nbytes, dtype=torch.uint8)
    return workspace


def _call(name: str, *args: int) -> int:
    return int(getattr(library().library, name)(*args))


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- PyTorch ------------------------------------------------------------------------------------


def prepare_columns(
    encoded: Encoded, bias: Tensor | None, device: torch.device, *, nz: bool = False
) -> PreparedWeight:
    """`reference.prepare_weight` with `decoded`: bfloat16 [N, K + 3], the bias in the last columns."""
    weight = reference.prepare_weight(encoded, bias, device)
    return replace(weight, decoded=_weight_columns(weight))


def torch_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """See `Schemes.quantized_linear`. `weight.decoded` comes from `prepare_columns`, or is None."""
    if a.scheme.name in INT8_LINEARS:
        return INT8_LINEARS[a.scheme.name][1](a, weight)
    if a.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        columns = _weight_columns(weight) if weight.decoded is None else weight.decoded
        rows = None if columns is None else _bf16(a.qdata, a.scale, a.scheme.activation, a.width)
        if columns is not None and rows is not None:
            ones = rows.new_ones(rows.shape[0], columns.shape[1] - a.width)
            return F.linear(torch.cat((rows, ones), 1), columns).view(*a.lead, weight.shape[0])
    return reference.quantized_linear(a, replace(weight, decoded=None))


def _int8_linear(a: Activation, weight: PreparedWeight) -> Tensor:
    """int32 sums, multiplied by the scales of row and channel in float32, plus the float32 bias."""
    if not 1 < a.width <= LARGEST_INT_WIDTH:  # _int_mm is wrong at K = 1
        return reference.quantized_linear(a, weight)
    sums = torch._int_mm(a.qdata, weight.qdata.t())
    out = sums.to(torch.float32).mul_(a.scale.view(-1, 1)).mul_(weight.scale.view(1, -1))
    if weight.bias is not None:
        out += weight.bias
    return out.to(a.dtype).view(*a.lead, weight.shape[0])


INT8_LINEARS: Mapping[str, tuple[str, Callable[[Activation, PreparedWeight], Tensor]]] = {
    "int8": ("torch._int_mm", _int8_linear),
    "int8_block": ("exact float32 products of 128 of K", reference.int8_tile_linear),
}
"""Scheme -> the integer product of PyTorch: its name and the function."""


def _weight_columns(weight: PreparedWeight) -> Tensor | None:
    """Weight as bfloat16 [N, K], or [N, K + 3] with a bias; None if that is not exact."""
    values = _bf16(weight.qdata, weight.scale, weight.scheme, weight.shape[1])
    if values is None or weight.bias is None:
        return values
    remainder, columns = weight.bias, [values]
    for _ in range(BIAS_COLUMNS):
        columns.append(remainder.to(torch.bfloat16).unsqueeze(1))
        remainder = remainder - columns[-1].squeeze(1).to(torch.float32)
    return torch.cat(columns, 1) if not bool(remainder.any()) else None


def _bf16(qdata: Tensor, scale: Tensor, name: str, width: int) -> Tensor | None:
    """`mx.decode` as bfloat16 [rows, width]; None if a block may hold a value that is not exact in BF16."""
    fmt = lookup(name)
    if fmt.kind != "block" or fmt.element is None or width % fmt.block:
        return None
    lowest = 1 - (fmt.element.emin - fmt.element.mbits)
    highest = 2 * scales.BIAS - fmt.element.emax
    outside = (scale < lowest) | (scale > highest)
    if bool((outside & (scale != scales.NAN_BYTE)).any()):
        return None
    if fmt.packed:
        values = elements.decode_stored(qdata, fmt.element, width).to(torch.bfloat16)
    else:
        values = qdata.view(torch.float8_e4m3fn).to(torch.bfloat16)
    powers = scales.from_bytes(scale).to(torch.bfloat16)
    return values.view(-1, fmt.block).mul_(powers.view(-1, 1)).view(-1, width)
