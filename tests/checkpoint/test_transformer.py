"""One description of a transformer from any tool: real msModelSlim exports, and headers made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from stored import CONFIG, IMAGE, MANIFEST, floats, quantized, read, refused, types, wan, write_json

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import Expert, read_expert
from ascendit.errors import AscenditError
from ascendit.names import all_linears, block_linears, expected_tensors, to_wan

FIXTURES = Path(__file__).parents[1] / "fixtures" / "msmodelslim"
EXPORTS = sorted(path for path in (FIXTURES / "exports").glob("*/*") if path.is_dir())
LINEARS = block_linears(CONFIG)
SCHEMES = ("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")
FIRST = "blocks.0.attn1.to_q"


def schemes(expert: Expert) -> dict[tuple[str, str], int]:
    return dict(Counter((layer.scheme, layer.packing) for layer in expert.layers.values()))


# ---- real exports and their sources -------------------------------------------------------------

PACKED = ("mxfp4_dualscale", "packed")
REAL = {
    "ti2v_d128_l1__minmax": {("mxfp4", "packed"): 10},
    "t2v_d64_l6__dualscale_bf16fallback": {PACKED: 49},
    "t2v_d64_l6__dualscale_smooth_bf16fallback": {PACKED: 49, ("bf16", "plain"): 11},
    "t2v_d64_l6__int8": {("int8", "plain"): 60},
    "t2v_d64_l6__legacy_calibrator": {("int8", "plain"): 65},
    "ti2v_d128_l1__int8_part_file_size1": {("int8", "plain"): 10},
    "ti2v_d128_l1__official_w8a8f8": {("mxfp8", "plain"): 10},
}


@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_real_exports(path: Path) -> None:
    layout = recognise(path)
    source = recognise(FIXTURES / "source_models" / path.name.partition("__")[0])
    assert layout.kind == "msmodelslim"
    assert [e.name for e in layout.experts] == [e.name for e in source.experts]
    for exported, origin in zip(layout.experts, source.experts, strict=True):
        expert, before = read_expert(exported), read_expert(origin)
        assert (expert.origin, expert.naming, before.origin) == ("msmodelslim", "wan", "float")
        assert schemes(expert) == REAL[path.name]
        present = {key for key, value in expert.config.items() if value is not None}
        assert {key: before.config[key] for key in present} == {key: expert.config[key] for key in present}
        shapes = {f"{layer.name}.weight": layer.shape for layer in expert.layers.values()}
        decoded = {n: shapes.get(n, i.shape) for n, i in expert.tensors.items() if n in before.tensors}
        assert decoded == {name: info.shape for name, info in before.tensors.items()}
        for layer in expert.layers.values():
            for role, info in layer.tensors.items():
                assert expert.tensors[f"{layer.name}.{role}"] is info
        assert expert.manifest is not None
        assert set(expert.tensors) < set(expert.manifest)
        for info in expert.tensors.values():
            with safe_open(info.file, "pt") as file:
                assert tuple(file.get_slice(info.name).get_shape()) == info.shape


def test_every_export_is_tested() -> None:
    assert {path.name for path in EXPORTS} == set(REAL)


def test_a_rotated_attention() -> None:
    expert = read(FIXTURES / "exports" / "W8A8_MXFP8" / "ti2v_d128_l1__official_w8a8f8")
    assert expert.attention == {"blocks.0.attn1.quant_type": "FP8_DYNAMIC"}
    assert expert.tensors["blocks.0.attn1.k_rot"].shape == (32, 32)
    assert expert.config["num_attention_heads"] == 4


def test_smoothed_but_not_quantized() -> None:
    path = FIXTURES / "exports" / "W4A4_MXFP4_DUALSCALE" / "t2v_d64_l6__dualscale_smooth_bf16fallback"
    layer = read(path).layers["blocks.3.attn2.to_out.0"]
    assert (layer.scheme, layer.packing, layer.shape) == ("bf16", "plain", (64, 64))
    assert layer.tensors["weight"].name == "blocks.3.cross_attn.o.linear.weight"
    assert layer.tensors["mul_scale"].name == "blocks.3.cross_attn.o.div.mul_scale"


# ---- layouts and name styles --------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, IMAGE], ids=["t2v", "image"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("naming", ["wan", "diffusers"])
def test_a_single_file(tmp_path: Path, config: dict[str, Any], prefix: str, naming: str) -> None:
    tensors = wan(floats(config)) if naming == "wan" else floats(config)
    path = stored.write(tmp_path / "wan.safetensors", {prefix + n: t for n, t in tensors.items()})
    expert = read(path)
    assert (expert.naming, expert.origin, expert.layers, expert.manifest) == (naming, "float", {}, None)
    assert {n: i.shape for n, i in expert.tensors.items()} == expected_tensors(config)
    assert expert.tensors["proj_out.bias"].name == prefix + (
        "head.head.bias" if naming == "wan" else "proj_out.bias"
    )
    derived = {key: value for key, value in config.items() if "head" not in key}
    assert {key: expert.config[key] for key in derived} == derived
    assert expert.config["image_dim"] == config.get("image_dim")


def test_a_mixed_recipe(tmp_path: Path) -> None:
    layers = {name: "mxfp8" if ".0." in name[:9] else "mxfp4" for name in LINEARS}
    layers |= {"blocks.1.ffn.net.2": "bf16", "blocks.1.attn1.to_q": "bf16"}
    tensors = floats()
    for scheme in ("mxfp8", "mxfp4"):
        tensors = quantized(tensors, [name for name in LINEARS if layers[name] == scheme], scheme)
    manifest = types(tensors, layers) | {"model_quant_type": "W4A4_MXFP4"}
    expert = read(stored.folder(tmp_path, tensors, manifest=manifest))
    assert {name: layer.scheme for name, layer in expert.layers.items()} == {
        name: scheme for name, scheme in layers.items() if scheme != "bf16"
    }
    assert expert.manifest is not None and expert.manifest["model_quant_type"] == "W4A4_MXFP4"


@pytest.mark.parametrize("saver", ["one file", "numbered", "index"])
def test_files_of_ascendv1(tmp_path: Path, saver: str) -> None:
    tensors = wan(quantized(floats(), LINEARS, "mxfp8"))
    names = list(tensors)
    manifest = {
        "version": "1.0.0",
        "group_size": 32,
        "metadata": {},
        **types(quantized(floats(), LINEARS, "mxfp8"), {}),
    }
    manifest = {to_wan(key) or key: value for key, value in manifest.items()}
    manifest |= {n: "W8A8_MXFP8" for n in names if tensors[n][0] in ("F8_E4M3", "U8")}
    parts = [names] if saver == "one file" else [names[:60], names[60:]]
    files = [f"quant_model_weights-0000{i + 1}-of-0000{len(parts)}.safetensors" for i in range(len(parts))]
    for file, names_of_file in zip(files, parts, strict=True):
        stored.write(tmp_path / file, {name: tensors[name] for name in names_of_file})
    if saver == "index":
        weight_map = {
            name: file for file, names_of_file in zip(files, parts, strict=True) for name in names_of_file
        }
        write_json(tmp_path / "quant_model_weights.safetensors.index.json", {"weight_map": weight_map})
    write_json(tmp_path / MANIFEST, manifest)
    expert = read(tmp_path)
    assert schemes(expert) == {("mxfp8", "plain"): len(LINEARS)}
    assert {info.file.name for info in expert.tensors.values()} == set(files)
    assert expert.manifest is not None and expert.manifest["group_size"] == "32"


def test_leftovers_of_a_merge(tmp_path: Path) -> None:
    """SGLang's merge replaces substrings, and leaves keys without a tensor under their original names."""
    tensors = quantized(floats(), LINEARS, "mxfp8")
    manifest: dict[str, str] = types(tensors, dict.fromkeys(LINEARS, "mxfp8"))
    extra: stored.Tensors = {
        "blocks.0.attn1.to_q_rot": ("BF16", (32, 32)),
        "blocks.0.attn1.to_k_rot": ("BF16", (32, 32)),
    }
    extra |= {
        "blocks.1.self_attn.fa3_q.scale": ("F32", (2, 1)),
        "blocks.1.self_attn.fa3_q.offset": ("I8", (2, 1)),
    }
    manifest |= dict.fromkeys(extra, "FLOAT") | {"blocks.0.self_attn.quant_type": "FP8_DYNAMIC"}
    manifest["blocks.1.self_attn.fa3_q.scale"] = "FAQuant"
    expert = read(stored.folder(tmp_path, tensors | extra, manifest=manifest))
    assert list(expert.tensors)[-4:] == [
        *("blocks.0.attn1.q_rot", "blocks.0.attn1.k_rot"),
        *("blocks.1.attn1.fa3_q.scale", "blocks.1.attn1.fa3_q.offset"),
    ]
    assert expert.attention == {"blocks.0.attn1.quant_type": "FP8_DYNAMIC"}
    assert expert.tensors["blocks.0.attn1.q_rot"].name == "blocks.0.attn1.to_q_rot"


def test_ascendit_marks_its_output(tmp_path: Path) -> None:
    tensors = quantized(floats(), LINEARS, "mxfp8")
    stored.folder(tmp_path / "transformer", tensors)
    write_json(tmp_path / "ascendit.json", {})
    assert read(tmp_path).origin == "ascendit"


def test_tensors_that_diffusers_skips_are_omitted(tmp_path: Path) -> None:
    tensors = floats(IMAGE) | {"blocks.0.attn2.norm_added_q.weight": ("BF16", (64,))}
    assert set(read(stored.folder(tmp_path, tensors, config=IMAGE)).tensors) == set(floats(IMAGE))


# ---- errors -------------------------------------------------------------------------------------

Change = Callable[[stored.Tensors], object]
QUANTIZED = quantized(floats(), LINEARS, "mxfp4_dualscale")
TYPES = types(QUANTIZED, dict.fromkeys(LINEARS, "mxfp4_dualscale"))
Q = f"{FIRST}.weight"


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            lambda t: t.pop(f"{FIRST}.weight_scale"),
            "E-CKP-08",
            f"{FIRST}.weight_dual_scale has no weight_scale",
        ),
        (
            lambda t: t.pop(f"{FIRST}.weight_dual_scale"),
            "E-CKP-08",
            "weight_dual_scale is missing (quant_model_desc",
        ),
        (lambda t: t.pop(Q), "E-CKP-08", f"{FIRST}.weight_scale has no weight"),
        (
            lambda t: t.update({Q: ("I8", (64, 64))}),
            "E-CKP-07",
            "says W4A4_MXFP4_DUALSCALE, but its tensors are weight I8",
        ),
        (lambda t: t.update({Q: ("U8", (64, 16))}), "E-CKP-04", f"{FIRST}.weight_scale is U8 [64, 2], not"),
        (lambda t: t.update({Q: ("U8", (64, 64))}), "E-CKP-04", f"{FIRST}.weight_scale is U8 [64, 2], not"),
        (lambda t: t.update({Q: ("U8", (4096,))}), "E-CKP-04", f"{FIRST}.weight is [4096], not a matrix"),
        (lambda t: t.update({f"{FIRST}.weight_scale": ("U8", (2, 64))}), "E-CKP-04", "wrong shape"),
        (
            lambda t: t.update({f"{FIRST}.bias": ("F32", (65,))}),
            "E-CKP-04",
            "not BF16 or F16 or F32 or F64 [64]",
        ),
        (lambda t: t.update({f"{FIRST}.bias": ("I8", (64,))}), "E-CKP-04", f"{FIRST}.bias is I8"),
        (
            lambda t: t.update({f"{FIRST}.mul_scale": ("F32", (32,))}),
            "E-CKP-04",
            f"{FIRST}.mul_scale is F32 [32]",
        ),
        (lambda t: t.update({f"{FIRST}.weight_offset": ("F32", (64, 1))}), "E-CKP-04", "not part of its"),
        (lambda t: t.pop("blocks.1.attn2.to_k.bias"), "E-CKP-04", "1 missing (blocks.1.attn2.to_k.bias)"),
        (lambda t: t.update({"extra": ("F32", ())}), "E-CKP-04", "1 unexpected (extra)"),
        (lambda t: t.update({f"{FIRST}.input_scale": ("F32", ())}), "E-CKP-04", "1 unexpected"),
        (lambda t: t.update({"blocks.0.norm2.weight_scale": ("U8", ())}), "E-CKP-04", "1 unexpected"),
        (
            lambda t: t.update({"proj_out.bias": ("F32", (3,))}),
            "E-CKP-04",
            "1 misshapen (proj_out.bias [3], not [64])",
        ),
        (lambda t: t.update({"proj_out.bias": ("I8", (64,))}), "E-CKP-04", "1 mistyped (proj_out.bias I8)"),
        (
            lambda t: t.update({"diffusion_model.proj_out.bias": ("F32", (64,))}),
            "E-CKP-09",
            "both map to proj_out.bias",
        ),
        (lambda t: t.update({"head.head.bias": ("F32", (64,))}), "E-CKP-09", "both map to proj_out.bias"),
        (lambda t: t.update({f"{FIRST}.linear.weight": ("U8", (64, 32))}), "E-CKP-09", f"both map to {Q}"),
        (
            lambda t: t.update({"blocks.0.attn1.q_rot": ("BF16", (32, 32))}),
            "E-CKP-04",
            "q_rot without its k_rot",
        ),
        (
            lambda t: t.update({f"blocks.0.attn1.{x}_rot": ("BF16", (64, 64)) for x in "qk"}),
            "E-CKP-04",
            "[64, 64], not [32, 32]",
        ),
        (
            lambda t: t.update({f"blocks.9.attn1.{x}_rot": ("BF16", (32, 32)) for x in "qk"}),
            "E-CKP-04",
            "2 unexpected (blocks.9",
        ),
        (
            lambda t: t.update({f"blocks.0.attn1.{x}_rot": ("I8", (32, 32)) for x in "qk"}),
            "E-CKP-04",
            "2 mistyped",
        ),
        (lambda t: t.clear(), "E-CKP-01", "is not a Wan transformer; it has 0 tensors"),
    ],
)
def test_damaged_tensors(tmp_path: Path, change: Change, code: str, message: str) -> None:
    tensors = dict(QUANTIZED)
    change(tensors)
    manifest = {name: quant_type for name, quant_type in TYPES.items() if name in tensors}
    manifest |= {name: "FLOAT" for name in tensors if name not in TYPES}
    text = refused(
        stored.folder(tmp_path, tensors, manifest=manifest if "both" not in message else None), code
    )
    assert message in text


def test_a_layer_with_only_a_bias(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in floats().items() if name != Q}
    assert f"1 missing ({Q})" in refused(stored.folder(tmp_path, tensors), "E-CKP-04")


def test_an_attention_without_k_and_v(tmp_path: Path) -> None:
    tensors = {
        name: t
        for name, t in QUANTIZED.items()
        if "blocks.0.attn1.to_k" not in name and ".1.attn2.to_v" not in name
    }
    message = refused(stored.folder(tmp_path, tensors), "E-CKP-04")
    assert (
        "4 missing (blocks.0.attn1.to_k.bias, blocks.0.attn1.to_k.weight, blocks.1.attn2.to_v.bias" in message
    )


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({Q: "W8A8_DYNAMIC"}, "E-CKP-07", "says W8A8_DYNAMIC, but its tensors are weight U8 [64, 32]"),
        ({Q: "FLOAT"}, "E-CKP-07", "says FLOAT, but its tensors are weight U8"),
        ({Q: "W4A4_MXFP4"}, "E-CKP-07", "says W4A4_MXFP4, but its tensors are"),
        ({f"{FIRST}.weight_scale": "W8A8_MXFP8"}, "E-CKP-07", "W8A8_MXFP8, but the layer is mxfp4_dualscale"),
        ({f"{FIRST}.weight_scale": "FLOAT"}, "E-CKP-07", "FLOAT, but the layer is mxfp4_dualscale"),
        ({f"{FIRST}.bias": "W8A8_MXFP8"}, "E-CKP-07", "W8A8_MXFP8, but the layer is mxfp4_dualscale"),
        ({"proj_out.bias": "W8A8_MXFP8"}, "E-CKP-07", "W8A8_MXFP8, but the layer is bf16"),
        ({"proj_out.weight": "W8A8_MXFP8"}, "E-CKP-07", "says W8A8_MXFP8, but its tensors are weight BF16"),
        (
            {"blocks.9.attn1.to_q.weight": "FLOAT"},
            "E-CKP-04",
            "1 entries without a tensor: blocks.9.attn1.to_q.weight",
        ),
        (
            {"blocks.9.attn1.quant_type": "FP8_DYNAMIC"},
            "E-CKP-04",
            "1 entries without a tensor: blocks.9.attn1.quant",
        ),
        ({Q: "W8A8"}, "E-CKP-04", f"{Q} is W8A8"),
        ({"head.head.bias": "FLOAT"}, "E-CKP-09", "which both map to proj_out.bias"),
    ],
)
def test_a_manifest_that_contradicts_the_tensors(
    tmp_path: Path, change: dict[str, str], code: str, message: str
) -> None:
    message = refused(stored.folder(tmp_path, QUANTIZED, manifest=TYPES | change), code)
    assert message in message


def test_a_tensor_that_the_manifest_does_not_name(tmp_path: Path) -> None:
    path = stored.folder(
        tmp_path, QUANTIZED, manifest={n: k for n, k in TYPES.items() if n != "proj_out.bias"}
    )
    assert "1 tensors that it does not list: proj_out.bias" in refused(path, "E-CKP-04")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    names = list(wan(floats()))
    for i, file_names in enumerate((names[:40], names[39:])):
        tensors = {name: t for name, t in wan(floats()).items() if name in file_names}
        stored.write(tmp_path / f"quant_model_weights-0000{i + 1}-of-00002.safetensors", tensors)
    message = refused(tmp_path, "E-CKP-09")
    assert "is in both quant_model_weights-00001-of-00002.safetensors and" in message


def test_two_manifests(tmp_path: Path) -> None:
    path = stored.folder(tmp_path, QUANTIZED, manifest=TYPES)
    write_json(tmp_path / "quant_model_description_w8a8_mxfp8.json", {})
    assert "has 2 manifests" in refused(path, "E-CKP-07")


def test_an_index_with_path_tricks(tmp_path: Path) -> None:
    weight_map = dict.fromkeys(wan(floats()), "../outside.safetensors")
    write_json(tmp_path / "a" / "quant_model_weight.safetensors.index.json", {"weight_map": weight_map})
    stored.write(tmp_path / "outside.safetensors", wan(floats()))
    write_json(tmp_path / "a" / MANIFEST, {})
    refused(tmp_path / "a", "E-CKP-02")  # no weights in its folder
    (tmp_path / "a" / "quant_model_weight-00001-of-00001.safetensors").write_bytes(b"")
    refused(tmp_path / "a", "E-CKP-03")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 200)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["fp8", "mxfp4"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
CONFIG_KEYS = st.sampled_from(
    [*CONFIG, "dim", "num_heads", "eps", "quantization_config", "patch_size", "image_dim"]
)
MARKERS = st.dictionaries(
    st.sampled_from(["quant_method", "is_checkpoint_serialized", "ignored_layers", "weight_block_size"]), JSON
)
NAMES = st.sampled_from(
    [*QUANTIZED, *wan(QUANTIZED), "diffusion_model.proj_out.bias", "blocks.0.attn1.q_rot", "x"]
)
TENSORS = st.tuples(
    st.sampled_from(["BF16", "F32", "U8", "I8", "F8_E4M3", "BOOL"]), st.lists(st.integers(0, 99), max_size=3)
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(CONFIG_KEYS, JSON | MARKERS, max_size=3),
    tensors=st.dictionaries(NAMES, TENSORS, max_size=3),
    manifest=st.none() | st.dictionaries(NAMES | st.text(max_size=2), JSON, max_size=3),
    class_name=st.sampled_from(["WanModel", "WanTransformer3DModel", None]),
    original=st.booleans(),
    dropped=st.sets(NAMES, max_size=4),
)
def test_the_reader_handles_malformed_input(
    tmp_path: Path, config: Any, tensors: Any, manifest: Any, class_name: Any, original: bool, dropped: Any
) -> None:
    changed = (wan(QUANTIZED) if original else QUANTIZED) | {
        name: (d, tuple(shape)) for name, (d, shape) in tensors.items()
    }
    changed = {name: tensor for name, tensor in changed.items() if name not in dropped}
    full_config = None if class_name is None else CONFIG | {"_class_name": class_name} | config
    for old in tmp_path.iterdir():
        old.unlink()
    stored.folder(
        tmp_path, changed, config=full_config, manifest=None if manifest is None else TYPES | manifest
    )
    try:
        expert = read(tmp_path)
    except AscenditError:
        return
    assert expert.layers


# ---- memory and time ----------------------------------------------------------------------------

LARGE = {"_class_name": "WanTransformer3DModel", "num_layers": 40}


def test_forty_blocks_take_milliseconds(tmp_path: Path) -> None:
    """14B parameters in sparse files. The bound is ten times the usual time, for busy machines."""
    linears = block_linears(LARGE)
    tensors = quantized(floats(LARGE), linears, "mxfp4_dualscale")
    manifest = types(tensors, dict.fromkeys(linears, "mxfp4_dualscale"), LARGE)
    path = stored.folder(tmp_path, tensors, config=LARGE, manifest=manifest)
    times = []
    for _ in range(3):
        start = time.process_time()
        assert len(read(path).layers) == 400
        times.append(time.process_time() - start)
    assert min(times) < 0.25, times


def test_no_torch_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.checkpoint import layer_format
for part in recognise({str(EXPORTS[0])!r}).experts:
    assert read_expert(part).layers
print([name for name in ("torch", "numpy", "diffusers", "safetensors") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_all_linears_may_be_quantized(tmp_path: Path) -> None:
    linears = all_linears(IMAGE)
    expert = read(stored.folder(tmp_path, quantized(floats(IMAGE), linears, "int8"), config=IMAGE))
    assert set(expert.layers) == set(linears)
    read(stored.folder(tmp_path / "b", wan(quantized(floats(IMAGE), linears, "mxfp4")), config=None))


# ---- a config from shapes ------------------------------------------------------------------------


def test_the_number_of_heads_is_derived_where_possible(tmp_path: Path) -> None:
    cascade = read(FIXTURES / "exports" / "W8A8_DYNAMIC" / "t2v_d64_l6__int8")
    assert cascade.config["num_attention_heads"] is None is cascade.config["attention_head_dim"]
    assert cascade.config_problem is not None
    assert "number of attention heads is unknown" in cascade.config_problem
    config = CONFIG | {"num_attention_heads": 2, "attention_head_dim": 128}
    expert = read(stored.folder(tmp_path / "a", wan(floats(config)), config=None))
    assert (expert.config["num_attention_heads"], expert.config_problem) == (2, None)
    rotated = floats() | {f"blocks.0.attn1.{x}_rot": ("BF16", (32, 32)) for x in "qk"}
    assert read(stored.folder(tmp_path / "b", rotated, config=None)).config["num_attention_heads"] == 2


@pytest.mark.parametrize(
    ("config", "code", "message"),
    [
        ({"dim": 128}, "E-CKP-04", "dim = 128 in config.json, 64 from the shapes"),
        ({"num_layers": 3}, "E-CKP-04", "num_layers = 3 in config.json, 2 from the shapes"),
        ({"in_dim": 36}, "E-CKP-04", "in_channels = 36 in config.json, 16 from the shapes"),
        ({"num_heads": 3}, "E-CKP-06", "num_heads = 3"),
        ({"num_heads": "2"}, "E-CKP-06", "num_heads = '2'"),
        ({"eps": "small"}, "E-CKP-06", "eps = 'small'"),
    ],
)
def test_a_wan_config_that_contradicts_the_tensors(
    tmp_path: Path, config: dict[str, Any], code: str, message: str
) -> None:
    path = stored.folder(tmp_path, wan(floats()), config={"_class_name": "WanModel", "num_heads": 2} | config)
    assert message in refused(path, code)
