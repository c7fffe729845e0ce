"""Strength: alpha and rank from every part of a file where tools write them. Oracle: float64 in NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from convert.loras import matrices, merged, save, shapes, weights, write
from torch import Tensor

from ascendit.errors import CheckpointError
from ascendit.weights.lora.fields import ADAPTER_CONFIG
from ascendit.weights.lora.fold import Folds, LoraSource

Q, K, FF = "blocks.0.attn1.to_q", "blocks.1.attn2.to_k", "blocks.0.ffn.net.0.proj"
WAN = {Q: "blocks.0.self_attn.q", K: "blocks.1.cross_attn.k", FF: "blocks.0.ffn.0"}
SHAPES = shapes()
FACTORS = matrices(SHAPES, WAN)
WEIGHTS = weights(SHAPES, torch.bfloat16)

Style = tuple[Callable[[str], str], str, str]
DIFFUSERS: Style = (lambda layer: f"transformer.{layer}", ".lora_A.weight", ".lora_B.weight")
BARE: Style = (lambda layer: layer, ".lora_A.weight", ".lora_B.weight")
COMFYUI: Style = (lambda layer: f"diffusion_model.{WAN[layer]}", ".lora_A.weight", ".lora_B.weight")
KOHYA: Style = (
    lambda layer: f"lora_unet_{WAN[layer].replace('.', '_')}",
    ".lora_down.weight",
    ".lora_up.weight",
)
PEFT: Style = (lambda layer: f"base_model.model.{layer}", ".lora_A.weight", ".lora_B.weight")


def lora(
    path: Path,
    style: Style,
    header: Mapping[str, Any] | None = None,
    alpha: float | None = None,
    factors: Mapping[str, tuple[Tensor, Tensor]] = FACTORS,
) -> LoraSource:
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (header or {}).items()}
    return save(path / "a.safetensors", write(dict(factors), *style, alpha), texts)


def folded(
    source: LoraSource, expert: str = "transformer", **options: Any
) -> tuple[Folds, dict[str, Tensor]]:
    folds = Folds.open([source], expert, SHAPES, **options)
    return folds, {name: folds.fold(f"{name}.weight", WEIGHTS[f"{name}.weight"], 0) for name in FACTORS}


def check(source: LoraSource, scales: float | Mapping[str, float], expert: str = "transformer") -> Folds:
    """Each layer equals the sum in float64, rounded once to bfloat16, bit for bit."""
    folds, after = folded(source, expert)
    for layer, factors in FACTORS.items():
        scale = scales[layer] if isinstance(scales, Mapping) else scales
        assert torch.equal(after[layer], merged(WEIGHTS[f"{layer}.weight"], (scale, *factors))), layer
    return folds


def config(**fields: Any) -> dict[str, Any]:
    """PEFT's configuration of rank 4."""
    return {"r": 4, "lora_alpha": 1, "peft_type": "LORA"} | fields


def scoped(prefix: str, **fields: Any) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in config(**fields).items()}


METADATA = "lora_adapter_metadata"
MUSUBI = {"ss_network_dim": "4", "ss_network_alpha": "1.0", "ss_network_module": "networks.lora_wan"}
CONVERTED = MUSUBI | {"sshs_model_hash": "0123"}
"""What `convert_lora.py --target other` leaves in a header after it multiplied alpha into the factors."""
CASES: dict[str, tuple[Style, dict[str, Any], float | None, float]] = {
    # name: style of the keys, header, alpha tensor, scale
    "nothing": (COMFYUI, {"format": "pt"}, None, 1.0),
    "only a rank": (COMFYUI, {"rank": "4"}, None, 1.0),
    "diffusers, pipeline": (DIFFUSERS, {METADATA: scoped("transformer")}, None, 0.25),
    "diffusers, model": (BARE, {METADATA: config()}, None, 0.25),
    "diffusers, model, numbers as text": (BARE, {METADATA: config(r="4", lora_alpha=" 1.0 ")}, None, 0.25),
    "an object for each expert": (DIFFUSERS, {METADATA: {"transformer": config(lora_alpha=2)}}, None, 0.5),
    "unscoped settings, scoped keys": (DIFFUSERS, {METADATA: config(lora_alpha=8)}, None, 2.0),
    "scoped settings, unscoped keys": (BARE, {METADATA: scoped("transformer", lora_alpha=8)}, None, 2.0),
    "scoped settings of the other expert only": (BARE, {METADATA: scoped("transformer_2")}, None, 0.25),
    "any expert and the other one": (
        DIFFUSERS,
        {"lora_alpha": "1", "transformer_2.lora_alpha": "8"},
        None,
        0.25,
    ),
    "text encoder only": (DIFFUSERS, {METADATA: scoped("text_encoder")}, None, 1.0),
    "finetrainers": (DIFFUSERS, {"lora_config": {"r": 4, "lora_alpha": 16}}, None, 4.0),
    "another object with lora_alpha": (DIFFUSERS, {"train": {"lora_alpha": 2, "lora_rank": 4}}, None, 0.5),
    "text about lora_alpha": (DIFFUSERS, {"comment": 'set "lora_alpha" to 2'}, None, 1.0),
    "lora_alpha": (COMFYUI, {"lora_alpha": "1", "r": "4"}, None, 0.25),
    "alpha": (COMFYUI, {"alpha": "8.0", "rank": "4"}, None, 2.0),
    "network_alpha": (COMFYUI, {"network_alpha": "2e0"}, None, 0.5),
    "lora_alpha, scoped": (DIFFUSERS, {"transformer.lora_alpha": "1", "transformer.r": "4"}, None, 0.25),
    "lora_alpha, scoped, other keys": (COMFYUI, {"diffusion_model.lora_alpha": "1"}, None, 0.25),
    "lora_alpha of the text encoder": (DIFFUSERS, {"text_encoder.lora_alpha": "1"}, None, 1.0),
    "lora_alpha for one layer each": (
        DIFFUSERS,
        {f"transformer.{layer}.alpha": "3" for layer in WAN},
        None,
        0.75,
    ),
    "absent values": (COMFYUI, {"lora_alpha": "None", "alpha": "", "r": "null"}, None, 1.0),
    "negative": (COMFYUI, {"alpha": "-2"}, None, -0.5),
    "two headers that agree": (COMFYUI, {"alpha": "2", "lora_alpha": "2.0", "network_dim": "4"}, None, 0.5),
    "rslora": (BARE, {METADATA: config(lora_alpha=3, use_rslora=True)}, None, 1.5),
    "rslora in the header": (COMFYUI, {"lora_alpha": "3", "use_rslora": "True"}, None, 1.5),
    "alpha tensor": (COMFYUI, {}, 3.0, 0.75),
    "alpha tensor and header": (COMFYUI, {"lora_alpha": "3", "rank": "4"}, 3.0, 0.75),
    "kohya without tensors": (KOHYA, {"ss_network_alpha": "1", "ss_network_dim": "4"}, None, 0.25),
    "kohya, dotted": (COMFYUI, {"ss_network_alpha": "1", "ss_network_dim": "4"}, None, 0.25),
    "musubi": (KOHYA, MUSUBI, 1.0, 0.25),
    "musubi, alphas removed": (KOHYA, MUSUBI, None, 0.25),
    "musubi, converted": (COMFYUI, CONVERTED, None, 1.0),
    "musubi, converted to bare names": (BARE, CONVERTED, None, 1.0),
    "musubi, renamed": (COMFYUI, MUSUBI, None, 0.25),
    "kohya, resized": (KOHYA, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, 2.0, 0.5),
    "kohya, alpha 0 is the rank": (KOHYA, {"ss_network_alpha": "0", "ss_network_dim": "4"}, 4.0, 1.0),
    "kohya, own rank of convolutions": (
        KOHYA,
        {"ss_network_alpha": "1", "ss_network_dim": "32", "ss_network_args": {"conv_dim": "4"}},
        3.0,
        0.75,
    ),
    "lycoris rs_lora": (
        KOHYA,
        {"ss_network_alpha": "1", "ss_network_dim": "4", "ss_network_args": {"rs_lora": "True"}},
        2.0,
        0.5,
    ),
    "rslora for alpha tensors": (DIFFUSERS, {"use_rslora": "true"}, 1.0, 0.5),
    "rs_lora": (DIFFUSERS, {"rs_lora": "1", "lora_alpha": "3"}, None, 1.5),
    "rank_stabilized": (DIFFUSERS, {"rank_stabilized": "yes", "lora_alpha": "3"}, None, 1.5),
    "use_rs_lora": (DIFFUSERS, {"lora_config": {"use_rs_lora": True, "lora_alpha": 3}}, None, 1.5),
    "a kind of LoRA": (DIFFUSERS, {"lora_type": "rsLoRA", "lora_alpha": "3"}, None, 1.5),
    "network_alphas of a text encoder": (
        DIFFUSERS,
        {"network_alphas": {"text_encoder.layers.0.q.alpha": 2}},
        None,
        1.0,
    ),
    "useRsLoRA": (DIFFUSERS, {"lora_config": {"useRsLoRA": True, "loraAlpha": 3}}, None, 1.5),
    "rslora in another object": (DIFFUSERS, {"use_rslora": "1", "train": {"lora_alpha": 3}}, None, 1.5),
    "rslora, alpha in both": (BARE, {METADATA: config(use_rslora=True)}, 1.0, 0.5),
    "rslora of diffusers": (BARE, {METADATA: {"transformer.use_rslora": True, "transformer.r": 4}}, 1.0, 0.5),
    "lycoris rs_lora, alpha not multiplied": (
        KOHYA,
        {"ss_network_alpha": "1", "ss_network_args": {"rs_lora": "True", "conv_dim": "4"}},
        1.0,
        0.5,
    ),
    "lycoris rs_lora with conv_dim": (
        KOHYA,
        {"ss_network_alpha": "1", "ss_network_args": {"rs_lora": "True", "conv_dim": "4"}},
        2.0,
        0.5,
    ),
    "an adapter": (DIFFUSERS, {METADATA: {"default": config(lora_alpha=2)}}, None, 0.5),
    "an adapter of an expert": (DIFFUSERS, {METADATA: {"transformer": {"default": config()}}}, None, 0.25),
    "an adapter of the other expert": (
        DIFFUSERS,
        {
            METADATA: {
                "transformer": {"default": config()},
                "transformer_2": {"default": config(lora_alpha=8)},
            }
        },
        None,
        0.25,
    ),
    "a list": (DIFFUSERS, {"lora_config": [{"lora_alpha": 2}]}, None, 0.5),
    "another list": (DIFFUSERS, {"peft": [{"lora_alpha": 2}]}, None, 0.5),
    "JSON in JSON": (DIFFUSERS, {METADATA: json.dumps(json.dumps({"transformer.lora_alpha": 2}))}, None, 0.5),
    "JSON in an object": (DIFFUSERS, {"train": {"lora": json.dumps({"lora_alpha": 2})}}, None, 0.5),
    "config": (DIFFUSERS, {"config": {"alpha": 2, "rank": 4}}, None, 0.5),
    "dotted config": (DIFFUSERS, {"config.alpha": "2"}, None, 0.5),
    "network_args": (DIFFUSERS, {"network_args": {"network_alpha": 2}}, None, 0.5),
    "network_alphas": (
        DIFFUSERS,
        {"network_alphas": {f"transformer.{layer}.alpha": 2 for layer in WAN}},
        None,
        0.5,
    ),
    "network_alphas without suffix": (DIFFUSERS, {"network_alphas": dict.fromkeys(WAN, 2)}, None, 0.5),
    "alphas of each expert": (
        DIFFUSERS,
        {
            f"{e}.{layer}.alpha": str(2 * i)
            for layer in WAN
            for i, e in enumerate(("transformer_2", "dit"), 1)
        },
        None,
        1.0,
    ),
    "ai-toolkit": (DIFFUSERS, {"training_info": {"network": {"linear": 4, "linear_alpha": 2}}}, None, 0.5),
    "LORA_ALPHA": (DIFFUSERS, {"LORA_ALPHA": "2"}, None, 0.5),
    "loraAlpha": (DIFFUSERS, {"loraAlpha": "2"}, None, 0.5),
    "lora-alpha": (DIFFUSERS, {"lora-alpha": "2"}, None, 0.5),
    "lora_network_alpha": (DIFFUSERS, {"lora_network_alpha": "2"}, None, 0.5),
    "tags and data": (
        KOHYA,
        {
            "ss_tag_frequency": {"10_cat": {"alpha": 5, "lora_alpha": 7}},
            "ss_datasets": [{"alpha_mask": False, "alpha": 3}],
            "job": {"rank": 0, "alpha_mask": True},
        },
        None,
        1.0,
    ),
    "kohya, alpha 0 without tensors": (KOHYA, {"ss_network_alpha": "0", "ss_network_dim": "4"}, None, 1.0),
    "alpha tensor 0 is the rank": (KOHYA, {}, 0.0, 1.0),
    "alpha tensor 0, rslora": (DIFFUSERS, {"use_rslora": "1"}, 0.0, 2.0),
}


@pytest.mark.parametrize("case", CASES)
def test_strength(tmp_path: Path, case: str) -> None:
    style, header, alpha, scale = CASES[case]
    check(lora(tmp_path, style, header, alpha), scale)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "my style.safetensors"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_the_folder_of_a_peft_adapter(tmp_path: Path, name: str, as_folder: bool) -> None:
    source = lora(tmp_path, PEFT)
    path = source.path.rename(tmp_path / name)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config(lora_alpha=6)))
    folds = check(LoraSource(tmp_path if as_folder else path), 1.5)
    assert (
        f"{name}: 6 keys, scale 1.5 (alpha 6, rank 4; from adapter_config.json lora_alpha)" in folds.notes[0]
    )


def test_another_adapter_config_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text('{"name": "something else", "size": 7}')
    check(lora(tmp_path, PEFT), 1.0)


ADAPTER_CONFIGS: dict[str, tuple[dict[str, Any], float | None, float]] = {
    # name: adapter_config.json, alpha tensor, scale
    "no peft_type": ({"r": 4, "alpha": 1}, None, 0.25),
    "network_alpha": ({"network_alpha": 1}, None, 0.25),
    "default alpha": ({"peft_type": "LORA", "r": 4}, None, 2.0),
    "default alpha, rslora": ({"peft_type": "LORA", "r": 4, "use_rslora": True}, None, 4.0),
    "adapter": ({"default": {"peft_type": "LORA", "lora_alpha": 2}}, None, 0.5),
    "expert": ({"transformer": {"lora_alpha": 2, "r": 4}}, None, 0.5),
    "rslora for alpha tensors": ({"peft_type": "LORA", "use_rslora": True, "r": 4}, 1.0, 0.5),
}


@pytest.mark.parametrize("case", ADAPTER_CONFIGS)
def test_other_shapes_of_an_adapter_config(tmp_path: Path, case: str) -> None:
    fields, alpha, scale = ADAPTER_CONFIGS[case]
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(fields))
    check(lora(tmp_path, PEFT, alpha=alpha), scale)


@pytest.mark.parametrize("fields", [{"r": 8, "alpha": 16}, {"rank": 8}, {"peft_type": "LORA"}])
def test_an_adapter_config_for_another_rank(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"rank 4 in its tensors, but 8 in .*adapter_config\.json"):
        folded(lora(tmp_path, PEFT))


PATTERNS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "end of a name": ({"to_q": 8}, {Q: 2.0, K: 0.25, FF: 0.25}),
    "more of the name": ({"attn2.to_k": 2, "net.0.proj": 16}, {Q: 0.25, K: 0.5, FF: 4.0}),
    "full names": ({Q: 8, f"^{K}": 2}, {Q: 2.0, K: 0.5, FF: 0.25}),
    "anchored": ({"^attn1.to_q": 8}, {Q: 0.25, K: 0.25, FF: 0.25}),
    "part of a segment": ({"o_q": 8}, {Q: 0.25, K: 0.25, FF: 0.25}),
    "expression": ({r"blocks\.\d+\.attn[12]\.to_(q|v)": 8}, {Q: 2.0, K: 0.25, FF: 0.25}),
    "expression over segments": ({r"blocks\.0\..*": 8}, {Q: 2.0, K: 0.25, FF: 2.0}),
    "anchored expression": ({r"^blocks.*to_k": 8, r"^attn.*": 2}, {Q: 0.25, K: 2.0, FF: 0.25}),
    "with the prefix of the keys": ({f"transformer.{Q}": 8, f"diffusion_model.{WAN[Q]}": 8}, {}),
    "points are any character": ({"attn..to_q": 8, "^blocks.1.attn..to.k": 2}, {Q: 2.0, K: 0.5, FF: 0.25}),
    "first match": ({r".*attn1\..*": 8, "to_q": 2}, {Q: 2.0, K: 0.25, FF: 0.25}),
}


@pytest.mark.parametrize("style", [DIFFUSERS, COMFYUI, KOHYA])
@pytest.mark.parametrize("case", PATTERNS)
def test_alpha_pattern(tmp_path: Path, case: str, style: Style) -> None:
    """Patterns are of Diffusers' names, also if the keys were renamed later."""
    table, scales = PATTERNS[case]
    if not scales:
        scales = {Q: 0.25 if style is KOHYA else 2.0, K: 0.25, FF: 0.25}
    check(lora(tmp_path, style, {METADATA: config(alpha_pattern=table)}), scales)


@pytest.mark.parametrize("root", [False, True])
def test_rank_pattern(tmp_path: Path, root: bool) -> None:
    factors = FACTORS | matrices(SHAPES, {K: ""}, rank=9)
    header = {METADATA: config(lora_alpha=6, rank_pattern={"to_k": 9}, use_rslora=root)}
    folds, after = folded(lora(tmp_path, DIFFUSERS, header, factors=factors))
    for layer, (down, up) in factors.items():
        scale = 6 / (len(down) ** 0.5 if root else len(down))
        assert torch.equal(after[layer], merged(WEIGHTS[f"{layer}.weight"], (scale, down, up)))
    assert ("scale 2 to 3 (alpha 6, rank 4 to 9, rsLoRA" if root else "scale 0.666667 to 1.5") in folds.notes[
        0
    ]


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_each_expert_has_its_own_alpha(tmp_path: Path, expert: str) -> None:
    tensors = {f"{name}.{k}": v for name in ("transformer", "transformer_2") for k, v in bare().items()}
    fields = scoped("transformer") | scoped("transformer_2", lora_alpha=8)
    source = save(tmp_path / "a.safetensors", tensors, {METADATA: json.dumps(fields)})
    check(source, {"transformer": 0.25, "transformer_2": 2.0}[expert], expert)


def bare() -> dict[str, Tensor]:
    return write(FACTORS, *BARE)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.int32]
)
def test_an_alpha_tensor_agrees_with_a_header_that_it_rounds(tmp_path: Path, dtype: torch.dtype) -> None:
    value = 22.627417 if dtype.is_floating_point else 22
    alpha = torch.tensor(value).to(dtype)
    tensors = bare() | {f"{layer}.alpha": alpha for layer in FACTORS}
    source = save(tmp_path / "a.safetensors", tensors, {"lora_alpha": str(value)})
    check(source, float(alpha.double()) / 4)


def test_the_flag_of_rslora_beside_an_alpha_tensor(tmp_path: Path) -> None:
    for flag, scale in ((True, 1.5), (False, 0.75)):
        extra = {f"{layer}.alpha": torch.tensor(3.0) for layer in FACTORS}
        extra |= {f"{layer}.use_rslora_flag": torch.tensor(flag) for layer in FACTORS}
        check(save(tmp_path / f"{flag}.safetensors", bare() | extra), scale)


def test_the_flag_of_rslora_without_an_alpha_tensor(tmp_path: Path) -> None:
    flags = {f"{layer}.use_rslora_flag": torch.tensor(True) for layer in FACTORS}
    check(save(tmp_path / "a.safetensors", bare() | flags, {"lora_alpha": "3"}), 1.5)
    with pytest.raises(CheckpointError, match="no alpha, but rsLoRA in use_rslora_flag tensors"):
        folded(save(tmp_path / "b.safetensors", bare() | flags))


@pytest.mark.parametrize("name", ["lora_alpha", "alpha", "transformer.lora_alpha", "diffusion_model.alpha"])
def test_an_alpha_tensor_of_the_file(tmp_path: Path, name: str) -> None:
    source = save(tmp_path / "a.safetensors", bare() | {name: torch.tensor(2)})
    folds = check(source, 0.5)
    assert f"7 keys, scale 0.5 (alpha 2, rank 4; from tensor {name})" in folds.notes[0]
    with pytest.raises(CheckpointError, match=f"1 .alpha 4. from tensor {name}"):
        folded(save(tmp_path / "b.safetensors", bare() | {name: torch.tensor(4)}, {"lora_alpha": "2"}))


def test_lokr_of_peft(tmp_path: Path) -> None:
    """PEFT scales two complete factors too: `LoKrLayer.update_layer` has alpha / r."""
    w1, w2 = torch.randn(4, 6), torch.randn(6, 4)
    source = save(tmp_path / "a.safetensors", {f"base_model.model.{Q}.lokr_w1": w1, f"{Q}.lokr_w2": w2})
    for fields, scale in (({"r": 4, "alpha": 1}, 0.25), ({"r": 16}, 0.5), ({}, 1.0)):
        (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LOKR"} | fields))
        change = Folds.open([source], "transformer", SHAPES).fold(
            f"{Q}.weight", torch.zeros(24, 24, dtype=torch.float64), 0
        )
        assert torch.allclose(change, torch.kron(w1.double(), w2.double()) * scale)


def test_loha_and_lokr_are_scaled_by_the_header(tmp_path: Path) -> None:
    a, b, c, d = torch.randn(24, 4), torch.randn(4, 24), torch.randn(24, 4), torch.randn(4, 24)
    loha = {
        f"{Q}.hada_{name}": t for name, t in zip(("w1_a", "w1_b", "w2_a", "w2_b"), (a, b, c, d), strict=True)
    }
    whole, left, right = torch.randn(4, 6), torch.randn(6, 2), torch.randn(2, 4)
    lokr = {f"{K}.lokr_w1": whole, f"{K}.lokr_w2_a": left, f"{K}.lokr_w2_b": right}
    source = save(tmp_path / "a.safetensors", loha | lokr, {"ss_network_alpha": "1", "ss_network_dim": "4"})
    folds = Folds.open([source], "transformer", SHAPES)
    zeros = torch.zeros(24, 24, dtype=torch.float64)
    loha_change = (a.double() @ b.double()) * (c.double() @ d.double()) / 4
    torch.testing.assert_close(folds.fold(f"{Q}.weight", zeros, 0), loha_change)
    lokr_change = torch.kron(whole.double(), left.double() @ right.double()) / 2
    torch.testing.assert_close(folds.fold(f"{K}.weight", zeros, 0), lokr_change)


CONFLICTS: dict[str, tuple[Style, dict[str, Any], float | None, str]] = {
    "tensor and header": (
        COMFYUI,
        {"lora_alpha": "8"},
        4.0,
        "scale 1 (alpha 4) from alpha tensors, but 2 (alpha 8) from header lora_alpha",
    ),
    "tensor and kohya's header": (KOHYA, MUSUBI, 4.0, "but 0.25 (alpha 1) from header ss_network_alpha"),
    "two headers": (
        COMFYUI,
        {"alpha": "8", "lora_alpha": "4"},
        None,
        "scale 1 (alpha 4) from header lora_alpha, but 2 (alpha 8) from header alpha",
    ),
    "header and metadata": (
        BARE,
        {"lora_alpha": "8", METADATA: config()},
        None,
        "but 0.25 (alpha 1) from header lora_adapter_metadata lora_alpha",
    ),
    "scoped and unscoped": (
        DIFFUSERS,
        {"lora_alpha": "8", "transformer.lora_alpha": "4"},
        None,
        "from header tr",
    ),
    "tensor and pattern": (
        BARE,
        {METADATA: config(alpha_pattern={"to_q": 2})},
        1.0,
        "lora_A.weight: scale 0.25",
    ),
    "rslora and tensor": (
        BARE,
        {METADATA: config(use_rslora=True)},
        3.0,
        "alpha 3 in its tensors: unclear with rsLoRA in header lora_adapter_metadata use_rslora",
    ),
    "two about rslora": (
        BARE,
        {"rs_lora": "1", METADATA: config(use_rslora=False)},
        None,
        "rsLoRA according to header rs_lora, but not according to header lora_adapter_metadata use_rslora",
    ),
    "rslora without alpha": (
        COMFYUI,
        {"use_rslora": "true"},
        None,
        "no alpha, but rsLoRA in header use_rslora",
    ),
    "unfamiliar alpha": (COMFYUI, {"my_alpha": "2"}, None, "header my_alpha: '2' may change the strength"),
    "unfamiliar alpha in an object": (
        COMFYUI,
        {"net": {"unet_alpha": 2}},
        None,
        "header net unet_alpha: 2 may",
    ),
    "alphas of other layers": (
        BARE,
        {"network_alphas": {Q: 2}},
        None,
        "no alpha for this layer, but for others",
    ),
    "no alpha in a configuration of PEFT": (
        BARE,
        {METADATA: config(lora_alpha=None)},
        None,
        "lora_alpha: None",
    ),
    "scaling": (COMFYUI, {"scaling": "0.25"}, None, "header scaling: '0.25' may change"),
    "two adapters": (
        BARE,
        {METADATA: {"one": config(), "two": config(lora_alpha=2)}},
        None,
        "but 0.5 (alpha 2) from header lora_adapter_metadata two.lora_alpha",
    ),
    "rank": (COMFYUI, {"rank": "8"}, None, "rank 4 in its tensors, but 8 in header rank"),
    "rank of kohya": (KOHYA, MUSUBI | {"ss_network_dim": "8"}, 1.0, "but 8 in header ss_network_dim"),
    "rank of metadata": (BARE, {METADATA: config(r=3)}, None, "but 3 in header lora_adapter_metadata r"),
    "rank pattern": (
        BARE,
        {METADATA: config(rank_pattern={"to_q": 3})},
        None,
        "lora_adapter_metadata rank_pattern",
    ),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_statements_that_disagree_are_refused(tmp_path: Path, case: str) -> None:
    style, header, alpha, message = CONFLICTS[case]
    with pytest.raises(CheckpointError) as e:
        folded(lora(tmp_path, style, header, alpha))
    assert e.value.code == "E-LRA-01"
    assert message in e.value.got
    assert "safetensors.torch.save_file(safetensors.torch.load_file(FILE), NEW)" in e.value.fix


def test_an_adapter_config_and_a_header_that_disagree(tmp_path: Path) -> None:
    source = lora(tmp_path, PEFT, {"lora_alpha": "8"})
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config()))
    with pytest.raises(CheckpointError, match="adapter_config.json lora_alpha") as e:
        folded(source)
    assert "2 (alpha 8) from header lora_alpha" in e.value.got
    assert e.value.fix == "move the file to a folder without adapter_config.json, or correct that"


NOTES = {
    "no alpha": (None, {}, "6 keys, scale 1 (no alpha in the file, rank 4) x weight 0.5"),
    "header": (
        None,
        {"lora_alpha": "1"},
        "6 keys, scale 0.25 (alpha 1, rank 4; from header lora_alpha) x weight 0.5",
    ),
    "both": (
        1.0,
        {"alpha": "1"},
        "9 keys, scale 0.25 (alpha 1, rank 4; from alpha tensors, header alpha) x weight 0.5",
    ),
    "converted": (
        None,
        CONVERTED,
        "scale 1 (alpha 1, rank 4; from header ss_network_alpha; already in the factors)",
    ),
}


@pytest.mark.parametrize("case", NOTES)
def test_notes(tmp_path: Path, case: str) -> None:
    alpha, header, note = NOTES[case]
    path = lora(tmp_path, COMFYUI, header, alpha).path
    folds = Folds.open([LoraSource(path, 0.5)], "transformer", SHAPES)
    assert folds.notes[0].startswith("a.safetensors: ") and note in folds.notes[0]
    assert Folds.open([LoraSource(path, 0.5, "transformer_2")], "transformer", SHAPES).notes == ()
