"""Schemes recognised by the dtypes and shapes of a layer's tensors, independent of the tool."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import stored
from stored import CONFIG, floats, quantized, read, refused, types, wan

from ascendit.checkpoint.transformer import Expert
from ascendit.names import block_linears

LINEARS = block_linears(CONFIG)
SCHEMES = ("int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale")
FIRST = "blocks.0.attn1.to_q"


def schemes(expert: Expert) -> dict[tuple[str, str], int]:
    return dict(Counter((layer.scheme, layer.packing) for layer in expert.layers.values()))


@pytest.mark.parametrize("packing", ["packed", "e4m3", "bf16"])
@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp4_dualscale"])
@pytest.mark.parametrize("by", ["manifest", "config"])
def test_packings_of_fp4(tmp_path: Path, packing: str, scheme: str, by: str) -> None:
    tensors = quantized(floats(), LINEARS, scheme, packing)
    quantization_config = {"quant_method": scheme, "is_checkpoint_serialized": True}
    manifest = types(tensors, dict.fromkeys(LINEARS, scheme)) if by == "manifest" else None
    config = CONFIG | ({"quantization_config": quantization_config} if by == "config" else {})
    expert = read(stored.folder(tmp_path, tensors, config=config, manifest=manifest))
    assert schemes(expert) == {(scheme, packing): len(LINEARS)}
    assert expert.layers["blocks.1.ffn.net.2"].shape == (64, 80)
    assert expert.config == CONFIG
    assert (expert.quantization_config, expert.origin) == (
        (quantization_config, "vllm-omni") if by == "config" else (None, "sglang")
    )


@pytest.mark.parametrize("scheme", [*SCHEMES, "fp8_128x128"])
def test_dtypes_alone(tmp_path: Path, scheme: str) -> None:
    expert = read(stored.write(tmp_path / "a.safetensors", wan(quantized(floats(), LINEARS, scheme))))
    packing = "packed" if "mxfp4" in scheme else "plain"
    assert schemes(expert) == {(scheme, packing): len(LINEARS)}
    assert expert.origin == ("fp8-block" if scheme == "fp8_128x128" else "msmodelslim")


def test_older_and_other_dtypes_of_scales(tmp_path: Path) -> None:
    tensors = quantized(quantized(floats(), LINEARS[:3], "int8"), LINEARS[3:], "mxfp4_dualscale")
    tensors[f"{LINEARS[0]}.weight_scale"] = tensors[f"{LINEARS[0]}.weight_offset"] = ("BF16", (1,))
    tensors[f"{LINEARS[0]}.bias"] = ("BF16", (64,))
    del tensors[f"{LINEARS[1]}.weight_offset"]
    tensors[f"{LINEARS[3]}.weight_scale"] = ("F8_E8M0", (64, 2))
    tensors[f"{LINEARS[3]}.weight_dual_scale"] = ("F32", (64, 1))
    tensors[f"{LINEARS[3]}.mul_scale"] = ("BF16", (64,))
    manifest = types(
        tensors, dict.fromkeys(LINEARS[:3], "int8") | dict.fromkeys(LINEARS[3:], "mxfp4_dualscale")
    )
    manifest[f"{LINEARS[3]}.bias"] = "W4A4_MXFP4_DUALSCALE"  # as written by the AscendV1 saver
    expert = read(stored.folder(tmp_path, tensors, manifest=manifest))
    assert len(expert.layers) == len(LINEARS)


def test_an_odd_width_of_packed_fp4(tmp_path: Path) -> None:
    config = CONFIG | {"ffn_dim": 81}
    tensors = quantized(floats(config), ["blocks.0.ffn.net.2", "blocks.1.ffn.net.2"], "mxfp4")
    tensors["blocks.1.ffn.net.2.mul_scale"] = ("F32", (81,))
    layers = read(stored.folder(tmp_path, tensors, config=config)).layers
    assert [layer.shape for layer in layers.values()] == [(64, 81)] * 2


@pytest.mark.parametrize(
    ("layer", "change", "message"),
    [
        ("int8", {"weight_scale": None, "weight_offset": None}, "weight (I8) has no scale"),
        ("int8", {"weight": None}, "weight_offset has no weight"),
        ("fp8_128x128", {"weight_scale_inv": None}, "weight (F8_E4M3) has no scale"),
        ("fp8_128x128", {"weight": None}, "weight_scale_inv has no weight"),
        ("fp8_128x128", {"weight_scale": ("F32", (64, 1))}, "both weight_scale and weight_scale_inv"),
        (
            "mxfp8",
            {"weight": None, "weight_scale": None, "mul_scale": ("F32", (64,))},
            "mul_scale has no weight",
        ),
    ],
)
def test_a_weight_without_scale_or_the_reverse(
    tmp_path: Path, layer: str, change: dict[str, Any], message: str
) -> None:
    tensors: dict[str, Any] = quantized(floats(), [FIRST, "blocks.1.ffn.net.2"], layer)
    tensors |= {f"{FIRST}.{role}": tensor for role, tensor in change.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    assert message in refused(stored.write(tmp_path / "a.safetensors", tensors), "E-CKP-08")


def test_a_smoothed_layer_without_its_mul_scale(tmp_path: Path) -> None:
    """The wrapper means that the weight is W s, which is invalid without `mul_scale`."""
    tensors = quantized(floats(), [FIRST], "mxfp4_dualscale")
    wrapped = {name.replace(f"{FIRST}.", f"{FIRST}.linear."): tensor for name, tensor in tensors.items()}
    message = refused(stored.write(tmp_path / "a.safetensors", wrapped), "E-CKP-08")
    assert f"{FIRST}.linear.weight belongs to a smoothed layer, but {FIRST} has no mul_scale" in message


@pytest.mark.parametrize(
    ("weight", "scale"), [("F8_E5M2", "U8"), ("I8", "U8"), ("U8", "F32"), ("F8_E4M3", "I32"), ("BF16", "F32")]
)
def test_dtypes_of_no_scheme(tmp_path: Path, weight: str, scale: str) -> None:
    tensors = floats() | {f"{FIRST}.weight": (weight, (64, 64)), f"{FIRST}.weight_scale": (scale, (64, 2))}
    message = refused(stored.folder(tmp_path, tensors), "E-CKP-07")
    assert f"{FIRST}: no file declares its scheme, but its tensors are weight {weight} [64, 64]" in message
