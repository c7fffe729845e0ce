"""Whether two experts hold the same numbers: both sides are decoded, some rows at a time, and hashed.

It shares no code with `weights.tensor_steps`: containers are undone by value, scales are read as stored.
torch is imported by the calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ascendit import mx
from ascendit.checkpoint.layer_format import FLOAT_DTYPES, Layer
from ascendit.checkpoint.reader import RowReader, TensorInfo, as_bytes, as_tensor
from ascendit.checkpoint.transformer import Expert
from ascendit.errors import CheckpointError
from ascendit.mx.formats import FORMATS
from ascendit.names import listed
from ascendit.progress import Advance
from ascendit.quant.schemes import FP8_TILES, SCHEMES, STORED_SCHEMES

if TYPE_CHECKING:
    from torch import Tensor

_TILE, _GROUP = FORMATS[FP8_TILES].block, SCHEMES["mxfp4_dualscale"].group


def compare_numbers(source: Expert, written: Expert, advance: Advance | None = None) -> dict[str, str]:
    """The digests of both, if they agree. CheckpointError E-CKP-10, which names the tensors, if not."""
    before, after = digests(source, advance), digests(written, advance)
    wrong = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {len(before)} tensors of {source.path} came out otherwise: {listed(wrong)}",
            needs="the same numbers before and after",
            fix="run it again; if it happens again, check disk and memory, and report it with this message",
            code="E-CKP-10",
        )
    return before


def digests(expert: Expert, advance: Advance | None = None) -> dict[str, str]:
    """Name -> sha256 of the numbers, as float32, little-endian, by rows.

    A quantized layer has one entry for its decoded weight; its scales are in it, zero offsets in none. A
    `mul_scale` of ones, which changes nothing, has none either. `advance(name, bytes read)` after each.
    """
    found: dict[str, str] = {}
    inside = set()
    with RowReader() as reader:
        for name, layer in expert.layers.items():
            parts = [info for role, info in layer.tensors.items() if role not in ("bias", "mul_scale")]
            inside |= set(parts)
            found[f"{name}.weight"] = _sha256(decoded(layer, reader))
            if advance:
                advance(name, sum(info.nbytes for info in parts))
        for name, info in expert.tensors.items():
            if info not in inside and not (name.endswith(".mul_scale") and _is_ones(info, reader)):
                found[name] = _sha256(_plain(info, reader))
                if advance:
                    advance(name, info.nbytes)
    return found


def combined(digests_by_name: dict[str, str]) -> str:
    """One sha256 over all names and digests, in the order of the names."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests_by_name.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(rows: Iterator[Tensor]) -> str:
    digest = hashlib.sha256()
    for block in rows:
        digest.update(as_bytes(block))
    return digest.hexdigest()


def _plain(info: TensorInfo, reader: RowReader) -> Iterator[Tensor]:
    import torch

    for _, view in reader.blocks(info):
        rows = as_tensor(view, info)
        yield rows.to(torch.float32) if info.dtype in FLOAT_DTYPES else rows


def _is_ones(info: TensorInfo, reader: RowReader) -> bool:
    return all(bool((rows == 1).all()) for rows in _plain(info, reader))


def decoded(layer: Layer, reader: RowReader) -> Iterator[Tensor]:
    """The weight of a layer as float32 rows [n, K]; FP8 in tiles is rounded to bfloat16 on the way."""
    import torch

    if layer.scheme == "bf16":
        yield from _plain(layer.tensors["weight"], reader)
        return
    weight, tiled = layer.tensors["weight"], layer.scheme == FP8_TILES
    wide = layer.container not in ("plain", "packed")  # FP4 as numbers of another type
    scales = {role: _whole(info, reader) for role, info in layer.tensors.items() if "scale" in role}
    format = "mxfp8" if wide else "mxfp4" if "weight_dual_scale" in scales else layer.scheme
    scale, dual = scales["weight_scale_inv" if tiled else "weight_scale"], scales.get("weight_dual_scale")
    if not STORED_SCHEMES[layer.scheme].block and not tiled:
        scale = scale.reshape(-1, 1).expand(layer.shape[0], 1)
    for start, view in reader.blocks(weight, multiple=_TILE):
        codes = as_tensor(view, weight)
        stop, step = start + len(codes), _TILE if tiled else 1
        part = scale[start // step : -(-stop // step)]
        codes = codes.to(torch.float8_e4m3fn) if wide else codes
        encoded = mx.Encoded(codes, part, None, format, -1, (len(codes), layer.shape[1]))
        values = mx.decode(encoded, torch.bfloat16 if tiled else torch.float32).to(torch.float32)
        if dual is not None:
            factors = dual.reshape(layer.shape[0], -1)[start:stop].repeat_interleave(_GROUP, -1)
            values *= factors[:, : layer.shape[1]]
        yield values


def _whole(info: TensorInfo, reader: RowReader) -> Tensor:
    """A scale in memory: E8M0 as uint8, others as float32."""
    import torch

    data = bytearray(reader.whole(info))
    values = as_tensor(memoryview(data), info).reshape(info.shape)
    return values.to(torch.float32) if info.dtype in FLOAT_DTYPES else values.view(torch.uint8)
