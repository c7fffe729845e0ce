"""Wrong calls for test_contract: correct calls with one change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

npu, mindie = torch.ops.npu, torch.ops.mindiesd
E8M0, E2M1, E4M3 = 293, 296, 292
BF16 = torch.bfloat16


def rand(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def mx_quant(**kwargs: Any) -> Any:
    """A correct MXFP8 quantization with changes."""
    x = kwargs.pop("input", None)
    return npu.npu_dynamic_mx_quant(rand(4, 96) if x is None else x, **{"dst_type": E4M3, **kwargs})


def mxfp8(change: Callable[[dict[str, Any]], Any] = lambda a: None, **kwargs: Any) -> Any:
    """A correct MXFP8 matmul [6, 160] x [32, 160] with changes."""
    (q, s), (w, ws) = (npu.npu_dynamic_mx_quant(rand(n, 160), dst_type=E4M3) for n in (6, 32))
    arguments = {
        "x1": q,
        "x2": w.transpose(0, 1),
        "scale": ws.transpose(0, 1),
        "pertoken_scale": s,
        "scale_dtype": E8M0,
        "pertoken_scale_dtype": E8M0,
        "output_dtype": BF16,
        "group_sizes": [1, 1, 32],
    } | kwargs
    change(arguments)
    return npu.npu_quant_matmul(**arguments)


def fp4(change: Callable[[dict[str, Any]], Any] = lambda a: None, **kwargs: Any) -> Any:
    """A correct MXFP4 matmul with changes."""
    (q, s), (w, ws) = (npu.npu_dynamic_mx_quant(rand(n, 160)) for n in (6, 32))
    correct = {"x1": q, "x2": w.t(), "scale": ws.transpose(0, 1), "pertoken_scale": s}
    return mxfp8(change, **{**correct, "x1_dtype": E2M1, "x2_dtype": E2M1, **kwargs})


def w4a8(change: Callable[[dict[str, Any]], Any] = lambda a: None, **kwargs: Any) -> Any:
    """A correct W4A8 matmul with changes."""
    w, ws = npu.npu_dynamic_mx_quant(rand(32, 160))
    correct = {"x2": w.t(), "scale": ws.transpose(0, 1), "x2_dtype": E2M1, "group_sizes": [0, 0, 32]}
    return mxfp8(change, **{**correct, **kwargs})


def int8(change: Callable[[dict[str, Any]], Any] = lambda a: None, **kwargs: Any) -> Any:
    """A correct int8 matmul with changes."""
    (q, s), (w, ws) = (npu.npu_dynamic_quant(rand(n, 64)) for n in (6, 32))
    arguments = {"x1": q, "x2": w.t(), "scale": ws, "pertoken_scale": s, "output_dtype": BF16} | kwargs
    change(arguments)
    return npu.npu_quant_matmul(**arguments)


def int8_blocks(change: Callable[[dict[str, Any]], Any] = lambda a: None, **kwargs: Any) -> Any:
    """A correct int8 matmul with a scale per 128 x 128, with changes."""
    q, w = (torch.ones(n, 512, dtype=torch.int8) for n in (6, 256))
    arguments: dict[str, Any] = {"x1": q, "x2": w.t(), "scale": torch.ones(2, 4).t()}
    arguments["pertoken_scale"] = torch.ones(6, 4)
    arguments |= {"bias": torch.zeros(256), "output_dtype": BF16, "group_sizes": [1, 128, 128]} | kwargs
    change(arguments)
    return npu.npu_quant_matmul(**arguments)


def dual(change: Callable[[list[Any]], Any] = lambda a: None, **kwargs: Any) -> Any:
    """A correct dual-level matmul with changes."""
    (q, s0, s1), (w, w0, w1) = (npu.npu_dynamic_dual_level_mx_quant(rand(n, 640)) for n in (6, 32))
    weight = npu.npu_format_cast(w.view(torch.int8), 29, customize_dtype=torch.int8)
    arguments = [q, weight, s0, w0.t().contiguous(), s1, w1]
    change(arguments)
    return npu.npu_dual_level_quant_matmul(*arguments, **kwargs)


def nd_weight() -> Any:
    (q, s0, s1), (w, w0, w1) = (npu.npu_dynamic_dual_level_mx_quant(rand(n, 640)) for n in (6, 32))
    return npu.npu_dual_level_quant_matmul(q, w, s0, w0.t().contiguous(), s1, w1)


def rotate(x: Tensor | None = None, cos: Tensor | None = None, mode: str = "interleave") -> Any:
    x, cos = rand(1, 5, 2, 32) if x is None else x, rand(1, 5, 1, 32) if cos is None else cos
    return npu.npu_rotary_mul(x, cos, cos, rotary_mode=mode)


def fusion(q: Tensor | None = None, heads: int = 2, layout: str = "BNSD", **kwargs: Any) -> Any:
    q = rand(1, 2, 6, 32) if q is None else q
    return npu.npu_fusion_attention(q, q, q, heads, layout, **{"scale": 32**-0.5, **kwargs})


ROLES = ("query", "key", "value")


def infer(q: Tensor | None = None, **kwargs: Any) -> Any:
    q = rand(1, 2, 6, 32) if q is None else q
    defaults = {"num_query_heads": 2, "softmax_scale": 32**-0.5, "input_layout": "BNSD"}
    return npu.npu_fused_infer_attention_score_v2(q, q, q, **{**defaults, **kwargs})


def infer_fp8(rows: int = 256, **kwargs: Any) -> Any:
    """Query, key and value with 300 tokens, in tiles of `rows`; the query needs 128."""
    t = rand(2, 300, 64)
    qdata, scale = npu.npu_dynamic_block_quant(t, dst_type=292, row_block_size=rows, col_block_size=128)
    options = {f"{role}_quant_mode": 7 for role in ROLES} | {
        f"dequant_scale_{role}": scale[None] for role in ROLES
    }
    defaults = {"num_query_heads": 2, "softmax_scale": 0.125, "input_layout": "BNSD", "out_dtype": 15}
    return npu.npu_fused_infer_attention_score_v2(*[qdata[None]] * 3, **{**defaults, **options, **kwargs})


def infer_mxfp8(axis: int = -1) -> Any:
    """Query, key and value quantized along one axis; the value needs axis 0."""
    qdata, scale = npu.npu_dynamic_mx_quant(rand(40, 2, 64), axis=axis, dst_type=292)
    options = {f"{role}_quant_mode": mode for role, mode in zip(ROLES, (6, 6, 8), strict=True)}
    options |= {f"dequant_scale_{role}": scale for role in ROLES}
    options |= {f"dequant_scale_{role}_dtype": 293 for role in ROLES}
    ends = {"actual_seq_qlen": [40], "actual_seq_kvlen": [40]}
    named = {"num_query_heads": 2, "softmax_scale": 0.125, "input_layout": "TND", "out_dtype": 15}
    return npu.npu_fused_infer_attention_score_v2(*[qdata] * 3, **{**named, **ends, **options})


def adaln(**kwargs: Any) -> Any:
    correct = {"x": rand(2, 6, 32), "scale": rand(2, 32), "shift": rand(2, 32), "epsilon": 1e-6}
    return mindie.adaln_v2(**{**correct, **kwargs})


def sparse(**kwargs: Any) -> Any:
    q, mask = rand(1, 2, 300, 64), torch.ones(1, 2, 3, 3, dtype=torch.int8)
    correct = {"block_sparse_mask": mask, "num_key_value_heads": 2, "scale_value": 0.125, "inner_precise": 4}
    return mindie.block_sparse_attention(q, q, q, **{**correct, **kwargs})


def set_to(key: Any, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def apply(arguments: Any) -> None:
        arguments[key] = change(arguments[key])

    return apply


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


Case = tuple[str, Callable[[], Any], str, str]

# (name, call, pattern of the refusal, pattern of the fix)
MX_QUANT: list[Case] = [
    (
        "axis",
        lambda: mx_quant(axis=2),
        r"Parameter axis is out of input dimension range \[-2, 1\]",
        "axis=-1",
    ),
    (
        "block",
        lambda: mx_quant(block_size=48),
        r"Parameter block_size must be divisible by 32 and no great",
        "omit",
    ),
    (
        "block 64 of float32",
        lambda: mx_quant(input=rand(4, 96).float(), block_size=64),
        "block_size=64 for",
        "omit",
    ),
    (
        "algorithm 2 of fp8",
        lambda: mx_quant(scale_alg=2),
        "Invalid scale_alg value: 2 for e4m3",
        "1 is for FP8",
    ),
    (
        "algorithm 1 of fp4",
        lambda: mx_quant(dst_type=E2M1, scale_alg=1),
        "Invalid scale_alg value: 1",
        "2 for float4",
    ),
    (
        "rounding of fp8",
        lambda: mx_quant(round_mode="floor"),
        "round_mode='floor' for e4m3",
        'round_mode="rint"',
    ),
    (
        "odd fp4",
        lambda: mx_quant(input=rand(4, 33), dst_type=E2M1),
        "last dim of input must be divisible by 2",
        "another format",
    ),
    (
        "torch fp4",
        lambda: mx_quant(dst_type=torch.float4_e2m1fn_x2),
        r"float4_e2m1fn_x2 \(45\)",
        "number 296",
    ),
    ("int dtype", lambda: mx_quant(dst_type=torch.int8), r"dst_type=torch.int8 \(1\)", "pass the number 296"),
    (
        "dst_type_max",
        lambda: mx_quant(dst_type=E2M1, scale_alg=2, dst_type_max=5.0),
        "dst_type_max=5 for",
        "omit",
    ),
    (
        "low bound",
        lambda: mx_quant(max_low_bound=1.0),
        "max_low_bound=1 with scale_alg=0",
        "omit max_low_bound",
    ),
    ("integers", lambda: mx_quant(input=torch.ones(4, 96).int()), "input .* of torch.int32", "bfloat16"),
    (
        "short float32",
        lambda: mx_quant(input=torch.ones(4, 16)),
        "float32 input with 16 values",
        "cast to bf",
    ),
    (
        "dual of float32",
        lambda: npu.npu_dynamic_dual_level_mx_quant(torch.ones(2, 512)),
        "input of torch.float32",
        "cast the activation",
    ),
    (
        "dual smooth dtype",
        lambda: npu.npu_dynamic_dual_level_mx_quant(rand(2, 512), smooth_scale=torch.ones(512)),
        "smooth_scale",
        "multiply the activation before",
    ),
    (
        "one axis",
        lambda: npu.npu_dynamic_quant(rand(8)),
        "Input shape dim should be greater than 1",
        "unsqueeze",
    ),
    (
        "int8 of float32",
        lambda: npu.npu_dynamic_quant(torch.ones(2, 8)),
        "input of torch.float32",
        "cast the",
    ),
    ("int4", lambda: npu.npu_dynamic_quant(rand(2, 8), dst_type=torch.quint4x2), "quint4x2", "no int4"),
    (
        "tiles of 4 axes",
        lambda: npu.npu_dynamic_block_quant(rand(1, 2, 200, 128), dst_type=E4M3, row_block_size=128),
        "Expected x to have 2 or 3 dimensions, but got 4",
        "squeeze the batch",
    ),
]

OTHERS: list[Case] = [
    (
        "gamma",
        lambda: npu.npu_rms_norm(rand(2, 64), rand(32)),
        r"gamma \(32,\) for an input",
        "before the heads",
    ),
    (
        "gamma dtype",
        lambda: npu.npu_rms_norm(rand(2, 64), rand(64).half()),
        "gamma of torch.float16",
        "gamma.to",
    ),
    (
        "mode string",
        lambda: rotate(mode="interleaved"),
        "should be half or interleave, but got interleaved",
        '"interleave"',
    ),
    (
        "half table",
        lambda: rotate(cos=rand(1, 5, 1, 16)),
        r"cos \(1, 5, 1, 16\) for heads of 32",
        "repeat_interleave",
    ),
    ("table of heads", lambda: rotate(cos=rand(1, 5, 2, 32)), "varies along 2 axes", "one table for all"),
    ("heads not split", lambda: rotate(x=rand(5, 64), cos=rand(5, 64)), "self .5, 64.", "unflatten"),
    ("batch x heads", lambda: rotate(rand(50, 5, 20, 32)), "batch x heads = 1000", "one sample at a time"),
    (
        "default scale",
        lambda: fusion(scale=1.0),
        "scale=1, which is its default",
        r"scale=q.shape\[-1\] \*\* -0.5",
    ),
    (
        "additive mask",
        lambda: fusion(atten_mask=torch.zeros(6, 6)),
        "atten_mask of torch.float32",
        "atten_mask=~keep",
    ),
    ("mask polarity", lambda: fusion(atten_mask=torch.ones(6, 6) > 0), "leaves no key", "atten_mask=~keep"),
    (
        "causal keep mask",
        lambda: fusion(atten_mask=torch.ones(6, 6).tril() > 0),
        "leaves no key",
        "atten_mask=~keep",
    ),
    (
        "mask of keys",
        lambda: fusion(atten_mask=torch.zeros(1, 1, 1, 6) > 0),
        r"atten_mask \(1, 1, 1, 6\)",
        "expand",
    ),
    ("heads", lambda: fusion(heads=4), "head_num=4", "number of heads"),
    ("layout", lambda: fusion(layout="BSNH"), "input_layout should be BSH/SBH/BNSD/BSND/TND", "BNSD"),
    ("axes", lambda: fusion(layout="BSH"), r"queryDims\(4\) must be 3", "pass the layout"),
    ("dropout", lambda: fusion(keep_prob=0.9), "keep_prob=0.9", "omit keep_prob"),
    (
        "packed without ends",
        lambda: fusion(rand(6, 2, 32), layout="TND"),
        "actual_seq_qlen and actual_seq_kv",
        "cu_seq",
    ),
    (
        "leading zero",
        lambda: fusion(rand(6, 2, 32), layout="TND", actual_seq_qlen=[0, 6], actual_seq_kvlen=[0, 6]),
        "actual_seq_qlen=",
        "cu_seqlens.1:.",
    ),
    (
        "not contiguous",
        lambda: infer(rand(1, 6, 2, 32).transpose(1, 2)),
        "query .* with strides",
        r"contiguous\(\)",
    ),
    ("head of 20", lambda: infer(rand(1, 2, 6, 20)), "heads of 20", "pad the head size"),
    (
        "infer scale",
        lambda: infer(softmax_scale=1.0),
        "softmax_scale=1, which is its default",
        "softmax_scale=q",
    ),
    (
        "modes of bf16",
        lambda: infer(query_quant_mode=7),
        r"quant modes \(7, 0, 0\)",
        "omit the quant modes",
    ),
    ("tiles of 256 queries", infer_fp8, r"block scales \[\(1, 2, 2, 1\)", "row_block_size=128"),
    ("fp8 of two samples", lambda: infer_fp8(input_layout="BSND"), "layout BSND", "unsqueeze"),
    ("values along D", infer_mxfp8, r"MX scales \[\(40, 2, 1, 2\)", "axis=0"),
    (
        "modulation dtype",
        lambda: adaln(scale=torch.ones(2, 32)),
        "scale of torch.float32 for x of",
        "once per step",
    ),
    ("modulation per token", lambda: adaln(scale=rand(2, 6, 32)), r"scale \(2, 6, 32\)", "split tokens"),
    ("sparse precision", lambda: sparse(inner_precise=0), "inner_precise=0 on a5", "inner_precise=4"),
    ("sparse blocks", lambda: sparse(block_shape=[128, 64]), "must be a multiple of 128", "128, 128"),
    (
        "sparse mask",
        lambda: sparse(block_sparse_mask=torch.ones(1, 2, 2, 3, dtype=torch.int8)),
        "block_sparse_mask",
        "last",
    ),
    (
        "sparse row",
        lambda: sparse(block_sparse_mask=torch.zeros(1, 2, 3, 3, dtype=torch.int8)),
        "a row of zeros",
        "diagonal",
    ),
    ("gelu", lambda: npu.npu_gelu(rand(4), approximate="fast"), "approximate='fast'", 'approximate="tanh"'),
    ("odd swiglu", lambda: npu.npu_swiglu(rand(4, 5)), "should be divisible by 2, but get .5.", "two halves"),
    (
        "one column",
        lambda: npu.npu_format_cast(rand(8, 1), 29),
        r"FRACTAL_NZ of \(8, 1\)",
        "keep this weight in ND",
    ),
    (
        "customized bytes",
        lambda: npu.npu_format_cast(torch.ones(32, 64, dtype=torch.uint8), 29, customize_dtype=torch.int8),
        "customize_dtype=torch.int8",
        r"w.view\(torch.int8\)",
    ),
    (
        "transposed FRACTAL_NZ",
        lambda: npu.npu_format_cast(npu.npu_format_cast(rand(32, 64), 29).t(), 2),
        "does not support non-contiguous tensor with internal format FRACTAL_NZ",
        "transpose it back",
    ),
    ("other format", lambda: npu.npu_format_cast(rand(8, 8), 4), "acl_format=4", "CANN chooses"),
    (
        "odd cast",
        lambda: npu.npu_dtype_cast(rand(2, 5), E2M1),
        "last dim of input must be divisible by 2",
        "another format",
    ),
    (
        "cast to hifloat8",
        lambda: npu.npu_dtype_cast(rand(2, 4), 290),
        r"Parameter\(dtype\) enum value:290 not found in TORCH_DTYPE_ENUM_VALUE_TO_SCALAR_TYPE_MAP",
        "no int4",
    ),
    (
        "static axis",
        lambda: npu.npu_quantize(rand(4, 8), torch.ones(8), None, torch.qint8, 0),
        "scales .8,.",
        "axis=-1",
    ),
    (
        "weight scale",
        lambda: npu.npu_weight_quant_batchmatmul(rand(4, 8), torch.ones(8, 16).char(), torch.ones(16)),
        "antiqu",
        "pass antiquant_group_size",
    ),
    (
        "not computed",
        lambda: npu.npu_incre_flash_attention(*[rand(1, 1, 8)] * 3),
        "npu_incre_flash_attention is defi",
        "card",
    ),
    (
        "in the other namespace",
        lambda: mindie.frequency_regulator(1),
        "mindiesd.frequency_regulator is defined but",
        "card",
    ),
]

A2: list[Case] = [
    (
        "int8 blocks, K",
        lambda: int8_blocks(
            x1=torch.ones(6, 384, dtype=torch.int8),
            x2=torch.ones(256, 384, dtype=torch.int8).t(),
            scale=torch.ones(2, 3).t(),
            pertoken_scale=torch.ones(6, 3),
        ),
        "G-B Scene: K = 384 and N = 256",
        "pad",
    ),
    (
        "int8 blocks, x2 [K, N]",
        lambda: int8_blocks(lambda a: a.update(x2=a["x2"].contiguous(), scale=a["scale"].contiguous())),
        "Only transposeX2 = true",
        r"weight_scale.t\(\)",
    ),
    ("int8 blocks, no bias", lambda: int8_blocks(bias=None), "no bias with 128 x 128", "zeros"),
    (
        "mx_quant",
        lambda: mx_quant(),
        "call aclnnDynamicMxQuantV3 failed, error code is 361001",
        "int8 and int8_block are native",
    ),
    (
        "dual quant",
        lambda: npu.npu_dynamic_dual_level_mx_quant(rand(2, 512)),
        "DualLevelMxQuant failed",
        "run with emulate",
    ),
    (
        "fp8 quant",
        lambda: npu.npu_dynamic_quant(rand(2, 64), dst_type=E4M3),
        "npu_dynamic_quant fp8 on a2",
        "run with emulate",
    ),
    (
        "dual matmul",
        lambda: npu.npu_dual_level_quant_matmul(*[torch.ones(2, 32, dtype=torch.int8)] * 6),
        "This interface is supported only on the Ascend950 platform and after.",
        "run with emulate",
    ),
    (
        "customize_dtype",
        lambda: npu.npu_format_cast(torch.ones(32, 64, dtype=torch.int8), 29, customize_dtype=torch.int8),
        "customize_dtype is not supported by the current soc version.",
        "CANN 9.1.0",
    ),
    ("adaln_v2", adaln, "aclnnAdaLayerNormV2 failed", "mindiesd::adaln on a2 and a3"),
    ("sparse v2", sparse, "aclnnBlockSparseAttentionV2 failed", "npu_block_sparse_attention"),
    (
        "fused norm",
        lambda: npu.npu_rms_norm_dynamic_mx_quant(rand(2, 64), rand(64)),
        "aclnnRmsNormDynamicMxQuant failed",
        "run with emulate",
    ),
]

A5: list[Case] = [
    (
        "layer_norm_eval",
        lambda: npu.npu_layer_norm_eval(rand(2, 8), [8]),
        "only support aclnn operator, but",
        "layer_norm",
    ),
    (
        "silu",
        lambda: npu.npu_silu(rand(2, 8)),
        "current operator npu_silu do not have aclnn",
        "functional.silu",
    ),
    (
        "prompt attention",
        lambda: npu.npu_prompt_flash_attention(*[rand(1, 2, 6, 32)] * 3),
        "Interface npu_prompt_flash_attention is no longer supported on Ascend950.",
        "npu_fused_infer_attention_score_v2",
    ),
    (
        "adaln",
        lambda: mindie.adaln(rand(1, 2, 8), rand(1, 8), rand(1, 8)),
        "aclnnAdaLayerNorm failed",
        "adaln_v2 on a5",
    ),
    (
        "sparse v1",
        lambda: npu.npu_block_sparse_attention(
            *[rand(1, 2, 128, 64)] * 3, torch.ones(1, 2, 1, 1).char(), [128, 128]
        ),
        "no public document says",
        "mindiesd::block_sparse_attention",
    ),
    (
        "laser",
        lambda: mindie.la(*[rand(1, 2, 256, 128)] * 3),
        "aclnnLaserAttention failed",
        "npu_fusion_attention on a5",
    ),
]
