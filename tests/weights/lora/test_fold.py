"""Folding. Oracles: Diffusers' key conversion, PEFT where it is installed, and float64 in NumPy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.loras import (
    IMAGE,
    IMAGE_LAYERS,
    LAYERS,
    block_layers,
    changed,
    fold_all,
    matrices,
    merged,
    save,
    shapes,
    weights,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ascendit.convert.quantize import quantize
from ascendit.errors import UsageError
from ascendit.names import expected_tensors
from ascendit.weights.lora.fold import PRODUCT_ROWS, Folds, LoraSource, parse_lora

WAN = block_layers(LAYERS)


def comfyui(layer: str) -> str:
    return f"diffusion_model.{(WAN | block_layers(IMAGE_LAYERS))[layer]}"


def kohya(layer: str) -> str:
    return "lora_unet_" + comfyui(layer).removeprefix("diffusion_model.").replace(".", "_")


STYLES = {
    "diffusers": (lambda layer: f"transformer.{layer}", ".lora_A.weight", ".lora_B.weight", None),
    "diffusers without prefix": (lambda layer: layer, ".lora_A.weight", ".lora_B.weight", None),
    "peft": (lambda layer: f"base_model.model.{layer}", ".lora_A.weight", ".lora_B.weight", None),
    "peft adapter": (lambda x: f"transformer.{x}", ".lora_A.default.weight", ".lora_B.default.weight", None),
    "comfyui": (comfyui, ".lora_down.weight", ".lora_up.weight", 3.0),
    "comfyui with lora_A": (comfyui, ".lora_A.weight", ".lora_B.weight", None),
    "diffsynth": (
        lambda x: comfyui(x).replace("diffusion_model", "pipe.dit"),
        ".lora_A.weight",
        ".lora_B.weight",
        8.0,
    ),
    "musubi": (kohya, ".lora_down.weight", ".lora_up.weight", 1.0),
    "videox-fun": (
        lambda x: kohya(x).replace("unet_", "unet__"),
        ".lora_down.weight",
        ".lora_up.weight",
        2.0,
    ),
    "kohya with diffusers names": (
        lambda x: f"lora_unet_{x.replace('.', '_')}",
        ".lora_down.weight",
        ".lora_up.weight",
        1.5,
    ),
}


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_folds_to_the_same_weights(tmp_path: Path, style: str, image: bool) -> None:
    key, down, up, alpha = STYLES[style]
    shape = shapes(**(IMAGE if image else {}))
    layers = WAN | (block_layers(IMAGE_LAYERS) if image else {})
    factors = matrices(shape, layers)
    source = save(tmp_path / "a.safetensors", write(factors, key, down, up, alpha))
    folds = Folds.open([source], "transformer", shape)
    before = weights(shape)
    after = fold_all(folds, before)
    scale = 1.0 if alpha is None else alpha / 4
    assert folds.names == changed(before, after) == {f"{layer}.weight" for layer in layers}
    for layer, (a, b) in factors.items():
        expected = merged(before[f"{layer}.weight"], (scale, a, b))
        assert torch.equal(after[f"{layer}.weight"], expected)


@pytest.mark.parametrize("style", ["comfyui", "comfyui with lora_A", "musubi"])
@pytest.mark.parametrize("image", [False, True])
def test_names_equal_those_of_diffusers_conversion(tmp_path: Path, style: str, image: bool) -> None:
    from diffusers.loaders import lora_conversion_utils as theirs

    key, down, up, alpha = STYLES[style]
    shape = shapes(**(IMAGE if image else {}))
    tensors = write(
        matrices(shape, WAN | (block_layers(IMAGE_LAYERS) if image else {})), key, down, up, alpha
    )
    if style != "musubi":
        tensors |= {f"{comfyui(layer)}.diff_b": torch.full((shape[f"{layer}.bias"]), 0.5) for layer in WAN}
        outside = {
            "time_projection.1": "condition_embedder.time_proj",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "head.head": "proj_out",
        }
        if image:
            outside["img_emb.proj.1"] = "condition_embedder.image_embedder.ff.net.0.proj"
            outside["img_emb.proj.3"] = "condition_embedder.image_embedder.ff.net.2"
        back = {new: f"diffusion_model.{old}" for old, new in outside.items()}
        tensors |= write(matrices(shape, back), back.__getitem__, down, up)
    source = save(tmp_path / "a.safetensors", tensors)
    before = weights(shape)
    after = fold_all(Folds.open([source], "transformer", shape), before)
    convert = (
        theirs._convert_musubi_wan_lora_to_diffusers
        if style == "musubi"
        else theirs._convert_non_diffusers_wan_lora_to_diffusers
    )
    converted = {name.removeprefix("transformer."): t for name, t in convert(dict(tensors)).items()}
    expected = dict(before)
    for name, tensor in converted.items():
        layer = name.split(".lora_")[0]
        if name.endswith("lora_A.weight"):
            product = (1.0, tensor, converted[f"{layer}.lora_B.weight"])
            expected[f"{layer}.weight"] = merged(before[f"{layer}.weight"], product)
        elif name.endswith(".bias"):
            expected[f"{layer}.bias"] = before[f"{layer}.bias"] + tensor
    assert changed(before, after) == changed(before, expected)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("style", ["diffusers", "comfyui", "musubi"])
@pytest.mark.filterwarnings("ignore")
def test_peft_fuses_to_the_same_weights(tmp_path: Path, style: str) -> None:
    pytest.importorskip("peft")
    from diffusers import WanPipeline, WanTransformer3DModel

    key, down, up, alpha = STYLES[style]
    config = {"attention_head_dim": 12, "num_attention_heads": 2, "num_layers": 2, "ffn_dim": 40}
    model = WanTransformer3DModel(**config, text_dim=20, freq_dim=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shape = expected_tensors(dict(model.config))
    tensors = write(matrices(shape, WAN), key, down, up, alpha)
    source = save(tmp_path / "a.safetensors", tensors)
    after = fold_all(Folds.open([source], "transformer", shape), before)
    model.load_lora_adapter(WanPipeline.lora_state_dict(str(source.path)))
    model.fuse_lora()
    model.unload_lora()
    theirs = model.state_dict()
    assert changed(before, theirs) == changed(before, after)
    for name, tensor in theirs.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-5)


DROPPED = {
    "diffusion_model.blocks.0.diff_m": "blocks.0.scale_shift_table",
    "diffusion_model.blocks.1.modulation.diff": "blocks.1.scale_shift_table",
    "diffusion_model.head.diff_m": "scale_shift_table",
    "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm2.weight",
    "diffusion_model.blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
    "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "diffusion_model.blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
    "diffusion_model.blocks.1.cross_attn.norm_k_img.diff": "blocks.1.attn2.norm_added_k.weight",
    "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    "diffusion_model.patch_embedding.diff_b": "patch_embedding.bias",
    "diffusion_model.img_emb.proj.0.diff": "condition_embedder.image_embedder.norm1.weight",
    "diffusion_model.img_emb.proj.4.diff_b": "condition_embedder.image_embedder.norm2.bias",
    "diffusion_model.img_emb.proj.1.diff": "condition_embedder.image_embedder.ff.net.0.proj.weight",
    "diffusion_model.blocks.0.self_attn.q.diff": "blocks.0.attn1.to_q.weight",
    "lora_unet_blocks_1_norm3.w_norm": "blocks.1.norm2.weight",
    "lora_unet_blocks_1_norm3.b_norm": "blocks.1.norm2.bias",
    "transformer.condition_embedder.time_proj.diff_b": "condition_embedder.time_proj.bias",
}


@pytest.mark.parametrize("key", DROPPED)
def test_differences_that_other_tools_drop_are_folded(tmp_path: Path, key: str) -> None:
    shape, target = shapes(**IMAGE), DROPPED[key]
    difference = torch.randn(shape[target])
    source = save(tmp_path / "a.safetensors", {key: difference})
    before = weights(shape)
    after = fold_all(Folds.open([LoraSource(source.path, 0.5)], "transformer", shape), before)
    assert changed(before, after) == {target}
    assert torch.equal(after[target], before[target] + 0.5 * difference)


def test_diffusers_drops_them() -> None:
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_wan_lora_to_diffusers as convert,
    )

    shape = shapes()
    base = write(matrices(shape, WAN), comfyui, ".lora_down.weight", ".lora_up.weight")
    dropped = ["blocks.0.diff_m", "head.diff_m", "blocks.0.norm3.diff", "patch_embedding.diff"]
    tensors = base | {f"diffusion_model.{name}": torch.ones(1) for name in dropped}
    assert len(convert(dict(tensors))) == len(base)


def test_modulation_may_lack_its_first_axis(tmp_path: Path) -> None:
    shape = shapes()
    difference = torch.randn(6, 24)
    source = save(tmp_path / "a.safetensors", {"diffusion_model.blocks.0.diff_m": difference})
    folds = Folds.open([source], "transformer", shape)
    assert torch.equal(folds.fold("blocks.0.scale_shift_table", torch.zeros(1, 6, 24), 0)[0], difference)
    assert folds.names == {"blocks.0.scale_shift_table"}


@pytest.mark.parametrize("key", ["diffusion_model.patch_embedding", "lora_unet_patch_embedding"])
def test_a_convolution(tmp_path: Path, key: str) -> None:
    shape = shapes()
    down, up = torch.randn(3, 8, 1, 2, 2), torch.randn(24, 3, 1, 1, 1)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(6)}
    source = save(tmp_path / "a.safetensors", tensors)
    before = weights(shape)["patch_embedding.weight"]
    after = Folds.open([source], "transformer", shape).fold("patch_embedding.weight", before, 0)
    x = torch.randn(1, 8, 2, 4, 4)  # the input of the convolution plus the two low-rank ones

    def conv(weight: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(x, weight, stride=weight.shape[2:])

    torch.testing.assert_close(conv(after), conv(before) + 2 * conv3d_pair(x, down, up), rtol=1e-4, atol=1e-4)


def conv3d_pair(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.conv3d(torch.nn.functional.conv3d(x, down, stride=down.shape[2:]), up)


def test_the_bias_of_up_is_scaled_like_up(tmp_path: Path) -> None:
    shape, bias = shapes(), torch.randn(24)
    down, up = torch.randn(2, 24), torch.randn(24, 2)
    key = "transformer.blocks.0.attn1.to_q"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_B.bias": bias}
    source = save(tmp_path / "a.safetensors", tensors | {f"{key}.alpha": torch.tensor([1.0])})
    folds = Folds.open([source], "transformer", shape)
    assert folds.names == {"blocks.0.attn1.to_q.weight", "blocks.0.attn1.to_q.bias"}
    assert torch.equal(folds.fold("blocks.0.attn1.to_q.bias", torch.zeros(24), 0), bias / 2)


def test_loha(tmp_path: Path) -> None:
    shape, key = shapes(), "lora_unet_blocks_0_ffn_0"
    w1_a, w2_a, w1_b, w2_b = torch.randn(200, 3), torch.randn(200, 3), torch.randn(3, 24), torch.randn(3, 24)
    tensors = {f"{key}.hada_w1_a": w1_a, f"{key}.hada_w1_b": w1_b, f"{key}.hada_w2_a": w2_a}
    tensors |= {f"{key}.hada_w2_b": w2_b, f"{key}.alpha": torch.tensor(1.0)}
    folds = Folds.open([save(tmp_path / "a.safetensors", tensors)], "transformer", shape)
    expected = (w1_a.double() @ w1_b.double()) * (w2_a.double() @ w2_b.double()) / 3
    after = folds.fold("blocks.0.ffn.net.0.proj.weight", torch.zeros(200, 24), 0)
    torch.testing.assert_close(after, expected.float(), rtol=1e-5, atol=1e-5)


LOKR = {  # which factors are decomposed -> the rank that alpha is divided by
    "none": ({"lokr_w1": (5, 4), "lokr_w2": (40, 6)}, None),
    "first": ({"lokr_w1_a": (5, 2), "lokr_w1_b": (2, 4), "lokr_w2": (40, 6)}, 2),
    "second": ({"lokr_w1": (5, 4), "lokr_w2_a": (40, 3), "lokr_w2_b": (3, 6)}, 3),
    "both": ({"lokr_w1_a": (5, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (40, 3), "lokr_w2_b": (3, 6)}, 3),
}


@pytest.mark.parametrize("decomposed", LOKR)
def test_lokr(tmp_path: Path, decomposed: str) -> None:
    sizes, rank = LOKR[decomposed]
    key = "lora_unet_blocks_1_ffn_0"
    factors = {name: torch.randn(size) for name, size in sizes.items()}
    tensors = {f"{key}.{name}": tensor for name, tensor in factors.items()}
    tensors |= {f"{key}.alpha": torch.tensor(6.0), "lokr_factor": torch.tensor(-1)}
    folds = Folds.open([save(tmp_path / "a.safetensors", tensors)], "transformer", shapes())

    def factor(name: str) -> Tensor:
        return factors[name] if name in factors else factors[f"{name}_a"] @ factors[f"{name}_b"]

    expected = torch.kron(factor("lokr_w1"), factor("lokr_w2")) * (6 / rank if rank else 1)
    after = folds.fold("blocks.1.ffn.net.0.proj.weight", torch.zeros(200, 24), 0)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def test_lokr_of_a_convolution(tmp_path: Path) -> None:
    w1, w2 = torch.randn(4, 2), torch.randn(6, 4, 1, 2, 2)
    key = "diffusion_model.patch_embedding"
    source = save(tmp_path / "a.safetensors", {f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2})
    before = torch.zeros(24, 8, 1, 2, 2)
    after = Folds.open([source], "transformer", shapes()).fold("patch_embedding.weight", before, 0)
    assert torch.equal(after, torch.kron(w1[:, :, None, None, None], w2))


def test_files_add_up_and_are_rounded_once(tmp_path: Path) -> None:
    shape, layer = shapes(), "blocks.0.attn1.to_q"
    first = save(
        tmp_path / "a.safetensors", {f"diffusion_model.{WAN[layer]}.diff": torch.full((24, 24), 2.0**-9)}
    )
    second = save(tmp_path / "b.safetensors", {f"transformer.{layer}.diff": torch.full((24, 24), 2.0**-9)})
    folds = Folds.open([first, second, LoraSource(second.path, 2.0)], "transformer", shape)
    ones = torch.ones(24, 24, dtype=torch.bfloat16)
    # Each difference alone vanishes in bfloat16 (1 + 2^-9 is 1), their sum 2^-7 does not.
    assert torch.equal(folds.fold(f"{layer}.weight", ones, 0), torch.full_like(ones, 1 + 2**-7))
    assert folds.names == {f"{layer}.weight"}


def test_bf16_weights_are_the_nearest_to_the_exact_sum(tmp_path: Path) -> None:
    shape = shapes()
    factors, others = matrices(shape, WAN), matrices(shape, WAN, rank=7, seed=2)
    first = save(
        tmp_path / "a.safetensors", write(factors, comfyui, ".lora_down.weight", ".lora_up.weight", 1.0)
    )
    second = save(
        tmp_path / "b.safetensors", write(others, kohya, ".lora_down.weight", ".lora_up.weight", 14.0)
    )
    folds = Folds.open([LoraSource(first.path, 0.3), LoraSource(second.path, -0.7)], "transformer", shape)
    before = weights(shape, torch.bfloat16)
    after = fold_all(folds, before)
    differing = 0
    for layer in WAN:
        name = f"{layer}.weight"
        assert after[name].dtype == torch.bfloat16
        expected = merged(before[name], (0.3 / 4, *factors[layer]), (-0.7 * 2, *others[layer]))
        differing += int((after[name] != expected).sum())
    total = sum(after[f"{layer}.weight"].numel() for layer in WAN)
    assert differing < total / 100_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folds, Tensor, Tensor]:
    """Folds of a LoRA, a LoHa, a LoKr and a difference for one tall weight; the weight; the folded weight."""
    rank, rows, columns = 24, 5 * PRODUCT_ROWS + 7, 333
    name = "blocks.0.ffn.net.0.proj.weight"
    key = f"transformer.{name.removesuffix('.weight')}"
    torch.manual_seed(3)
    tensors = {
        f"{key}.lora_A.weight": torch.randn(rank, columns),
        f"{key}.lora_B.weight": torch.randn(rows, rank),
        f"{key}.hada_w1_a": torch.randn(rows, 5),
        f"{key}.hada_w1_b": torch.randn(5, columns),
        f"{key}.hada_w2_a": torch.randn(rows, 5),
        f"{key}.hada_w2_b": torch.randn(5, columns),
        f"{key}.lokr_w1": torch.randn(3, 9),
        f"{key}.lokr_w2_a": torch.randn(rows // 3, 2),
        f"{key}.lokr_w2_b": torch.randn(2, columns // 9),
        f"{key}.diff": torch.randn(rows, columns),
    }
    assert rows % 3 == columns % 9 == 0
    source = save(tmp_path_factory.mktemp("large") / "a.safetensors", tensors)
    folds = Folds.open([source], "transformer", {name: (rows, columns)})
    weight = torch.randn(rows, columns)
    return folds, weight, folds.fold(name, weight, 0)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    block=st.sampled_from([1, 2, 3, 5, 17, 31, 63, 64, 65, 100, 128, 200, 256, 300, 327]),
    threads=st.sampled_from([1, 2]),
)
def test_blocks_of_any_size_get_the_same_bits(
    large: tuple[Folds, Tensor, Tensor], block: int, threads: int
) -> None:
    folds, weight, folded_weight = large
    name = "blocks.0.ffn.net.0.proj.weight"
    torch.set_num_threads(threads)
    pieces = [folds.fold(name, weight[i : i + block], i) for i in range(0, len(weight), block)]
    assert torch.equal(torch.cat(pieces), folded_weight)


def test_columns_have_the_bits_of_the_complete_tensor(large: tuple[Folds, Tensor, Tensor]) -> None:
    folds, weight, folded_weight = large
    name, columns = "blocks.0.ffn.net.0.proj.weight", slice(32, 97)
    folded = folds.fold(name, weight[50:120, columns], 50, columns)
    assert torch.equal(folded, folded_weight[50:120, columns])


@pytest.mark.parametrize("columns", [None, slice(None)])
def test_a_slice_of_columns_needs_its_range(
    large: tuple[Folds, Tensor, Tensor], columns: slice | None
) -> None:
    folds, weight, _ = large
    with pytest.raises(AssertionError, match="blocks.0.ffn.net.0.proj.weight"):
        folds.fold("blocks.0.ffn.net.0.proj.weight", weight[:, :32], 0, columns)


def test_the_input_rows_are_not_changed(large: tuple[Folds, Tensor, Tensor]) -> None:
    folds, weight, folded_weight = large
    name = "blocks.0.ffn.net.0.proj.weight"
    before = weight.clone()
    assert torch.equal(folds.fold(name, weight[10:20].T.contiguous().T, 10), folded_weight[10:20])
    assert torch.equal(weight, before)
    assert folds.fold(name, weight[:0], 0).shape == (0, weight.shape[1])


def test_a_tensor_without_change_is_returned_itself(tmp_path: Path) -> None:
    shape = shapes()
    source = save(tmp_path / "a.safetensors", {"diffusion_model.head.diff_m": torch.ones(1, 2, 24)})
    folds = Folds.open([source], "transformer", shape)
    rows = torch.ones(3, 24)
    assert folds.fold("blocks.0.attn1.to_q.weight", rows, 2) is rows
    assert Folds.open([], "transformer", shape).names == frozenset()


def test_factors_in_half_precision(tmp_path: Path) -> None:
    shape, layer = shapes(), "blocks.1.ffn.net.2"
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        a, b = matrices(shape, {layer: ""})[layer]
        factors = {layer: (a.to(dtype), b.to(dtype))}
        source = save(
            tmp_path / "a.safetensors", write(factors, comfyui, ".lora_down.weight", ".lora_up.weight")
        )
        before = weights(shape)[f"{layer}.weight"]
        after = Folds.open([source], "transformer", shape).fold(f"{layer}.weight", before, 0)
        down, up = (t.float() for t in factors[layer])
        torch.testing.assert_close(after, merged(before, (1.0, down, up)), rtol=2e-6, atol=2e-6)


# ---- settings of PEFT outside the tensors ---------------------------------------------------------


@pytest.mark.parametrize("root", [False, True])
def test_diffusers_metadata_scales(tmp_path: Path, root: bool) -> None:
    shape, layer, other = shapes(), "blocks.0.attn1.to_q", "blocks.0.attn1.to_k"
    factors = matrices(shape, {layer: "", other: ""})
    config: dict[str, Any] = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": root}
    config["transformer.alpha_pattern"] = {"attn1.to_k": 2}
    tensors = write(factors, "transformer.{}".format, ".lora_A.weight", ".lora_B.weight")
    source = save(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(config)})
    folds = Folds.open([source], "transformer", shape)
    for name, alpha in ((layer, 8), (other, 2)):
        expected = merged(torch.zeros(24, 24), (alpha / (2 if root else 4), *factors[name]))
        torch.testing.assert_close(
            folds.fold(f"{name}.weight", torch.zeros(24, 24), 0), expected, rtol=2e-6, atol=2e-6
        )


def test_the_adapter_config_of_peft_scales(tmp_path: Path) -> None:
    shape, layer = shapes(), "blocks.0.attn1.to_q"
    factors = matrices(shape, {layer: ""})
    tensors = write(factors, "base_model.model.{}".format, ".lora_A.weight", ".lora_B.weight")
    source = save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 2}')
    after = Folds.open([source], "transformer", shape).fold(f"{layer}.weight", torch.zeros(24, 24), 0)
    torch.testing.assert_close(
        after, merged(torch.zeros(24, 24), (0.5, *factors[layer])), rtol=2e-6, atol=2e-6
    )


# ---- experts ---------------------------------------------------------------------------------------


def two_experts(tmp_path: Path) -> LoraSource:
    key = "blocks.0.attn1.to_q.diff"
    return save(
        tmp_path / "both.safetensors",
        {f"transformer.{key}": torch.full((24, 24), 1.0), f"transformer_2.{key}": torch.full((24, 24), 2.0)},
    )


def test_prefixes_select_the_experts(tmp_path: Path) -> None:
    source = two_experts(tmp_path)
    for expert, value in (("transformer", 1.0), ("transformer_2", 2.0)):
        folds = Folds.open([source], expert, shapes())
        after = folds.fold("blocks.0.attn1.to_q.weight", torch.zeros(24, 24), 0)
        assert torch.equal(after, torch.full((24, 24), value))


def test_a_file_for_one_expert_does_not_change_the_other(tmp_path: Path) -> None:
    key = "transformer.blocks.0.attn1.to_q.diff"  # written by Diffusers for either expert
    source = save(tmp_path / "a.safetensors", {key: torch.ones(24, 24)})
    for expert in ("transformer", "transformer_2"):
        assert Folds.open([source], expert, shapes()).names == {"blocks.0.attn1.to_q.weight"}
    low = LoraSource(source.path, 1.0, "transformer_2")
    assert Folds.open([low], "transformer_2", shapes()).names
    high = Folds.open([low], "transformer", shapes())
    assert not high.names
    before = torch.zeros(24, 24)
    assert high.fold("blocks.0.attn1.to_q.weight", before, 0) is before


def test_quantize_folds_before_it_quantizes(tmp_path: Path) -> None:
    """The bytes equal those of weights merged by hand, in both experts."""
    from convert.models import CONFIG, read, same, write_model
    from safetensors.torch import load_file, save_file

    shape = expected_tensors(CONFIG)
    factors = {layer: (0.1 * a, 0.1 * b) for layer, (a, b) in matrices(shape, WAN).items()}
    tensors = write(factors, comfyui, ".lora_down.weight", ".lora_up.weight", 2.0)
    tensors["diffusion_model.blocks.0.diff_m"] = torch.randn(1, 6, 64)
    tensors["diffusion_model.blocks.1.ffn.2.diff_b"] = torch.randn(64)
    lora = save(tmp_path / "a.safetensors", tensors)
    source, by_hand = write_model(tmp_path / "source"), write_model(tmp_path / "by_hand")
    for file in by_hand.glob("transformer*/*.safetensors"):
        weights = load_file(file)
        for layer, (a, b) in factors.items():
            weights[f"{layer}.weight"] = merged(weights[f"{layer}.weight"], (0.7 * 2 / 4, a, b))
        for key, name in (("0.diff_m", "0.scale_shift_table"), ("1.ffn.2.diff_b", "1.ffn.net.2.bias")):
            change = tensors[f"diffusion_model.blocks.{key}"].double()
            weights[f"blocks.{name}"] = (weights[f"blocks.{name}"].double() + 0.7 * change).bfloat16()
        save_file(weights, file)
    quantize(source, tmp_path / "ours", scheme="mxfp8", loras=[f"{lora.path}:0.7"])
    quantize(by_hand, tmp_path / "theirs", scheme="mxfp8")
    for expert in ("transformer", "transformer_2"):
        ours, theirs = read(tmp_path / "ours" / expert), read(tmp_path / "theirs" / expert)
        assert [name for name in theirs if not same(ours[name], theirs[name])] == []
        assert not same(
            ours["blocks.0.attn1.to_q.weight"], read(source / expert)["blocks.0.attn1.to_q.weight"]
        )


# ---- command line values ----------------------------------------------------------------------------

OPTIONS = {
    "x.safetensors": ("x.safetensors", 1.0, None),
    "x.safetensors:0.5": ("x.safetensors", 0.5, None),
    "x.safetensors:-1": ("x.safetensors", -1.0, None),
    "/a:b/x.safetensors": ("/a:b/x.safetensors", 1.0, None),
    r"C:\x.safetensors": (r"C:\x.safetensors", 1.0, None),
    r"C:\x.safetensors:2": (r"C:\x.safetensors", 2.0, None),
    "a=b.safetensors": ("a=b.safetensors", 1.0, None),
    "transformer=x.safetensors:0.8": ("x.safetensors", 0.8, "transformer"),
    "transformer_2=x.safetensors": ("x.safetensors", 1.0, "transformer_2"),
    "high=x.safetensors": ("x.safetensors", 1.0, "transformer"),
    "Low=x.safetensors": ("x.safetensors", 1.0, "transformer_2"),
    "low=a=b.safetensors:1e-1": ("a=b.safetensors", 0.1, "transformer_2"),
}


@pytest.mark.parametrize("text", OPTIONS)
def test_parse(text: str) -> None:
    path, weight, expert = OPTIONS[text]
    assert parse_lora(text) == LoraSource(Path(path), weight, expert)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no LoRA file"),
        (":0.5", "no LoRA file"),
        ("low=", "no LoRA file"),
        ("x.safetensors:", "LoRA weight ''"),
        ("x.safetensors:strong", "LoRA weight 'strong'"),
        ("x.safetensors:nan", "weight nan"),
        ("x.safetensors:inf", "weight inf"),
        ("x.safetensors:0", "weight 0.0"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(UsageError) as e:
        parse_lora(text)
    assert e.value.code == "E-USE-01"
    assert message in e.value.got
    assert "transformer_2=FILE" in e.value.fix


def test_an_expert_of_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match="is for 'middle'"):
        LoraSource(Path("x.safetensors"), 1.0, "middle")


def test_the_modules_do_not_import_torch() -> None:
    import subprocess

    code = (
        "import sys, ascendit.weights.lora.fold; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
