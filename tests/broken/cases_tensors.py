"""Valid files with wrong tensors."""

from __future__ import annotations

from broken.damage import add, combine, drop, forget, json_file, retype, set_byte, set_float, shrink, weights
from broken.models import MANIFEST, NORM, WEIGHTS, Q
from broken.registry import case

case("tensor_missing", "single", "one norm is missing", drop(NORM), "E-CKP-04")
case("tensor_extra", "single", "a tensor that no Wan model has", add("blocks.0.extra.weight"), "E-CKP-04")
case(
    "tensor_of_block_9",
    "single",
    "one block more than config.json says",
    add("blocks.9.attn1.norm_q.weight"),
    "E-CKP-04",
)
case("tensor_misshapen", "single", "a weight without its last row", shrink(f"{Q}.weight"), "E-CKP-04")
case("tensor_mistyped", "single", "a norm of integers", retype(NORM, "I16"), "E-CKP-04")
case("tensor_no_name", "single", "a tensor whose name is empty", add(""), "E-CKP-04")
case("tensor_name_nul", "single", "a name with a zero byte", add("blocks.0.\0.weight"), "E-CKP-04")
case(
    "linear_mistyped",
    "single",
    "a linear weight of integers, without scale",
    retype(f"{Q}.weight", "I16"),
    "E-CKP-04",
)
case(
    "q_without_k_and_v",
    "single",
    "Q without its K and V",
    drop(*(f"blocks.0.attn1.to_{x}.{r}" for x in "kv" for r in ("weight", "bias"))),
    "E-CKP-04",
)
case(
    "two_names_prefixed",
    "single",
    "one tensor without and with ComfyUI's prefix",
    weights(lambda t: t.update({f"model.diffusion_model.{NORM}": t[NORM]})),
    "E-CKP-09",
)
case(
    "two_names_wan",
    "cascade",
    "one tensor in both namings",
    weights(lambda t: t.update({"proj_out.bias": t["head.head.bias"]}), f"low_noise_model/{WEIGHTS}"),
    "E-CKP-09",
)
case(
    "weights_nan",
    "single",
    "a weight that is NaN",
    weights(lambda t: t.update({f"{Q}.weight": (*t[f"{Q}.weight"][:2], b"\xc0\x7f" * 64 * 64)})),
    "E-QNT-01",
    inspect="",
    repack="",
)

# ---- quantized layers ------------------------------------------------------------------------------

VALUE: dict[str, str] = {"inspect": "", "quantize": "E-QNT-01"}
"""For a fault in the bytes, which `inspect` does not read; `quantize` refuses quantized models."""
case(
    "scale_255",
    "mxfp8",
    "a scale byte 255, which is NaN",
    set_byte(f"{Q}.weight_scale", 255),
    "E-CKP-08",
    **VALUE,
)
case(
    "scale_255_export",
    "export",
    "the same in an export of msModelSlim",
    set_byte("blocks.0.self_attn.q.weight_scale", 255, "quant_model_weight_w8a8_mxfp8.safetensors"),
    "E-CKP-08",
    **VALUE,
)
for _label, _number in (("zero", 0.0), ("nan", float("nan")), ("negative", -1.0), ("infinite", float("inf"))):
    _damage = set_float(f"{Q}.mul_scale", _number)
    case(f"mul_scale_{_label}", "dualscale", f"smoothing that is {_label}", _damage, "E-CKP-08", **VALUE)
for _label, _number in (("nan", float("nan")), ("infinite", float("inf"))):
    _damage = set_float(f"{Q}.weight_dual_scale", _number)
    case(
        f"dual_scale_{_label}", "dualscale", f"a coarse scale that is {_label}", _damage, "E-CKP-08", **VALUE
    )
    _damage = set_float(f"{Q}.weight_scale", _number)
    case(f"int8_scale_{_label}", "int8", f"an int8 scale that is {_label}", _damage, "E-CKP-08", **VALUE)
    _damage = set_float(f"{Q}.weight_scale_inv", _number, 0)
    case(f"tile_scale_{_label}", "tiles", f"a tile's scale that is {_label}", _damage, "E-CKP-08", inspect="")
case(
    "offset_not_zero",
    "int8",
    "an int8 offset of 1",
    set_float(f"{Q}.weight_offset", 1.0),
    "E-CKP-08",
    **VALUE,
)
case(
    "weight_without_scale",
    "mxfp8",
    "a quantized weight without scales",
    forget(f"{Q}.weight_scale"),
    "E-CKP-08",
)
case("scale_without_weight", "mxfp8", "scales without a weight", forget(f"{Q}.weight"), "E-CKP-08")
case(
    "dual_scale_missing",
    "dualscale",
    "fine scales without coarse ones",
    forget(f"{Q}.weight_dual_scale"),
    "E-CKP-08",
)
case(
    "dual_scale_alone",
    "dualscale",
    "coarse scales without fine ones",
    forget(f"{Q}.weight_scale"),
    "E-CKP-08",
)
case(
    "mul_scale_without_weight",
    "dualscale",
    "smoothing without a weight",
    forget(f"{Q}.weight", f"{Q}.weight_scale", f"{Q}.weight_dual_scale"),
    "E-CKP-08",
)
case("offset_without_scale", "int8", "an offset without a scale", forget(f"{Q}.weight_scale"), "E-CKP-08")
case("tile_without_scale", "tiles", "tiled FP8 without scales", drop(f"{Q}.weight_scale_inv"), "E-CKP-08")
case("tile_scale_alone", "tiles", "tile scales without a weight", drop(f"{Q}.weight"), "E-CKP-08")
case(
    "two_scales",
    "tiles",
    "weight_scale and weight_scale_inv",
    add(f"{Q}.weight_scale", ("F32", (64, 1), bytes(256))),
    "E-CKP-08",
)
case("scale_misshapen", "mxfp8", "scales without their last row", shrink(f"{Q}.weight_scale"), "E-CKP-04")
case(
    "tile_scale_misshapen",
    "tiles",
    "one scale for two tiles",
    add("blocks.0.ffn.net.0.proj.weight_scale_inv", ("F32", (1, 2), bytes(8))),
    "E-CKP-04",
)
case("scale_mistyped", "mxfp8", "scales as signed bytes", retype(f"{Q}.weight_scale", "I8"), "E-CKP-07")
case("qdata_mistyped", "mxfp8", "quantized weights as signed bytes", retype(f"{Q}.weight", "I8"), "E-CKP-07")
case(
    "rotation_alone",
    "mxfp8",
    "q_rot without k_rot",
    combine(
        add("blocks.0.attn1.q_rot", ("BF16", (32, 32), bytes(2048))),
        json_file(MANIFEST, lambda m: m.update({"blocks.0.attn1.q_rot": "FLOAT"})),
    ),
    "E-CKP-04",
)
