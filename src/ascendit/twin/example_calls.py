"""Valid calls of every operator that the twin computes, for tests and for `doctor --self-check`.

`samples()` makes its inputs on the CPU with the twin. Weights that must be FRACTAL_NZ are cast in `run`, so
on a card the card casts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ascendit.twin.contract import FP4_E2M1, FP8_E4M3, SCALE_E8M0
from ascendit.twin.operators import call
from ascendit.twin.registry import current_chip

BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Sample:
    """One call. `nz`: index of the argument that is first cast to FRACTAL_NZ; `packed`: it is packed FP4."""

    name: str
    operator: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    nz: int | None = None
    packed: bool = False

    def run(self, caller: Callable[..., Any], move: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
        """Call `caller(operator, *args, **kwargs)` with each tensor [..] of any dtype moved by `move`."""

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(v) for v in value]
            return move(value) if isinstance(value, Tensor) else value

        args, kwargs = moved(list(self.args)), {k: moved(v) for k, v in self.kwargs.items()}
        if self.nz is not None:
            weight = args[self.nz].view(torch.int8) if self.packed else args[self.nz]
            cast = caller("npu_format_cast", weight, 29, **({"customize_dtype": 1} if self.packed else {}))
            args[self.nz] = cast if self.operator == "npu_dual_level_quant_matmul" else cast.transpose(0, 1)
        return caller(self.operator, *args, **kwargs)


def samples() -> Iterator[Sample]:
    """Sample calls for the current chip."""
    a5 = current_chip() == "a5"
    yield from _norms()
    yield from _attention()
    yield from _rows(a5)
    yield from _casts(a5)
    if a5:
        yield from _quantizers()
        yield from _mx_matmuls()
        yield from _only_a5()
    else:
        yield from _only_a2_a3()


def rand(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    """Normal random numbers [*shape] of `dtype`, the same on every machine."""
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def _norms() -> Iterator[Sample]:
    x, gamma = rand(2, 6, 64), rand(64, seed=1)
    yield Sample("rms_norm", "npu_rms_norm", (x, gamma), {"epsilon": 1e-6})
    yield Sample("rms_norm, float32 gamma", "npu_rms_norm", (x, gamma.float()))
    yield Sample("rms_norm, two axes", "npu_rms_norm", (x.float(), rand(6, 64, dtype=FP32)))
    yield Sample("add_rms_norm", "npu_add_rms_norm", (x, rand(2, 6, 64, seed=2), gamma))
    yield Sample("add_layer_norm", "npu_add_layer_norm", (x, x, gamma, gamma), {"additional_output": True})
    yield Sample("gelu", "npu_gelu", (x,), {"approximate": "tanh"})
    yield Sample("exact gelu", "npu_gelu", (x,))
    yield Sample("fast gelu", "npu_fast_gelu", (x,))
    yield Sample("swiglu", "npu_swiglu", (x,))
    yield Sample("geglu", "npu_geglu", (x,))
    heads, angle = rand(1, 5, 2, 32), rand(1, 5, 1, 16, dtype=FP32)
    cos, sin = (t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin()))
    yield Sample("rope", "npu_rotary_mul", (heads.float(), cos, sin), {"rotary_mode": "interleave"})
    yield Sample("rope in bf16", "npu_rotary_mul", (heads, cos, sin, "interleave"))
    yield Sample("rope by halves", "npu_rotary_mul", (heads, cos, sin))
    yield Sample("layernorm", "mindiesd::layernorm", (x, [64], gamma, gamma, 1e-6))


def _attention() -> Iterator[Sample]:
    q, k, v = (rand(1, 2, n, 32, seed=n) for n in (7, 9, 9))
    scale = {"scale": 32**-0.5}
    fusion = "npu_fusion_attention"
    yield Sample("attention", fusion, (q, k, v, 2, "BNSD"), scale)
    keep = torch.arange(9).expand(7, 9) < 6
    yield Sample("attention with a mask", fusion, (q, k, v, 2, "BNSD"), {**scale, "atten_mask": ~keep})
    yield Sample("attention BSND", fusion, (*(t.mT.permute(0, 3, 1, 2) for t in (q, k, v)), 2, "BSND"), scale)
    flat = [t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    yield Sample("attention BSH", fusion, (*flat, 2, "BSH"), scale)
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    ends = {"actual_seq_qlen": [3, 7], "actual_seq_kvlen": [4, 9]}
    yield Sample("attention TND", fusion, (*packed, 2, "TND"), {**scale, **ends})
    first, second = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
    yield Sample("infer", first, (q, k, v), {**scale, "num_heads": 2, "input_layout": "BNSD"})
    named = {"num_query_heads": 2, "softmax_scale": 32**-0.5}
    yield Sample("infer v2", second, (q, k, v), {**named, "input_layout": "BNSD", "return_softmax_lse": True})
    yield Sample("infer v2 to BSND", second, (q, k, v), {**named, "input_layout": "BNSD_BSND"})
    contiguous = [t.contiguous() for t in packed]
    yield Sample("infer v2 TND", second, tuple(contiguous), {**named, **ends, "input_layout": "TND"})
    update = [rand(6, dtype=FP32, seed=s) for s in (1, 2)], [rand(6, 32, seed=s) for s in (1, 2)]
    yield Sample("attention_update", "npu_attention_update", (*update, 1))


def _rows(a5: bool) -> Iterator[Sample]:
    x, w = rand(5, 96), rand(16, 96, seed=1)
    qdata, scale = call("npu_dynamic_quant", x)
    weight, weight_scale = call("npu_dynamic_quant", w)
    yield Sample("int8", "npu_dynamic_quant", (x,))
    yield Sample("int8, smoothed", "npu_dynamic_quant", (x,), {"smooth_scales": rand(96).abs()})
    yield Sample("int8, per tensor", "npu_dynamic_quant", (x,), {"quant_mode": "pertensor"})
    yield Sample("static int8", "npu_quantize", (x, rand(96).abs() + 1, None, torch.qint8, -1))
    matmul, options = "npu_quant_matmul", {"pertoken_scale": scale, "output_dtype": 15}
    yield Sample(
        "int8 matmul", matmul, (qdata, weight.t(), weight_scale.to(BF16)), {**options, "bias": rand(16)}
    )
    float32_bias = {**options, "bias": rand(16, dtype=FP32)}
    yield Sample("int8 matmul, float32", matmul, (qdata, weight.t(), weight_scale), float32_bias)
    yield Sample(
        "int8 matmul to fp16", matmul, (qdata, weight.t(), weight_scale), {**options, "output_dtype": 5}
    )
    yield Sample("static int8 matmul", matmul, (qdata, weight.t(), weight_scale), {"output_dtype": 5})
    tiles = {"group_sizes": [1, 128, 128], "output_dtype": BF16, "bias": rand(256, dtype=FP32)}
    tiles["pertoken_scale"] = rand(5, 4, dtype=FP32).abs()
    blocks = [torch.ones(n, 512, dtype=torch.int8) for n in (5, 256)]
    tile_scale = rand(2, 4, dtype=FP32).abs()
    yield Sample("int8 matmul in blocks", matmul, (blocks[0], blocks[1].t(), tile_scale.t()), tiles)
    param = call("npu_trans_quant_param", weight_scale)
    yield Sample("static int8 matmul, packed scale", matmul, (qdata, weight.t(), param), {"output_dtype": 5})
    if a5:
        yield Sample("int8 matmul, NZ", matmul, (qdata, weight, weight_scale), options, nz=1)
    yield Sample("int8 weight", "npu_weight_quant_batchmatmul", (x, weight.t(), weight_scale.to(BF16)))


def _casts(a5: bool) -> Iterator[Sample]:
    x = rand(4, 64)
    yield Sample("cast", "npu_dtype_cast", (x, torch.float16))
    yield Sample("cast to FP4", "npu_dtype_cast", (x, FP4_E2M1))
    yield Sample("format", "get_npu_format", (x,))
    yield Sample("to ND", "npu_format_cast", (x, 2))
    ints = torch.arange(64, dtype=torch.int32).view(4, 16) % 16 - 8
    yield Sample("int4", "npu_convert_weight_to_int4pack", (ints,))
    if a5:
        yield Sample("to NZ", "npu_format_cast", (x, 29))


def _quantizers() -> Iterator[Sample]:
    x, mx = rand(5, 96), "npu_dynamic_mx_quant"
    yield Sample("mxfp8", mx, (x,), {"dst_type": FP8_E4M3})
    yield Sample("mxfp8, algorithm 1", mx, (x,), {"dst_type": FP8_E4M3, "scale_alg": 1})
    yield Sample("mxfp8 e5m2", mx, (x,), {"dst_type": 291})
    yield Sample("mxfp8 of a torch dtype", mx, (x.float(),), {"dst_type": torch.float8_e4m3fn})
    yield Sample("mxfp4", mx, (x,))
    yield Sample("mxfp4, algorithm 2", mx, (x,), {"dst_type": FP4_E2M1, "scale_alg": 2})
    yield Sample("mxfp4, 7.25", mx, (x,), {"dst_type": FP4_E2M1, "scale_alg": 2, "dst_type_max": 7.25})
    yield Sample("mxfp4 along tokens", mx, (rand(70, 96),), {"axis": 0})
    yield Sample("mxfp4 e1m2", mx, (x.half(),), {"dst_type": 297, "round_mode": "floor"})
    yield Sample("dual level", "npu_dynamic_dual_level_mx_quant", (rand(3, 640),))
    smooth = {"smooth_scale": rand(640).abs()}
    yield Sample("dual level, smoothed", "npu_dynamic_dual_level_mx_quant", (rand(3, 640),), smooth)
    qdata, scale = call(mx, x, dst_type=FP8_E4M3)
    yield Sample("values again", "npu_anti_mx_quant", (qdata, scale))
    yield Sample("fp8", "npu_dynamic_quant", (x,), {"dst_type": torch.float8_e4m3fn})
    block = {"dst_type": FP8_E4M3, "row_block_size": 128, "col_block_size": 128}
    yield Sample("fp8 in blocks", "npu_dynamic_block_quant", (rand(2, 200, 128),), block)
    gamma = rand(96, dtype=FP32)
    yield Sample("rms_norm, mxfp8", "npu_rms_norm_dynamic_mx_quant", (x, gamma), {"dst_type": FP8_E4M3})
    yield Sample("add_rms_norm, mxfp4", "npu_add_rms_norm_dynamic_mx_quant", (x, x, gamma))


def _mx_matmuls() -> Iterator[Sample]:
    x, w, matmul = rand(6, 160), rand(32, 160, seed=1), "npu_quant_matmul"
    q8, s8 = call("npu_dynamic_mx_quant", x, dst_type=FP8_E4M3)
    w8, ws8 = call("npu_dynamic_mx_quant", w, dst_type=FP8_E4M3)
    q4, s4 = call("npu_dynamic_mx_quant", x)
    w4, ws4 = call("npu_dynamic_mx_quant", w, scale_alg=2, dst_type_max=7.0)
    bias = rand(32, dtype=FP32)
    scales = dict.fromkeys(("scale_dtype", "pertoken_scale_dtype"), SCALE_E8M0)
    options = {**scales, "output_dtype": BF16, "group_sizes": [1, 1, 32], "bias": bias}
    mx8 = {**options, "pertoken_scale": s8}
    fp4 = {**options, "pertoken_scale": s4, "x1_dtype": FP4_E2M1, "x2_dtype": FP4_E2M1}
    yield Sample("mxfp8 matmul", matmul, (q8, w8.t(), ws8.transpose(0, 1)), mx8)
    deep = {**mx8, "pertoken_scale": s8[None], "bias": None, "output_dtype": FP32}
    yield Sample("mxfp8 matmul of 3 axes", matmul, (q8[None], w8.t(), ws8.transpose(0, 1)), deep)
    yield Sample("mxfp8 matmul, NZ", matmul, (q8, w8, ws8.transpose(0, 1)), mx8, nz=1)
    yield Sample("mxfp4 matmul", matmul, (q4, w4.t(), ws4.transpose(0, 1)), fp4)
    yield Sample("mxfp4 matmul, NZ", matmul, (q4, w4, ws4.transpose(0, 1)), fp4, nz=1, packed=True)
    w4a8 = {**mx8, "x2_dtype": FP4_E2M1, "bias": bias.to(BF16)[None], "group_sizes": [0, 0, 32]}
    yield Sample("w4a8 matmul", matmul, (q8, w4.t(), ws4.transpose(0, 1)), w4a8)
    same = {**w4a8, "group_sizes": [1, 1, 32]}
    yield Sample("w4a8 matmul, NZ", matmul, (q8, w4, ws4.transpose(0, 1)), same, nz=1, packed=True)
    f8, fs = call("npu_dynamic_quant", x, dst_type=FP8_E4M3)
    g8, gs = call("npu_dynamic_quant", w, dst_type=FP8_E4M3)
    row = {"pertoken_scale": fs, "output_dtype": BF16, "bias": bias}
    yield Sample("fp8 matmul", matmul, (f8, g8.t(), gs), row)
    tile_scale = rand(6, 2, dtype=FP32).abs()
    tiles = {"pertoken_scale": tile_scale, "output_dtype": BF16, "group_sizes": [1, 128, 128]}
    yield Sample("fp8 matmul in blocks", matmul, (f8, g8.t(), rand(1, 2, dtype=FP32).abs().t()), tiles)
    dual = "npu_dynamic_dual_level_mx_quant"
    q, s0, s1 = call(dual, rand(6, 640))
    wd, w0, w1 = call(dual, rand(32, 640, seed=1))
    args = (q, wd, s0, w0.t().contiguous(), s1, w1)
    yield Sample("dual matmul", "npu_dual_level_quant_matmul", args, {"bias": bias}, nz=1, packed=True)


def _only_a5() -> Iterator[Sample]:
    x, rows = rand(2, 6, 64), rand(2, 64)
    yield Sample("adaln", "mindiesd::adaln_v2", (x, rows, rows, None, None, 1e-6))
    heads, cos, mode = rand(1, 5, 2, 32), rand(1, 5, 1, 32), {"rotary_mode": "interleave"}
    yield Sample("rope of both", "npu_apply_rotary_pos_emb", (heads.clone(), heads.clone(), cos, cos), mode)
    fp8 = [_blocks(rand(2, 300, 128, seed=s), rows) for s, rows in ((1, 128), (2, 256), (3, 256))]
    modes = {f"{n}_quant_mode": 7 for n in ("query", "key", "value")}
    scaled = {f"dequant_scale_{n}": s for n, (_, s) in zip(("query", "key", "value"), fp8, strict=True)}
    named = {"num_query_heads": 2, "softmax_scale": 128**-0.5, "input_layout": "BNSD", "out_dtype": BF16}
    infer = "fused_infer_attention_score_v2"
    for name in (f"npu_{infer}", f"mindiesd::{infer}"):
        qdata = tuple(t for t, _ in fp8)
        yield Sample(f"{name}, fp8", name, qdata, {**modes, **scaled, **named, "return_softmax_lse": True})
    yield _mxfp8_attention(f"npu_{infer}")
    q = rand(1, 2, 300, 64)
    mask = torch.ones(1, 2, 3, 3, dtype=torch.int8).triu()
    sparse = {"block_sparse_mask": mask, "num_key_value_heads": 2, "scale_value": 0.125, "inner_precise": 4}
    yield Sample("sparse attention", "mindiesd::block_sparse_attention", (q, q, q), sparse)


def _mxfp8_attention(name: str) -> Sample:
    tensors = [rand(n, 2, 64, seed=n) for n in (40, 70, 70)]
    axes, roles = (-1, -1, 0), ("query", "key", "value")
    pairs = [
        call("npu_dynamic_mx_quant", t, axis=axis, dst_type=FP8_E4M3)
        for t, axis in zip(tensors, axes, strict=True)
    ]
    options: dict[str, Any] = {"num_query_heads": 2, "softmax_scale": 0.125, "input_layout": "TND"}
    options |= {"actual_seq_qlen": [40], "actual_seq_kvlen": [70], "out_dtype": BF16}
    for role, mode, (_, scale) in zip(roles, (6, 6, 8), pairs, strict=True):
        options |= {f"{role}_quant_mode": mode, f"dequant_scale_{role}": scale}
        options |= {f"{role}_dtype": torch.float8_e4m3fn, f"dequant_scale_{role}_dtype": SCALE_E8M0}
    qdata = tuple(q for q, _ in pairs)
    return Sample(f"{name}, mxfp8", name, qdata, {**options, "return_softmax_lse": True})


def _blocks(t: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    size = {"row_block_size": rows, "col_block_size": 128}
    qdata, scale = call("npu_dynamic_block_quant", t, dst_type=FP8_E4M3, **size)
    return qdata[None], scale[None]


def _only_a2_a3() -> Iterator[Sample]:
    x, rows = rand(2, 6, 64), rand(2, 1, 64)
    yield Sample("adaln", "mindiesd::adaln", (x, rows, rows, None, None, 1e-6))
    yield Sample("layer_norm_eval", "npu_layer_norm_eval", (x, [64]))
    yield Sample("silu", "npu_silu", (x,))
    q = rand(1, 2, 300, 64)
    named = {"num_heads": 2, "scale_value": 0.125, "input_layout": "BNSD"}
    yield Sample("prompt attention", "npu_prompt_flash_attention", (q, q, q), named)
    mask = torch.ones(1, 2, 3, 3, dtype=torch.int8).triu()
    sparse = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD", "num_key_value_heads": 2}
    options = {**sparse, "scale_value": 0.125, "inner_precise": 0}
    yield Sample("sparse attention", "npu_block_sparse_attention", (q, q, q, mask, [128, 128]), options)
    laser = rand(1, 2, 256, 128, dtype=torch.float16)
    options = {"scale_value": 128**-0.5, "head_num": 2}
    yield Sample("laser attention", "mindiesd::la", (laser, laser, laser), options)
    packed = rand(300, 2, 64)
    index = torch.arange(3).expand(3, 2, 3).contiguous()
    rain = (packed, packed, packed, index, torch.full((3, 2), 2), [128, 128])
    yield Sample("rain fusion", "mindiesd::rainfusionattention", rain, {"head_num": 2, "scale": 0.125})
