"""`quantize_`: layers quantized in other models, the error of their outputs, and checks before any change."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import other_models
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

import ascendit
from ascendit import mx
from ascendit.errors import AscenditError, EnvironmentProblem, UsageError
from ascendit.model.linear import QuantLinear
from ascendit.model.quantize_module import bind_
from ascendit.model.weight_loader import nbytes
from ascendit.quant.recipe import load_recipe

SQNR = {"int8": 36.0, "fp8": 26.0, "mxfp8": 25.0, "mxfp4": 12.5, "mxfp4_dualscale": 11.5}
"""Least dB of the model's output, two to four blocks deep; 1.5 dB below the measured value."""


def quantized_layers(module: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantLinear)}


@pytest.mark.parametrize("scheme", SQNR)
@pytest.mark.parametrize("name", other_models.BUILDERS)
def test_output_is_close_to_the_floats(name: str, scheme: str) -> None:
    model, call = other_models.build(name)
    before = other_models.output(model, call)
    report = ascendit.quantize_(model, scheme)
    after = other_models.output(model, call)
    assert SQNR[scheme] < mx.sqnr(before, after) < SQNR[scheme] + 14
    assert len(quantized_layers(model)) == report.schemes[scheme] > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", other_models.BUILDERS)
def test_a_quantized_model_is_still_a_module(name: str, dtype: torch.dtype) -> None:
    """Copies, moves, loading a state dict, and the attributes that models and pipelines read."""
    model, call = other_models.build(name, dtype)
    other = copy.deepcopy(model)
    ascendit.quantize_(model, "mxfp8")
    expected = other_models.output(model, call)
    assert expected.dtype == dtype and (model.dtype, model.device.type) == (dtype, "cpu")
    layer = next(iter(quantized_layers(model).values()))
    assert layer.weight.dtype == layer.compute_dtype == dtype and layer.weight.device.type == "cpu"
    assert torch.equal(other_models.output(copy.deepcopy(model).to("cpu"), call), expected)
    ascendit.quantize_(other, "mxfp8")
    for parameter in other.parameters():
        parameter.zero_()
    state = {k: v.zero_() if v.dtype != torch.uint8 else v for k, v in other.state_dict().items()}
    other.load_state_dict(state)
    assert not torch.equal(other_models.output(other, call), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other_models.output(other, call), expected)


def test_flux_report() -> None:
    model, _ = other_models.build("flux", torch.bfloat16)
    report = ascendit.quantize_(model, "mxfp8", keep=["single_transformer_blocks.1.*"])
    assert report.schemes == {"mxfp8": 29, "bf16": 19}
    assert report.kept == {
        "not a linear of the blocks": (
            "time_text_embed.*",
            "context_embedder",
            "x_embedder",
            "norm_out.linear",
            "proj_out",
        ),
        "modulation layer, one row per sample": (
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
        ),
        "--keep single_transformer_blocks.1.*": (
            "single_transformer_blocks.1.proj_mlp",
            "single_transformer_blocks.1.proj_out",
            "single_transformer_blocks.1.attn.*",
        ),
    }
    assert {n for n, scheme in report.layers.items() if scheme == "mxfp8"} == quantized_layers(model).keys()
    saved = sum(
        m.weight.numel() * (2 - 33 / 32) - 2 * m.out_features for m in quantized_layers(model).values()
    )
    assert report.bytes_after == nbytes(model) == report.bytes_before - saved
    assert report.lines()[0].startswith("FluxTransformer2DModel: 29 mxfp8, 19 bf16   0.9 MiB -> ")
    assert report.as_dict()["layers"] == {"mxfp8": 29, "bf16": 19}


def test_qwen_modulation_and_hunyuan_refiner_are_excluded_by_default() -> None:
    qwen, _ = other_models.build("qwen_image")
    report = ascendit.quantize_(qwen, "int8")
    assert not [name for name in quantized_layers(qwen) if "_mod." in name]
    assert "transformer_blocks.*.img_mod.1" in report.kept["modulation layer, one row per sample"]
    hunyuan, _ = other_models.build("hunyuan_video")
    assert not [name for name in quantized_layers(hunyuan) if "refiner" in name]


def test_a_rule_can_name_layers_that_are_excluded_by_default(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[[rules]]\nlayers = "*"\nscheme = "mxfp4"\n'
        '[[rules]]\nlayers = ["*.img_mod.1", "transformer_blocks.0.attn.*"]\nscheme = "mxfp8"\n'
    )
    model, call = other_models.build("qwen_image")
    report = ascendit.quantize_(model, recipe)
    assert report.schemes == {"mxfp8": 10, "mxfp4": 16, "bf16": 8}
    assert report.layers["transformer_blocks.1.img_mod.1"] == "mxfp8"
    assert other_models.output(model, call).isfinite().all()


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    model, _ = other_models.build("flux")
    with pytest.raises(UsageError, match="single_transformer_blocks") as e:
        ascendit.quantize_(model, "mxfp8", keep=["single_blocks.*"])
    assert e.value.code == "E-USE-05" and "named_modules" in e.value.fix and not quantized_layers(model)


# ---- other modules ------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, k: int = 64, n: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(k)
        self.to_out = nn.ModuleList([nn.Linear(k, n), nn.Dropout()])
        self.gate = nn.Linear(k, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.to_out[0](self.norm(x)) * self.gate(x).mean()
        return y


def test_layers_without_a_matmul_are_excluded_with_the_reason() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block(72, 64), Block(64, 72)])})
    report = ascendit.quantize_(model, "mxfp8")
    assert list(quantized_layers(model)) == ["blocks.0.to_out.0"]
    assert report.kept == {
        "smaller than 32": ("blocks.*.gate",),
        "K is not a multiple of 32": ("blocks.1.to_out.0",),
        "N is not a multiple of 16": ("blocks.2.to_out.0",),
    }


def test_all_layers_of_a_block_or_of_a_module_without_blocks_are_quantized() -> None:
    block = Block()
    assert ascendit.quantize_(block, "int8").schemes == {"int8": 1, "bf16": 1}
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.GELU(), nn.Linear(128, 64))
    x = torch.randn(3, 5, 64)
    expected = model(x)
    ascendit.quantize_(model, load_recipe("default", "int8"))
    assert list(quantized_layers(model)) == ["0", "2"] and model[0].bias is None
    assert mx.sqnr(expected, model(x)) > 30
    assert not model(x).requires_grad


def test_the_float_weights_are_freed() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    old = [weakref.ref(m.weight) for m in model]
    ascendit.quantize_(model, "mxfp4")
    gc.collect()
    assert [ref() for ref in old] == [None, None]


def test_memory_never_exceeds_the_module_and_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is encoded, all layers before it are already quantized."""
    from ascendit.model import quantize_module

    model, counts = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), []
    encode = quantize_module.encode_weight

    def watch(*args: Any) -> Any:
        counts.append(len(quantized_layers(model)))
        return encode(*args)

    monkeypatch.setattr(quantize_module, "encode_weight", watch)
    ascendit.quantize_(model, "mxfp8")
    assert counts == [0, 1, 2, 3]


def test_a_layer_that_is_used_twice_stays_shared() -> None:
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.GELU(), shared)
    ascendit.quantize_(model, "int8")
    assert isinstance(model[0], QuantLinear) and model[0] is model[2]
    assert model(torch.randn(2, 64)).isfinite().all()


class Odd(nn.Linear):
    """Does more than multiply."""


def unsupported(how: str) -> nn.Module:
    last = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(64, 64), last)
    if how == "nan":
        last.weight.data[3, 4] = torch.nan
    elif how == "meta":
        last.to("meta")
    elif how == "float8":
        last.weight.data = last.weight.data.to(torch.float8_e4m3fn)
    elif how == "small":
        return nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))
    elif how == "none":
        return nn.Sequential(nn.Conv1d(4, 4, 1))
    elif how == "odd":
        return nn.Sequential(Odd(64, 64))
    elif how == "twice":
        ascendit.quantize_(model, "int8")
    return model


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("nan", "1.weight holds NaN"),
        ("meta", "1.weight is on the meta device"),
        ("float8", "1.weight is float8_e4m3fn"),
        ("small", "smaller than 32: 0, 1"),
        ("none", "contains no linear layer"),
        ("odd", "a Odd, which does more than multiply"),
        ("twice", "already quantized, such as 0"),
    ],
)
def test_a_refused_module_is_unchanged(how: str, text: str) -> None:
    module = unsupported(how)
    types = [type(m) for m in module.modules()]
    with pytest.raises(UsageError, match=text) as e:
        ascendit.quantize_(module, "mxfp8")
    assert e.value.code == "E-QNT-01" and [type(m) for m in module.modules()] == types


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UsageError, match="mxfp6") as e:
        ascendit.quantize_(nn.Sequential(nn.Linear(64, 64)), "mxfp6")
    assert e.value.code == "E-USE-02"


# ---- devices ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("twin")
def test_a_chip_refuses_schemes_without_a_matmul_and_emulates_on_request() -> None:
    model, call = other_models.build("flux", torch.bfloat16)
    with pytest.raises(EnvironmentProblem, match="mxfp8 on twin:a2") as e:
        ascendit.quantize_(model, "mxfp8", device="twin:a2")
    assert e.value.code == "E-CAP-01" and not quantized_layers(model)
    ascendit.quantize_(model, "mxfp8", device="twin:a2", emulate=True)
    expected = other_models.output(model, call)
    bind_(model, device="twin:a5")
    layer = next(iter(quantized_layers(model).values()))
    assert str(layer.group.schemes.device) == "twin:a5"
    assert mx.sqnr(expected, other_models.output(model, call)) > 25
    bind_(model, device="cpu", emulate="decode-once", activation_rule="mxfp8=floor")
    assert layer.group.schemes.wish.emulate == "decode-once" and layer.group.schemes.rules == {
        "mxfp8": "floor"
    }
    assert mx.sqnr(expected, other_models.output(model, call)) > 20


def test_an_input_on_another_device_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    ascendit.quantize_(model, "int8")
    with pytest.raises(UsageError, match="an input on meta for a layer in int8 on cpu") as e:
        model(torch.empty(2, 64, device="meta"))
    assert e.value.code == "E-QNT-03" and "enable_model_cpu_offload" in e.value.fix


# ---- Wan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["int8", "mxfp4", "ascend-w4a4"])
def test_wan_gets_the_same_layers_and_bits_as_with_quantize(
    recipe: str, tiny_t2v_single: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file

    how = {"recipe": recipe} if recipe == "ascend-w4a4" else {"scheme": recipe}
    ascendit.quantize(tiny_t2v_single, tmp_path / "q", **how)  # type: ignore[arg-type]
    expected = load_file(tmp_path / "q/transformer/diffusion_pytorch_model.safetensors")
    model = WanTransformer3DModel.from_pretrained(tiny_t2v_single / "transformer")
    report = ascendit.quantize_(model, recipe)
    state = model.state_dict()
    assert state.keys() == {name for name in expected if not name.endswith("_rot")}
    for name, tensor in state.items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), _bytes(expected[name].to(tensor.dtype))), name
    assert report.kept == {"not a linear of the blocks": ("condition_embedder.*", "proj_out")}
    warned = "only ascendit's own pipeline quantizes it (fp8 for 1)" in caplog.text
    assert warned == (recipe == "ascend-w4a4")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def test_fp4_on_ti2v_needs_force(tiny_ti2v: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(tiny_ti2v / "transformer")
    with pytest.raises(AscenditError) as e:
        ascendit.quantize_(model, "mxfp4")
    assert e.value.code == "E-QNT-02" and not quantized_layers(model)
    assert ascendit.quantize_(model, "mxfp4", force=True).schemes["mxfp4"] > 0


def test_forward_hooks_are_preserved():
    m = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    calls: list[str] = []
    m[0].register_forward_hook(lambda *_: calls.append("after"))
    m[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    ascendit.quantize_(m, "int8")
    m(torch.randn(2, 64))
    assert calls == ["before", "after"] and isinstance(m[0], QuantLinear)
