"""Attention that computes only some blocks of keys for each block of queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ascendit.twin.contract import HALF_DTYPES, require
from ascendit.twin.operators import attention_inputs as core
from ascendit.twin.operators.fused_infer_attention import times_block_scales
from ascendit.twin.registry import Out, current_chip, operator


def _spread(mask: Tensor, z: core.Sizes, rows: int, columns: int) -> Tensor:
    """int8 [B, N, blocks, blocks], 1 = compute -> bool [B, N, S, keys], True = masked out."""
    full = mask.to(torch.bool).repeat_interleave(rows, 2)[:, :, : z.s]
    return ~full.repeat_interleave(columns, 3)[..., : z.keys]


def _check_blocks(mask: Tensor | None, z: core.Sizes, block_shape: list[int]) -> None:
    require(
        len(block_shape) >= 2 and block_shape[1] % 128 == 0 and block_shape[0] > 0,
        "sparse.block_shape",
        block_shape=block_shape,
    )
    wanted = (z.b, z.n, -(-z.s // block_shape[0]), -(-z.keys // block_shape[1]))
    require(
        mask is None or (tuple(mask.shape) == wanted and mask.dtype == torch.int8),
        "sparse.mask",
        mask=mask,
        wanted=wanted,
    )
    require(z.d in (64, 128), "sparse.head_size", z=z)


def _sparse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, z: core.Sizes, block_shape: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """float32 output [B, N, S, D] and lse [B, N, S, 1]."""
    hidden = None if mask is None else _spread(mask, z, block_shape[0], block_shape[1])
    require(hidden is None or not bool(hidden.all(-1).any()), "sparse.empty_row")
    out, top, total = core.attend(q, k, v, scale, hidden)
    return out, (top + torch.log(total)).unsqueeze(-1)


def _lengths(a: dict[str, Any]) -> None:
    require(
        a["q_input_layout"] == a["kv_input_layout"] == "BNSD",
        "sparse.layouts",
        q_layout=a["q_input_layout"],
        kv_layout=a["kv_input_layout"],
    )
    given = [a["actual_seq_lengths"], a["actual_seq_lengths_kv"]]
    require(all(n is None for n in given), "sparse.lengths")


@operator("npu_block_sparse_attention")
def npu_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_sparse_mask: Tensor,
    block_shape: list[int],
    num_key_value_heads: int,
    scale_value: float,
    inner_precise: int,
    **rest: Any,
) -> Iterator[Any]:
    """(out, lse [B, N, S, 1]) of a2 and a3."""
    _lengths(rest)
    z = core.sizes(query, key, value, "BNSD", query.shape[1], num_key_value_heads)
    _check_blocks(block_sparse_mask, z, block_shape)
    require(
        query.dtype in HALF_DTYPES and (query.dtype != torch.bfloat16 or inner_precise == 0),
        "sparse.inner_precise",
        inner_precise=inner_precise,
        query=query,
    )
    core.check_attention_scale("scale_value", scale_value, 0.0, z.d)
    yield Out(core.shape_of(z, "BNSD"), query.dtype), Out((z.b, z.n, z.s, 1), torch.float32)
    out, lse = _sparse(query, key, value, block_sparse_mask, z, block_shape, scale_value)
    yield out.to(query.dtype), lse


@operator("mindiesd::block_sparse_attention")
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_sparse_mask: Tensor | None,
    block_shape: list[int],
    num_key_value_heads: int,
    scale_value: float,
    inner_precise: int,
    q_dequant_scale: Tensor | None,
    k_dequant_scale: Tensor | None,
    v_dequant_scale: Tensor | None,
    **rest: Any,
) -> Iterator[Any]:
    """(out, lse [B, N, S, 1]) of a5; FP8 with block scales gives bfloat16."""
    _lengths(rest)
    z = core.sizes(query, key, value, "BNSD", query.shape[1], num_key_value_heads)
    _check_blocks(block_sparse_mask, z, block_shape)
    fp8 = query.dtype == torch.float8_e4m3fn
    given = [q_dequant_scale, k_dequant_scale, v_dequant_scale]
    require(inner_precise == 4, "sparse.inner_precise_a5", inner_precise=inner_precise, chip=current_chip())
    require(
        (fp8 and all(s is not None for s in given) and block_shape[1] % 256 == 0)
        or (query.dtype in HALF_DTYPES and all(s is None for s in given)),
        "sparse.fp8",
        query=query,
        block_shape=block_shape,
        scaled=[s is not None for s in given],
    )
    core.check_attention_scale("scale_value", scale_value, 1.0, z.d)
    dtype = torch.bfloat16 if fp8 else query.dtype
    yield Out(core.shape_of(z, "BNSD"), dtype), Out((z.b, z.n, z.s, 1), torch.float32)
    wide = [
        t if s is None else times_block_scales(t, s) for t, s in zip((query, key, value), given, strict=True)
    ]
    out, lse = _sparse(wide[0], wide[1], wide[2], block_sparse_mask, z, block_shape, scale_value)
    yield out.to(dtype), lse


@operator("mindiesd::rainfusionattention")
def rainfusionattention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    select_idx: Tensor,
    select_num_idx: Tensor,
    blockshape: list[int],
    q_input_layout: str,
    kv_input_layout: str,
    head_num: int,
    scale: float,
    actual_seq_qlen: list[int] | None,
    actual_seq_kvlen: list[int] | None,
    **rest: Any,
) -> Iterator[Any]:
    """(out, lse [T, N, 1]) of a2 and a3, TND, one sequence.

    select_idx [query blocks, N, key blocks] holds numbers of key blocks; the first select_num_idx
    [query blocks, N] of each row count.
    """
    require(
        q_input_layout == kv_input_layout == "TND" and rest["attn_mask"] is None,
        "sparse.rain_layouts",
        q_input_layout=q_input_layout,
        kv_input_layout=kv_input_layout,
        masked=rest["attn_mask"] is not None,
    )
    z = core.sizes(query, key, value, "TND", head_num, 0)
    require(
        [list(n or [z.s]) for n in (actual_seq_qlen, actual_seq_kvlen)] == [[z.s], [z.keys]] or z.s != z.keys,
        "sparse.rain_lengths",
        actual_seq_qlen=actual_seq_qlen,
    )
    blocks = (-(-z.s // blockshape[0]), z.n, -(-z.keys // blockshape[1]))
    require(
        tuple(select_idx.shape) == blocks and tuple(select_num_idx.shape) == blocks[:2],
        "sparse.rain_index",
        select_idx=select_idx,
        select_num_idx=select_num_idx,
        blocks=blocks,
        rows=blocks[:2],
    )
    core.check_attention_scale("scale", scale, 1.0, z.d)
    yield Out(tuple(query.shape), query.dtype), Out((z.s, z.n, 1), torch.float32)
    taken = torch.arange(blocks[2]) < select_num_idx.unsqueeze(-1)
    mask = torch.zeros(*blocks[:2], blocks[2] + 1, dtype=torch.int8)
    mask.scatter_(2, torch.where(taken, select_idx, blocks[2]).to(torch.int64), 1)
    chosen = mask[..., : blocks[2]].transpose(0, 1).unsqueeze(0)
    q, k, v = (core.to_bnsd(t, "TND", z.n) for t in (query, key, value))
    out, lse = _sparse(q, k, v, chosen, z, blockshape, scale)
    yield core.from_bnsd(out, "TND").to(query.dtype), lse[0].transpose(0, 1).contiguous()
