"""Manifests of several tools."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored import write_json

from ascendit.checkpoint.quant_metadata import find_manifest, read_manifest
from ascendit.errors import AscenditError, CheckpointError

EXPORTS = Path(__file__).parents[1] / "fixtures" / "msmodelslim" / "exports"


def read(tmp_path: Path, data: Any, naming: Any = "wan") -> Any:
    return read_manifest(write_json(tmp_path / "quant_model_description.json", data), naming)


def refused(tmp_path: Path, data: Any, code: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as e:
        read(tmp_path, data)
    assert e.value.code == code, str(e.value)
    return e.value


def test_a_real_manifest() -> None:
    folder = EXPORTS / "W8A8_MXFP8" / "ti2v_d128_l1__official_w8a8f8"
    path = find_manifest(folder)
    assert path is not None
    manifest = read_manifest(path, "wan")
    assert manifest.attention == {"blocks.0.attn1.quant_type": "FP8_DYNAMIC"}
    assert manifest.metadata == {"model_quant_type": "W8A8_MXFP8"}
    assert manifest.tensors["blocks.0.ffn.net.0.proj.weight"] == "W8A8_MXFP8"
    assert manifest.tensors["blocks.0.attn1.q_rot"] == "FLOAT"
    assert manifest.tensors["scale_shift_table"] == "FLOAT"
    assert len(manifest.entries()) == len(json.loads(path.read_text()))
    claim = manifest.declared_schemes()["blocks.0.attn2.to_out.0"]
    assert (claim.scheme, claim.label) == (
        "mxfp8",
        "quant_model_description_w8a8_mxfp8.json says W8A8_MXFP8",
    )


def test_file_level_keys_of_ascendv1(tmp_path: Path) -> None:
    data = {
        "model_quant_type": "W4A4_MXFP4",
        "version": "1.0.0",
        "group_size": 32,
        "metadata": {"a": [1]},
        "optional": {},
        "patch_embedding.weight": "FLOAT",
    }
    manifest = read(tmp_path, data)
    assert manifest.tensors == {"patch_embedding.weight": "FLOAT"}
    assert manifest.metadata == {
        "model_quant_type": "W4A4_MXFP4",
        "version": "1.0.0",
        "group_size": "32",
        "metadata": '{"a": [1]}',
        "optional": "{}",
    }


def test_wrappers_and_leftovers_are_removed_from_names(tmp_path: Path) -> None:
    data = {
        "blocks.0.self_attn.q.linear.weight": "W4A4_MXFP4_DYNAMIC",
        "blocks.0.self_attn.q.div.mul_scale": "FLOAT",
        "blocks.0.self_attn.fa3_q.scale": "FAQuant",
    }
    manifest = read(tmp_path, data)
    assert list(manifest.tensors) == [
        "blocks.0.attn1.to_q.weight",
        "blocks.0.attn1.to_q.mul_scale",
        "blocks.0.attn1.fa3_q.scale",
    ]
    assert manifest.declared_schemes()["blocks.0.attn1.to_q"].scheme == "mxfp4"
    merged = {
        "scale_shift_table": "FLOAT",
        "blocks.0.norm2.weight": "FLOAT",
        "blocks.0.attn1.to_q_rot": "FLOAT",
        "blocks.0.attn1.to_out.0.weight": "W8A8_MXFP8",
        "blocks.0.self_attn.quant_type": "FP8_DYNAMIC",
        "blocks.1.attn1.to_quant_type": "FP8_DYNAMIC",
    }
    manifest = read(tmp_path, merged, "diffusers")
    assert list(manifest.tensors) == [
        *("scale_shift_table", "blocks.0.norm2.weight", "blocks.0.attn1.q_rot"),
        "blocks.0.attn1.to_out.0.weight",
    ]
    assert list(manifest.attention) == ["blocks.0.attn1.quant_type", "blocks.1.attn1.quant_type"]


@pytest.mark.parametrize(
    "quant_type", ["W8A8", "W8A16", "W4A4_DYNAMIC", "W4A8_MXFP", "W4A4_MXFP4_SVD", "W8A8_MXFP8 ", ""]
)
def test_an_unknown_type(tmp_path: Path, quant_type: str) -> None:
    e = refused(tmp_path, {"blocks.7.self_attn.q.weight": quant_type}, "E-CKP-04")
    assert f"blocks.7.self_attn.q.weight is {quant_type}" in e.got
    assert "W4A4_MXFP4_DUALSCALE" in e.needs


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    data = {"blocks.0.self_attn.q.weight": "FLOAT", "blocks.0.self_attn.q.linear.weight": "FLOAT"}
    e = refused(tmp_path, data, "E-CKP-09")
    assert "blocks.0.self_attn.q.linear.weight, which both map to blocks.0.attn1.to_q.weight" in e.got


def test_a_duplicate_key(tmp_path: Path) -> None:
    path = tmp_path / "quant_model_description.json"
    path.write_text('{"head.head.bias": "FLOAT", "head.head.bias": "W8A8_MXFP8"}')
    with pytest.raises(CheckpointError, match="duplicate key") as e:
        read_manifest(path, "wan")
    assert e.value.code == "E-CKP-06"


@pytest.mark.parametrize("value", [None, 3, ["FLOAT"], {"type": "FLOAT"}])
def test_a_type_that_is_not_a_string(tmp_path: Path, value: object) -> None:
    assert "head.head.bias" in refused(tmp_path, {"head.head.bias": value}, "E-CKP-06").got


def test_several_manifests_are_listed(tmp_path: Path) -> None:
    assert find_manifest(tmp_path) is None
    assert find_manifest(tmp_path / "none") is None
    first = write_json(tmp_path / "quant_model_description.json", {})
    assert find_manifest(tmp_path) == first
    write_json(tmp_path / "quant_model_description_w8a8_mxfp8.json", {})
    with pytest.raises(CheckpointError) as e:
        find_manifest(tmp_path)
    assert e.value.code == "E-CKP-07"
    assert "quant_model_description.json, quant_model_description_w8a8_mxfp8.json" in e.value.got


keys = st.sampled_from(
    ["blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.linear.weight", "model_quant_type", "a.b", "", "."]
) | st.text(max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.sampled_from(["FLOAT", "W8A8_MXFP8", "W8A8"])
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.dictionaries(keys, values, max_size=5), naming=st.sampled_from(["wan", "diffusers"]))
def test_the_reader_handles_any_manifest(tmp_path: Path, data: Any, naming: Any) -> None:
    try:
        manifest = read(tmp_path, data, naming)
    except AscenditError:
        return
    assert all(isinstance(value, str) for value in manifest.entries().values())
