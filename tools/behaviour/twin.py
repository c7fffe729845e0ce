"""The operators of `torch.ops` on the twin of each chip."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from behaviour.sources import draw
from behaviour.values import Context, Records, items, outcome, sha

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Operator, arguments, options."""
MX, E4M3, E8M0, E2M1 = "npu_dynamic_mx_quant", 292, 293, 296


def twin(context: Context) -> Records:
    """The twin of each chip: its schemas, valid and refused calls, and the count of launches."""
    import torch

    import ascendit.twin

    for chip in ("a2", "a3", "a5"):
        ascendit.twin.enable(chip)
        schemas = sorted(
            str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith(("npu::", "mindiesd::"))
        )
        yield f"twin/{chip}/schemas", f"{len(schemas)}, sha256 {sha(*schemas)}"
        ascendit.twin.reset()
        for case, (name, args, options) in twin_calls().items():
            yield from outcome(f"twin/{chip}/{case}", call_operator, name, args, options)
        yield from items(f"twin/{chip}/launches", json.dumps(ascendit.twin.launches(), sort_keys=True))


def call_operator(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call an operator of `torch.ops` by name. An argument may be a function that computes it."""
    import torch

    space, _, short = name.rpartition(".")
    values = [a() if callable(a) else a for a in args]
    keywords = {key: a() if callable(a) else a for key, a in options.items()}
    return getattr(getattr(torch.ops, space or "npu"), short)(*values, **keywords)


def rand(*shape: int, seed: int = 0) -> Any:
    """Random BF16 values with a standard deviation of 1."""
    return (20 * draw(seed + 9, *shape)).bfloat16()


def part(index: int, name: str, *args: Any, **options: Any) -> Callable[[], Any]:
    """One result of an operator, computed later, while the twin is enabled."""
    return lambda: call_operator(name, args, options)[index]


def transposed(value: Callable[[], Any]) -> Callable[[], Any]:
    """`value` with its first two axes exchanged."""
    return lambda: value().transpose(0, 1)


def twin_calls() -> dict[str, Call]:
    """Valid and wrong calls. Some chips refuse some of them, which is recorded as well."""
    return elementwise() | attention() | quantizers() | matmuls()


def elementwise() -> dict[str, Call]:
    """Norms, activations, rotations, casts."""
    import torch

    x, gamma, heads, rows = rand(6, 160), rand(160, seed=2), rand(1, 5, 2, 32), rand(2, 64)
    angle, interleave = rand(1, 5, 1, 32, seed=4), {"rotary_mode": "interleave"}
    return {
        "rms norm": ("npu_rms_norm", (x, gamma), {"epsilon": 1e-6}),
        "rms norm of float64": ("npu_rms_norm", (x.double(), gamma.double()), {}),
        "rms norm of another width": ("npu_rms_norm", (x, gamma[:32]), {}),
        "add rms norm": ("npu_add_rms_norm", (x, x, gamma), {}),
        "add layer norm": ("npu_add_layer_norm", (x, x, gamma, gamma), {"additional_output": True}),
        "layer norm": ("npu_layer_norm_eval", (x, [160]), {}),
        "mindie layer norm": ("mindiesd.layernorm", (x, [160], gamma, gamma, 1e-6), {}),
        "adaln": ("mindiesd.adaln", (rand(2, 6, 64), rows[:, None], rows[:, None], None, None, 1e-6), {}),
        "adaln v2": ("mindiesd.adaln_v2", (rand(2, 6, 64), rows, rows, None, None, 1e-6), {}),
        **{name: (f"npu_{name}", (x,), {}) for name in ("gelu", "fast_gelu", "swiglu", "geglu", "silu")},
        "gelu tanh": ("npu_gelu", (x,), {"approximate": "tanh"}),
        "rope": ("npu_rotary_mul", (heads.float(), angle.float(), angle.float()), interleave),
        "rope by halves": ("npu_rotary_mul", (heads, angle, angle), {}),
        "cast": ("npu_dtype_cast", (x, torch.float16), {}),
        "format": ("npu_format_cast", (x, 29), {}),
        "nothing of it": ("npu_sort_v2", (x,), {}),
    }


def attention() -> dict[str, Call]:
    """Dense attention."""
    qkv = tuple(rand(1, 2, n, 64, seed=n) for n in (7, 9, 9))
    layout = {"input_layout": "BNSD"}
    infer = {"num_query_heads": 2, "softmax_scale": 0.125, "return_softmax_lse": True}
    return {
        "attention": ("npu_fusion_attention", (*qkv, 2, "BNSD"), {"scale": 0.125}),
        "attention of 3 heads": ("npu_fusion_attention", (*qkv, 3, "BNSD"), {"scale": 0.125}),
        "infer": ("npu_fused_infer_attention_score_v2", qkv, infer | layout),
        "prompt": ("npu_prompt_flash_attention", qkv, {"num_heads": 2, "scale_value": 0.125} | layout),
    }


def quantizers() -> dict[str, Call]:
    """Quantization of activations."""
    import torch

    x, smooth = rand(6, 160), rand(160, seed=2).abs()
    tiles = {"dst_type": E4M3, "row_block_size": 128, "col_block_size": 128}
    return {
        "int8": ("npu_dynamic_quant", (x,), {}),
        "int8 per tensor": ("npu_dynamic_quant", (x,), {"quant_mode": "pertensor"}),
        "int8 smoothed": ("npu_dynamic_quant", (x,), {"smooth_scales": smooth}),
        "fp8": ("npu_dynamic_quant", (x,), {"dst_type": torch.float8_e4m3fn}),
        "mxfp8": (MX, (x,), {"dst_type": E4M3}),
        "mxfp8 ceil": (MX, (x,), {"dst_type": E4M3, "scale_alg": 1}),
        "mxfp8 e5m2": (MX, (x,), {"dst_type": 291}),
        "mxfp4": (MX, (x,), {"dst_type": E2M1}),
        "mxfp4 max": (MX, (x,), {"dst_type": E2M1, "scale_alg": 2, "dst_type_max": 7.25}),
        "mxfp4 of float64": (MX, (smooth.double(),), {}),
        "dual level": ("npu_dynamic_dual_level_mx_quant", (rand(3, 640),), {}),
        "blocks": ("npu_dynamic_block_quant", (rand(2, 200, 128),), tiles),
    }


def matmuls() -> dict[str, Call]:
    """Quantized matmuls."""
    import torch

    x, w, bias = rand(6, 160), rand(32, 160, seed=1), rand(32, seed=3).float()
    row, matmul = "npu_dynamic_quant", "npu_quant_matmul"
    qdata, weight, scale = part(0, row, x), part(0, row, w), part(1, row, w)
    token = {"pertoken_scale": part(1, row, x), "output_dtype": 15}
    calls: dict[str, Call] = {
        "int8 matmul": (matmul, (qdata, transposed(weight), scale), {**token, "bias": bias}),
        "int8 matmul, not turned": (matmul, (qdata, weight, scale), token),
    }
    blocks = {"scale_dtype": E8M0, "pertoken_scale_dtype": E8M0, "group_sizes": [1, 1, 32], "bias": bias}
    blocks["output_dtype"] = torch.bfloat16
    for case, dtype, dtypes in (("mxfp8", E4M3, {}), ("mxfp4", E2M1, {"x1_dtype": E2M1, "x2_dtype": E2M1})):
        args = part(0, MX, x, dst_type=dtype), *(transposed(part(i, MX, w, dst_type=dtype)) for i in (0, 1))
        options = {**blocks, **dtypes, "pertoken_scale": part(1, MX, x, dst_type=dtype)}
        calls[f"{case} matmul"] = matmul, args, options
    return calls
