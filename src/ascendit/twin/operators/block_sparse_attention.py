"""Block-sparse attention: each block of queries attends to selected blocks of keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.twin.contract import HALF_DTYPES, Call, require
from ascendit.twin.operators import attention_inputs as core
from ascendit.twin.operators.fused_infer_attention import dequantize_blocks
from ascendit.twin.registry import Out, current_chip, operator


def _expand_mask(mask: Tensor, z: core.Sizes, rows: int, columns: int) -> Tensor:
    """int8 [B, N, blocks, blocks], 1 = compute -> bool [B, N, S, keys], True = masked out."""
    full = mask.to(torch.bool).repeat_interleave(rows, 2)[:, :, : z.s]
    return ~full.repeat_interleave(columns, 3)[..., : z.keys]


def _check(a: Call) -> core.Sizes:
    """Check layouts, lengths, blocks and mask of npu_ and mindiesd::block_sparse_attention."""
    mask, shape = a.block_sparse_mask, a.block_shape
    a.require(a.q_input_layout == a.kv_input_layout == "BNSD", "sparse.layouts")
    a.require(a.actual_seq_lengths is a.actual_seq_lengths_kv is None, "sparse.lengths")
    z = core.sizes(a.query, a.key, a.value, "BNSD", a.query.shape[1], a.num_key_value_heads)
    a.require(len(shape) >= 2 and shape[1] % 128 == 0 and shape[0] > 0, "sparse.block_shape")
    blocks = (z.b, z.n, -(-z.s // shape[0]), -(-z.keys // shape[1]))
    valid = mask is None or (tuple(mask.shape) == blocks and mask.dtype == torch.int8)
    a.require(valid, "sparse.mask", blocks=blocks)
    a.require(z.d in (64, 128), "sparse.head_size", z=z)
    return z


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, z: core.Sizes, block_shape: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """float32 output [B, N, S, D] and lse [B, N, S, 1]."""
    masked = None if mask is None else _expand_mask(mask, z, block_shape[0], block_shape[1])
    require(masked is None or not bool(masked.all(-1).any()), "sparse.empty_row")
    out, top, total = core.attend(q, k, v, scale, masked)
    return out, (top + torch.log(total)).unsqueeze(-1)


@operator("npu_block_sparse_attention")
def npu_block_sparse_attention(**arguments: Any) -> Iterator[Any]:
    """BNSD -> (out, float32 lse [B, N, S, 1]), on a2 and a3."""
    a = Call(**arguments)
    z, dtype = _check(a), a.query.dtype
    a.require(
        dtype == torch.float16 or (dtype, a.inner_precise) == (torch.bfloat16, 0), "sparse.inner_precise"
    )
    core.check_attention_scale("scale_value", a.scale_value, 0.0, z.d)
    yield Out(core.shape_of(z, "BNSD"), dtype), Out((z.b, z.n, z.s, 1), torch.float32)
    out, lse = _sparse(a.query, a.key, a.value, a.block_sparse_mask, z, a.block_shape, a.scale_value)
    yield out.to(dtype), lse


@operator("mindiesd::block_sparse_attention")
def block_sparse_attention(**arguments: Any) -> Iterator[Any]:
    """BNSD -> (out, float32 lse [B, N, S, 1]), on a5; FP8 with block scales returns bfloat16."""
    a = Call(**arguments)
    z = _check(a)
    fp8 = a.query.dtype == torch.float8_e4m3fn
    scales = (a.q_dequant_scale, a.k_dequant_scale, a.v_dequant_scale)
    scaled = [s is not None for s in scales]
    a.require(a.inner_precise == 4, "sparse.inner_precise_a5", chip=current_chip())
    valid_fp8 = fp8 and all(scaled) and a.block_shape[1] % 256 == 0
    a.require(valid_fp8 or (a.query.dtype in HALF_DTYPES and not any(scaled)), "sparse.fp8", scaled=scaled)
    core.check_attention_scale("scale_value", a.scale_value, 1.0, z.d)
    dtype = torch.bfloat16 if fp8 else a.query.dtype
    yield Out(core.shape_of(z, "BNSD"), dtype), Out((z.b, z.n, z.s, 1), torch.float32)
    sides = zip((a.query, a.key, a.value), scales, strict=True)
    q, k, v = (t if s is None else dequantize_blocks(t, s) for t, s in sides)
    out, lse = _sparse(q, k, v, a.block_sparse_mask, z, a.block_shape, a.scale_value)
    yield out.to(dtype), lse


@operator("mindiesd::rainfusionattention")
def rainfusionattention(**arguments: Any) -> Iterator[Any]:
    """One TND sequence -> (out [T, N, D], float32 lse [T, N, 1]), on a2 and a3.

    select_idx [query blocks, N, key blocks] holds indices of key blocks, of which the first select_num_idx
    [query blocks, N] are used.
    """
    a = Call(**arguments)
    masked, index, counts = a.attn_mask is not None, a.select_idx, a.select_num_idx
    a.require(
        a.q_input_layout == a.kv_input_layout == "TND" and not masked, "sparse.rain_layouts", masked=masked
    )
    z = core.sizes(a.query, a.key, a.value, "TND", a.head_num, 0)
    lengths = [list(n or [z.s]) for n in (a.actual_seq_qlen, a.actual_seq_kvlen)]
    a.require(lengths == [[z.s], [z.keys]] or z.s != z.keys, "sparse.rain_lengths")
    blocks = (-(-z.s // a.blockshape[0]), z.n, -(-z.keys // a.blockshape[1]))
    valid = tuple(index.shape) == blocks and tuple(counts.shape) == blocks[:2]
    a.require(valid, "sparse.rain_index", blocks=blocks, rows=blocks[:2])
    core.check_attention_scale("scale", a.scale, 1.0, z.d)
    yield Out(tuple(a.query.shape), a.query.dtype), Out((z.s, z.n, 1), torch.float32)
    used = torch.arange(blocks[2]) < counts.unsqueeze(-1)
    mask = torch.zeros(*blocks[:2], blocks[2] + 1, dtype=torch.int8)
    mask.scatter_(2, torch.where(used, index, blocks[2]).to(torch.int64), 1)
    block_mask = mask[..., : blocks[2]].transpose(0, 1).unsqueeze(0)
    q, k, v = (core.to_bnsd(t, "TND", z.n) for t in (a.query, a.key, a.value))
    out, lse = _sparse(q, k, v, block_mask, z, a.blockshape, a.scale)
    yield core.from_bnsd(out, "TND").to(a.query.dtype), lse[0].transpose(0, 1).contiguous()
