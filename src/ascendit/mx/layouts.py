"""Physical layouts of scales and FP4 weights, converted to and (scales only) from the plain layout.

| layout         | for                                       | shape                                   |
|----------------|-------------------------------------------|-----------------------------------------|
| plain          | checkpoints, OCP                          | scale [N, ceil(K / 32)]                |
| pairs          | npu_dynamic_mx_quant, npu_quant_matmul    | [N, ceil(K / 64), 2]                   |
| plain dual     | checkpoints                               | dual_scale [N, ceil(K / 512), 1]       |
| NPU dual       | npu_dual_level_quant_matmul, weight       | [ceil(K / 512), N]                     |
| CUDA tiles     | cuBLAS block scaling, torch._scaled_mm    | flat, tiles of 128 x 4 as 32 x 16      |
| unpacked FP4   | FP4 in vLLM-Omni, SGLang, old msModelSlim | float8_e4m3fn [N, K], one value per byte |

Padding is byte 0; results are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx import elements
from ascendit.mx.formats import E2M1, E4M3

_TILE_ROWS, _TILE_COLUMNS = 128, 4


def to_pairs(scale: Tensor, axis: int = -1) -> Tensor:
    """Plain scales [.., n, ..] with n at `axis` -> [.., ceil(n / 2), .., 2], same dtype; odd n is padded.

    Blocks 2i and 2i + 1 share the last axis for any `axis` (aclnnDynamicMxQuantV3).
    """
    last = axis % scale.ndim
    rows = scale.movedim(last, -1)
    if rows.shape[-1] % 2:
        rows = torch.nn.functional.pad(rows, (0, 1))
    pairs: Tensor = rows.unflatten(-1, (-1, 2))
    return pairs.movedim(-2, last).contiguous()


def from_pairs(pairs: Tensor, num_blocks: int, axis: int = -1) -> Tensor:
    """The inverse of `to_pairs`: [.., ceil(n / 2), .., 2] -> [.., n, ..], same dtype; n: `num_blocks`.

    Raises UsageError (E-USE-01) if the shape does not match.
    """
    last = axis % (pairs.ndim - 1)
    if pairs.shape[-1] != 2 or pairs.shape[last] != -(-num_blocks // 2):
        raise _misshapen("pairs of scales", pairs, f"[.., {-(-num_blocks // 2)}, 2] for {num_blocks} blocks")
    return pairs.movedim(last, -2).flatten(-2)[..., :num_blocks].movedim(-1, last).contiguous()


def to_npu_dual(dual_scale: Tensor) -> Tensor:
    """float32 [N, G, 1] -> contiguous [G, N], the layout of a weight for npu_dual_level_quant_matmul."""
    return dual_scale.squeeze(-1).t().contiguous()


def from_npu_dual(dual_scale: Tensor) -> Tensor:
    """The inverse of `to_npu_dual`: float32 [G, N] -> [N, G, 1]."""
    return dual_scale.t().contiguous().unsqueeze(-1)


def to_cuda_tiles(scale: Tensor) -> Tensor:
    """uint8 [rows, n] -> flat uint8 of ceil(rows / 128) x ceil(n / 4) tiles of 512 bytes.

    In a tile the scale of row r and column c is at 16 (r % 32) + 4 (r // 32) + c (cuBLAS documentation,
    "1D Block Scaling Factors Layout"). torch._scaled_mm takes the result viewed as float8_e8m0fnu.
    Raises UsageError (E-USE-01) if `scale` is not 2-D.
    """
    if scale.ndim != 2:
        raise _misshapen("scales", scale, "[rows, blocks]")
    rows, columns = scale.shape
    padded = torch.nn.functional.pad(scale, (0, -columns % _TILE_COLUMNS, 0, -rows % _TILE_ROWS))
    tiles: Tensor = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))
    return tiles.permute(0, 3, 2, 1, 4).flatten().contiguous()


def from_cuda_tiles(tiles: Tensor, rows: int, num_blocks: int) -> Tensor:
    """The inverse of `to_cuda_tiles`: uint8, flat or of any shape -> uint8 [rows, num_blocks].

    Raises UsageError (E-USE-01) if the number of bytes does not match.
    """
    tile_rows, tile_columns = -(-rows // _TILE_ROWS), -(-num_blocks // _TILE_COLUMNS)
    if tiles.numel() != tile_rows * tile_columns * _TILE_ROWS * _TILE_COLUMNS:
        raise _misshapen(
            "tiles of scales", tiles, f"{tile_rows * tile_columns * 512} bytes for [{rows}, {num_blocks}]"
        )
    grid = tiles.reshape(tile_rows, tile_columns, 32, 4, 4).permute(0, 3, 2, 1, 4)
    plain = grid.reshape(tile_rows * _TILE_ROWS, tile_columns * _TILE_COLUMNS)
    return plain[:rows, :num_blocks].contiguous()


def to_e4m3_container(packed: Tensor, length: int) -> Tensor:
    """Packed FP4 uint8 [.., ceil(length / 2)] -> float8_e4m3fn [.., length] of the same values, with -0."""
    encodings = torch.arange(16, dtype=torch.uint8, device=packed.device)
    table = elements.encode(elements.decode(encodings, E2M1), E4M3, "rint")
    qdata = elements.unpack(packed, length)
    return table[qdata.to(torch.int64)].view(torch.float8_e4m3fn)


def _misshapen(label: str, tensor: Tensor, needs: str) -> UsageError:
    return UsageError(
        f"{label} of shape {tuple(tensor.shape)}",
        needs=needs,
        fix="pass the layout that this function converts; ascendit/mx/layouts.py lists them",
    )
