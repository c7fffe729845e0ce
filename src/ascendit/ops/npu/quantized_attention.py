"""Quantized attention on an Ascend NPU: fp8 and mxfp8 on a5; other schemes and chips are emulated on request.

The contract is that of `reference.attention`, the numbers are those of `kernels/quantized_attention.py`. Q,
K and V are quantized here, the operator dequantizes them. One call computes one sample: the tiles of fp8 have
no batch axis in CANN, and blocks of MX values must not cross samples. The quantizers replace NaN by 0. A card
may quantize the probabilities too; the twin does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ascendit.kernels.kernel import Attended, Function, Kernel, Wish
from ascendit.kernels.quantized_attention import emulated_kernels, operator_of
from ascendit.ops.npu.attention import check_inputs, fusion_attention
from ascendit.quant.attention_schemes import ATTENTION_FORMATS
from ascendit.twin.contract import FP8_E4M3, SCALE_E8M0

INFER = "fused_infer_attention_score_v2"
TILE_CHANNELS = 128
"""Of npu_dynamic_block_quant; a tile of fp8 attention has all channels of a head."""
_QKV = ("query", "key", "value")
Sample = Callable[..., tuple[Tensor, Tensor]]
"""q [S, H, d], k and v [L, H, d], return_lse -> [S, H, d], and [H, S] or an empty tensor."""


def list_kernels(wish: Wish) -> tuple[Kernel, ...]:
    """A kernel for each scheme and operator, best first; emulated ones only if the wish allows them.

    Which chip has which of the native ones: `operator_support.CAPABILITIES`.
    """
    fp8, mxfp8 = "native: one float32 scale per tile of tokens", "native: one E8M0 scale per 32 values"
    native = (
        _native("fp8", _fp8_sample, "mindiesd", fp8),
        _native("fp8", _fp8_sample, "npu", fp8),
        _native("mxfp8", _mxfp8_sample, "npu", mxfp8),
    )
    return (*native, *(emulated_kernels("npu", fusion_attention) if wish.emulate else ()))


def _native(scheme: str, sample: Callable[..., Any], namespace: str, reason: str) -> Kernel:
    def operator(*args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(torch.ops, namespace), f"npu_{INFER}" if namespace == "npu" else INFER)(
            *args, **kwargs
        )

    needs = f"npu_{INFER}" if namespace == "npu" else f"{namespace}::{INFER}"
    call = _by_sample(scheme, partial(sample, operator))
    return Kernel(operator_of(scheme), "npu", call, reason, needs, name=namespace)


def _by_sample(scheme: str, sample: Sample) -> Function:
    def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> Attended:
        """As `reference.attention`, quantized. Raises UsageError (E-USE-01) for other dtypes or heads."""
        check_inputs(scheme, q, k)
        samples = [sample(*qkv, return_lse) for qkv in zip(q, k, v, strict=True)]
        out, lse = (_stacked(part) for part in zip(*samples, strict=True))
        return (out, lse) if return_lse else out

    return attention


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)


def _fp8_sample(
    operator: Function, q: Tensor, k: Tensor, v: Tensor, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Modes 7, 7, 7: layout BNSD, float32 scales [1, H, tiles, 1]."""
    f = ATTENTION_FORMATS["fp8"]
    rows = (f.query_tile[0], f.key_tile[0], f.value_tile[0])
    qdata, scales = zip(*map(_tiles, (q, k, v), rows), strict=True)
    out, lse = operator(*qdata, **_options("BNSD", q, (7, 7, 7), scales, return_lse))
    return out[0].transpose(0, 1), lse[0, ..., 0] if return_lse else lse


def _tiles(t: Tensor, rows: int | None) -> tuple[Tensor, Tensor]:
    """[S, H, d] -> e4m3 [1, H, S, d], float32 [1, H, ceil(S / rows), 1]."""
    qdata, scale = torch.ops.npu.npu_dynamic_block_quant(
        t.transpose(0, 1), dst_type=FP8_E4M3, row_block_size=rows, col_block_size=TILE_CHANNELS
    )
    return qdata.unsqueeze(0), scale.unsqueeze(0)


def _mxfp8_sample(
    operator: Function, q: Tensor, k: Tensor, v: Tensor, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """Modes 6, 6, 8: layout TND, E8M0 scales in pairs: [S, H, d / 64, 2], of the values [L / 64, H, d, 2].

    The lengths are numbers of the host: a tensor would have to be copied from the device.
    """
    qdata, scales = zip(*map(_blocks, (q, k, v), (-1, -1, 0)), strict=True)
    out, lse = operator(
        *qdata,
        **_options("TND", q, (6, 6, 8), scales, return_lse),
        **{f"{name}_dtype": torch.float8_e4m3fn for name in _QKV},
        **{f"dequant_scale_{name}_dtype": SCALE_E8M0 for name in _QKV},
        actual_seq_qlen=[len(q)],
        actual_seq_kvlen=[len(k)],
    )
    return out, lse[..., 0].t() if return_lse else lse


def _blocks(t: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    qdata, scale = torch.ops.npu.npu_dynamic_mx_quant(t, axis=axis, dst_type=FP8_E4M3)
    return qdata, scale


def _options(
    layout: str, q: Tensor, modes: tuple[int, ...], scales: tuple[Tensor, ...], return_lse: bool
) -> dict[str, Any]:
    return {
        "input_layout": layout,
        "num_query_heads": q.shape[1],
        "num_key_value_heads": q.shape[1],
        "softmax_scale": q.shape[2] ** -0.5,
        "out_dtype": q.dtype,
        "return_softmax_lse": return_lse,
        **{f"{name}_quant_mode": mode for name, mode in zip(_QKV, modes, strict=True)},
        **{f"dequant_scale_{name}": scale for name, scale in zip(_QKV, scales, strict=True)},
    }
