"""Operators of the twin of each chip, as `torch.ops` has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from behaviour.sources import draw
from behaviour.values import Place, Records, items, outcome, sha


def twin(place: Place) -> Records:
    """The twin of each chip: its schemas, right calls and refused ones, and a fresh count of launches."""
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
            yield from outcome(f"twin/{chip}/{case}", launched, name, args, options)
        yield from items(f"twin/{chip}/launches", json.dumps(ascendit.twin.launches(), sort_keys=True))


def launched(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """One operator by its name below `torch.ops`. Arguments may be functions, for what another one makes."""
    import torch

    space, _, short = name.rpartition(".")
    values = [a() if callable(a) else a for a in args]
    given = {key: a() if callable(a) else a for key, a in options.items()}
    return getattr(getattr(torch.ops, space or "npu"), short)(*values, **given)


def twin_calls() -> dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Case -> operator, arguments, options. Some are refused by some chips, which is recorded as well."""
    import torch

    def rand(*shape: int, seed: int = 0) -> Any:
        return (20 * draw(seed + 9, *shape)).bfloat16()

    def part(index: int, name: str, *args: Any, **options: Any) -> Callable[[], Any]:
        return lambda: launched(name, args, options)[index]

    def turned(value: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: value().transpose(0, 1)

    x, w, gamma, deep = rand(6, 160), rand(32, 160, seed=1), rand(160, seed=2), rand(3, 640)
    heads, rows = rand(1, 5, 2, 32), rand(2, 64)
    q, k, v = (rand(1, 2, n, 64, seed=n) for n in (7, 9, 9))
    angle = rand(1, 5, 1, 32, seed=4)
    mx, e4m3, e8m0, e2m1 = "npu_dynamic_mx_quant", 292, 293, 296
    calls: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
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
        "rope": (
            "npu_rotary_mul",
            (heads.float(), angle.float(), angle.float()),
            {"rotary_mode": "interleave"},
        ),
        "rope by halves": ("npu_rotary_mul", (heads, angle, angle), {}),
        "attention": ("npu_fusion_attention", (q, k, v, 2, "BNSD"), {"scale": 0.125}),
        "attention of 3 heads": ("npu_fusion_attention", (q, k, v, 3, "BNSD"), {"scale": 0.125}),
        "infer": (
            "npu_fused_infer_attention_score_v2",
            (q, k, v),
            {
                "num_query_heads": 2,
                "softmax_scale": 0.125,
                "input_layout": "BNSD",
                "return_softmax_lse": True,
            },
        ),
        "prompt": (
            "npu_prompt_flash_attention",
            (q, k, v),
            {"num_heads": 2, "scale_value": 0.125, "input_layout": "BNSD"},
        ),
        "int8": ("npu_dynamic_quant", (x,), {}),
        "int8 per tensor": ("npu_dynamic_quant", (x,), {"quant_mode": "pertensor"}),
        "int8 smoothed": ("npu_dynamic_quant", (x,), {"smooth_scales": gamma.abs()}),
        "fp8": ("npu_dynamic_quant", (x,), {"dst_type": torch.float8_e4m3fn}),
        "mxfp8": (mx, (x,), {"dst_type": e4m3}),
        "mxfp8 ceil": (mx, (x,), {"dst_type": e4m3, "scale_alg": 1}),
        "mxfp8 e5m2": (mx, (x,), {"dst_type": 291}),
        "mxfp4": (mx, (x,), {"dst_type": e2m1}),
        "mxfp4 max": (mx, (x,), {"dst_type": e2m1, "scale_alg": 2, "dst_type_max": 7.25}),
        "mxfp4 of one axis": (mx, (gamma.double(),), {}),
        "dual level": ("npu_dynamic_dual_level_mx_quant", (deep,), {}),
        "blocks": (
            "npu_dynamic_block_quant",
            (rand(2, 200, 128),),
            {"dst_type": e4m3, "row_block_size": 128, "col_block_size": 128},
        ),
        "cast": ("npu_dtype_cast", (x, torch.float16), {}),
        "format": ("npu_format_cast", (x, 29), {}),
        "nothing of it": ("npu_sort_v2", (x,), {}),
    }
    int8 = turned(part(0, "npu_dynamic_quant", w)), part(1, "npu_dynamic_quant", w)
    token = {"pertoken_scale": part(1, "npu_dynamic_quant", x), "output_dtype": 15}
    matmul, codes = "npu_quant_matmul", part(0, "npu_dynamic_quant", x)
    bias = rand(32, seed=3).float()
    calls["int8 matmul"] = matmul, (codes, *int8), {**token, "bias": bias}
    calls["int8 matmul turned"] = matmul, (codes, part(0, "npu_dynamic_quant", w), int8[1]), token
    blocks = {"scale_dtype": e8m0, "pertoken_scale_dtype": e8m0, "group_sizes": [1, 1, 32], "bias": bias}
    blocks["output_dtype"] = torch.bfloat16
    for case, kind, more in (("mxfp8", e4m3, {}), ("mxfp4", e2m1, {"x1_dtype": e2m1, "x2_dtype": e2m1})):
        weight = [turned(part(i, mx, w, dst_type=kind)) for i in (0, 1)]
        given = {**blocks, **more, "pertoken_scale": part(1, mx, x, dst_type=kind)}
        calls[f"{case} matmul"] = matmul, (part(0, mx, x, dst_type=kind), *weight), given
    return calls
