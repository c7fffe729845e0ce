"""`quantization_config` with the keys of vLLM-Omni and of FP8 checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import stored
from stored import CONFIG, floats, quantized, read, refused, types, write_json

from ascendit.names import block_linears

LINEARS = block_linears(CONFIG)
QUANTIZED = quantized(floats(), LINEARS, "mxfp4_dualscale")
TYPES = types(QUANTIZED, dict.fromkeys(LINEARS, "mxfp4_dualscale"))


def test_fused_names_in_ignored_layers(tmp_path: Path) -> None:
    excluded = [
        *(f"blocks.0.attn1.to_{x}" for x in "qkv"),
        "blocks.0.attn1.to_out.0",
        "blocks.1.ffn.net.0.proj",
    ]
    excluded += ["blocks.1.ffn.net.2", "blocks.1.attn2.to_k"]
    names = [
        "blocks.0.attn1.to_qkv",
        "blocks.0.attn1.to_out",
        "blocks.1.ffn.net_0.proj",
        "blocks.1.ffn.net_2",
    ]
    names += ["blocks.1.attn2.to_k", "patch_embedding", "condition_embedder.time_proj", "blocks.0.norm2"]
    tensors = quantized(
        floats(), [name for name in LINEARS if name not in excluded], "mxfp4_dualscale", "e4m3"
    )
    declared = {"quant_method": "mxfp4_dualscale", "is_checkpoint_serialized": True, "ignored_layers": names}
    path = stored.folder(tmp_path, tensors, config=CONFIG | {"quantization_config": declared})
    assert set(read(path).layers) == set(LINEARS) - set(excluded)
    declared["ignored_layers"] = [*names, "blocks.7.attn1.to_qkv"]
    write_json(tmp_path / "config.json", CONFIG | {"quantization_config": declared})
    assert "do not exist: blocks.7.attn1.to_k" in refused(path, "E-CKP-07")
    declared["ignored_layers"] = names[1:]
    write_json(tmp_path / "config.json", CONFIG | {"quantization_config": declared})
    text = refused(path, "E-CKP-07")
    assert "config.json says mxfp4_dualscale, but its tensors are weight BF16 [64, 64]" in text


def test_fp8_in_tiles_by_its_config(tmp_path: Path) -> None:
    declared = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": [LINEARS[0]],
    }
    tensors = quantized(floats(), LINEARS[1:], "fp8_128x128")
    expert = read(stored.folder(tmp_path, tensors, config=CONFIG | {"quantization_config": declared}))
    assert (len(expert.layers), expert.origin) == (len(LINEARS) - 1, "fp8-block")


def test_a_config_for_online_quantization_does_not_describe_the_weights(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "mxfp8", "ignored_layers": ["x"]}}
    assert read(stored.folder(tmp_path, floats(), config=config)).layers == {}


@pytest.mark.parametrize(
    ("declared", "code", "message"),
    [
        (
            {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True},
            "E-CKP-07",
            "config.json says mxfp8, but",
        ),
        (
            {"quant_method": "mxfp4", "is_checkpoint_mxfp4_serialized": True},
            "E-CKP-07",
            "config.json says mxfp4, but",
        ),
        ("mxfp8", "E-CKP-06", "is a JSON str"),
        ({}, "E-CKP-06", "names no quant_method"),
        ({"quant_method": "mxfp8", "ignored_layers": [1]}, "E-CKP-06", "not a list of names"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "E-CKP-04", "in tiles of [64, 64]"),
        (
            {"quant_method": "gguf", "is_checkpoint_gguf_serialized": True},
            "E-CKP-04",
            "quantized by gguf (config.json)",
        ),
    ],
)
@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_config_that_contradicts_the_tensors(
    tmp_path: Path, declared: Any, code: str, message: str, with_manifest: bool
) -> None:
    config = CONFIG | {"quantization_config": declared}
    path = stored.folder(tmp_path, QUANTIZED, config=config, manifest=TYPES if with_manifest else None)
    if with_manifest and "gguf" in message:
        assert len(read(path).layers) == len(LINEARS)  # the manifest is sufficient
        return
    text = refused(path, code)
    assert message in text
    if with_manifest and code == "E-CKP-07":
        assert "quant_model_description.json says W4A4_MXFP4_DUALSCALE" in text
