"""Manifests and configs that are damaged or do not match the tensors."""

from __future__ import annotations

from broken.damage import combine, content, json_file
from broken.models import MANIFEST, NORM, WEIGHTS, Q, load, write_json
from broken.registry import case

# ---- manifest and quantization_config --------------------------------------------------------------

case(
    "manifest_lacks_tensor",
    "mxfp8",
    "a tensor that the manifest does not name",
    json_file(MANIFEST, lambda m: m.pop(NORM)),
    "E-CKP-04",
)
case(
    "manifest_names_nothing",
    "mxfp8",
    "an entry for no tensor",
    json_file(MANIFEST, lambda m: m.update({"blocks.7.attn1.to_q.weight": "FLOAT"})),
    "E-CKP-04",
)
case("manifest_empty", "mxfp8", "a manifest that names nothing", content(MANIFEST, "{}"), "E-CKP-04")
case(
    "manifest_type_unknown",
    "mxfp8",
    "an unknown type",
    json_file(MANIFEST, lambda m: m.update({f"{Q}.weight": "W3A3"})),
    "E-CKP-04",
)
case(
    "manifest_type_number",
    "mxfp8",
    "a type that is a number",
    json_file(MANIFEST, lambda m: m.update({f"{Q}.weight": 8})),
    "E-CKP-06",
)
case("manifest_list", "mxfp8", "a manifest that is a list", content(MANIFEST, "[]"), "E-CKP-06")
case("manifest_not_json", "mxfp8", "a manifest that is not JSON", content(MANIFEST, "{"), "E-CKP-06")
case("manifest_deep", "mxfp8", "a manifest nested 100,000 deep", content(MANIFEST, "[" * 100_000), "E-CKP-06")
case(
    "manifest_twice",
    "mxfp8",
    "a duplicate entry",
    lambda f: content(MANIFEST, (f / MANIFEST).read_text().replace("{", f'{{"{Q}.weight": "FLOAT", ', 1))(f),
    "E-CKP-06",
)
case(
    "manifest_two_names",
    "mxfp8",
    "one tensor in both namings",
    json_file(MANIFEST, lambda m: m.update({"blocks.0.self_attn.q.weight": "FLOAT"})),
    "E-CKP-09",
)
case(
    "manifest_says_float",
    "mxfp8",
    "quantized weights that the manifest calls FLOAT",
    json_file(MANIFEST, lambda m: m.update({f"{Q}.weight": "FLOAT"})),
    "E-CKP-07",
)
case(
    "manifest_other_scheme",
    "mxfp8",
    "MXFP8 that the manifest calls int8",
    json_file(MANIFEST, lambda m: m.update({f"{Q}.weight": "W8A8_DYNAMIC"})),
    "E-CKP-07",
)
case(
    "manifest_and_quantization_config",
    "mxfp8",
    "manifest says MXFP8, config.json MXFP4",
    json_file("config.json", lambda c: c["quantization_config"].update(quant_method="mxfp4")),
    "E-CKP-07",
)
case(
    "manifests_two",
    "mxfp8",
    "two manifests",
    lambda f: content("quant_model_description_w8a8_mxfp8.json", (f / MANIFEST).read_bytes())(f),
    "E-CKP-07",
)
case(
    "manifest_of_floats",
    "single",
    "float weights, and a manifest that calls one MXFP8",
    lambda f: write_json(
        f / MANIFEST, dict.fromkeys(load(f / WEIGHTS), "FLOAT") | {f"{Q}.weight": "W8A8_MXFP8"}
    ),
    "E-CKP-07",
)
case(
    "quantization_config_of_floats",
    "single",
    "float weights, and a quantization_config",
    json_file(
        "config.json",
        lambda c: c.update(
            quantization_config={"quant_method": "int8", "is_checkpoint_int8_serialized": True}
        ),
    ),
    "E-CKP-07",
)
case(
    "quantization_config_list",
    "single",
    "a quantization_config that is a list",
    json_file("config.json", lambda c: c.update(quantization_config=[])),
    "E-CKP-06",
)
case(
    "quantization_config_unknown",
    "single",
    "an unknown quant_method",
    json_file(
        "config.json",
        lambda c: c.update(quantization_config={"quant_method": "awq", "is_checkpoint_awq_serialized": True}),
    ),
    "E-CKP-04",
)
case(
    "quantization_config_ignores_nothing",
    "mxfp8",
    "ignored_layers with a layer that does not exist",
    json_file(
        "config.json", lambda c: c["quantization_config"].update(ignored_layers=["blocks.9.attn1.to_q"])
    ),
    "E-CKP-07",
)
case(
    "export_two",
    "export",
    "two exports in one folder",
    lambda f: content(
        "quant_model_weight_w8a8_dynamic.safetensors",
        (f / "quant_model_weight_w8a8_mxfp8.safetensors").read_bytes(),
    )(f),
    "E-CKP-03",
)
case(
    "export_half_a_set",
    "export",
    "one of two numbered files",
    lambda f: (f / "quant_model_weight_w8a8_mxfp8.safetensors").rename(
        f / "quant_model_weight_w8a8_mxfp8-00001-of-00002.safetensors"
    ),
    "E-CKP-03",
)
case(
    "export_no_weights",
    "export",
    "a manifest alone",
    lambda f: (f / "quant_model_weight_w8a8_mxfp8.safetensors").unlink(),
    "E-CKP-02",
)

# ---- config.json -----------------------------------------------------------------------------------

for _label, _text in {
    "list": "[]",
    "null": "null",
    "number": "3",
    "not_json": "{",
    "empty": "",
    "deep": "[" * 100_000,
    "not_text": "\udcff",
    "long_number": '{"num_layers": ' + "9" * 5000 + "}",
}.items():
    case(
        f"config_{_label}",
        "single",
        f"config.json: {_label.replace('_', ' ')}",
        content("config.json", _text.encode("utf-8", "surrogateescape")),
        "E-CKP-06",
    )
case(
    "config_utf16",
    "single",
    "config.json in UTF-16",
    lambda f: content("config.json", (f / "config.json").read_text().encode("utf-16"))(f),
    "E-CKP-06",
)
case(
    "config_surrogate",
    "single",
    "half a character in config.json",
    json_file("config.json", lambda c: c.update(qk_norm="\ud800")),
    "E-CKP-06",
)
case(
    "config_twice",
    "single",
    "a duplicate value",
    lambda f: content("config.json", (f / "config.json").read_text().replace("{", '{"num_layers": 40, ', 1))(
        f
    ),
    "E-CKP-06",
)
case(
    "config_other_class",
    "single",
    "the config of another model",
    json_file("config.json", lambda c: c.update(_class_name="FluxTransformer2DModel")),
    "E-CKP-01",
)
case(
    "config_other_class_in_pipeline",
    "pipeline",
    "a part of another model",
    json_file("transformer_2/config.json", lambda c: c.update(_class_name="FluxTransformer2DModel")),
    "E-CKP-05",
)
case(
    "config_class_is_a_list",
    "single",
    "a class that is a list",
    json_file("config.json", lambda c: c.update(_class_name=["WanTransformer3DModel"])),
    "E-CKP-01",
)
case(
    "config_other_size",
    "single",
    "ffn_dim does not match the tensors",
    json_file("config.json", lambda c: c.update(ffn_dim=97)),
    "E-CKP-04",
)
case(
    "config_fewer_layers",
    "single",
    "one layer too few",
    json_file("config.json", lambda c: c.update(num_layers=1)),
    "E-CKP-04",
)
case(
    "config_layers_huge",
    "single",
    "10^30 layers",
    json_file("config.json", lambda c: c.update(num_layers=10**30)),
    "E-CKP-06",
)
case(
    "config_layers_million",
    "single",
    "a million layers",
    json_file("config.json", lambda c: c.update(num_layers=10**6)),
    "E-CKP-06",
)
case(
    "config_layers_string",
    "single",
    "num_layers that is a string",
    json_file("config.json", lambda c: c.update(num_layers="2")),
    "E-CKP-06",
)
case(
    "config_heads_zero",
    "single",
    "no heads",
    json_file("config.json", lambda c: c.update(num_attention_heads=0)),
    "E-CKP-06",
)
case(
    "config_patch_two",
    "single",
    "a patch_size of two sizes",
    json_file("config.json", lambda c: c.update(patch_size=[2, 2])),
    "E-CKP-06",
)
case(
    "config_wan_heads",
    "cascade",
    "heads that do not divide the width",
    json_file("high_noise_model/config.json", lambda c: c.update(num_heads=7)),
    "E-CKP-06",
)
case(
    "config_wan_other_size",
    "cascade",
    "dim does not match the tensors",
    json_file("low_noise_model/config.json", lambda c: c.update(dim=128)),
    "E-CKP-04",
)
case(
    "config_wan_eps",
    "cascade",
    "an eps that is a string",
    json_file("high_noise_model/config.json", lambda c: c.update(eps="small")),
    "E-CKP-06",
)
case(
    "config_is_folder",
    "single",
    "a folder in place of config.json",
    combine(lambda f: (f / "config.json").unlink(), lambda f: (f / "config.json").mkdir()),
    "E-CKP-06",
)
