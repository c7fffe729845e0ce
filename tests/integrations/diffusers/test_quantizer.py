"""Stock Diffusers with folders written by ascendit, and with BF16 folders quantized while loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import other_models
import pytest
import tiny
import torch
from diffusers import PipelineQuantizationConfig, WanPipeline, WanTransformer3DModel
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from safetensors.torch import load_file, save_file
from stored import load_transformer
from torch import Tensor

import ascendit
from ascendit.checkpoint.layout import recognise
from ascendit.errors import AscenditError, CheckpointError, EnvironmentProblem, UsageError
from ascendit.integrations.diffusers import AscenditConfig, register
from ascendit.model.linear import QuantLinear
from ascendit.ops.operators import bind
from ascendit.pipeline import generate

RECIPES = ["int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale", "mixed"]
MIXED = """
round_to = "bf16"

[[rules]]
layers = "*"
scheme = "mxfp4"
scale_rule = "msms:ceil_x:search"

[[rules]]
layers = ["blocks.0.*", "proj_out"]
scheme = "mxfp8"

[[attention]]
layers = "*.attn1"
quant_type = "FP8_DYNAMIC"
rotate = true
"""
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4}


@pytest.fixture(scope="session")
def scheme_or_file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`scheme_or_file(recipe)`: a scheme unchanged, or the file of the mixed recipe."""
    file = tmp_path_factory.mktemp("recipes") / "mixed.toml"
    file.write_text(MIXED)
    return lambda recipe: str(file) if recipe == "mixed" else recipe


@pytest.fixture(scope="session")
def folder(scheme_or_file: Any, tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`folder(recipe, model)`: the quantized folder of a tiny model, written once."""
    folders: dict[tuple[str, str], Path] = {}

    def make(recipe: str, model: str = "t2v_cascade") -> Path:
        if (recipe, model) not in folders:
            dst = tmp_path_factory.mktemp("quantized") / recipe
            kwargs = {"recipe" if recipe == "mixed" else "scheme": scheme_or_file(recipe)}
            ascendit.quantize(tiny_folder(model), dst, **kwargs)
            folders[recipe, model] = dst
        return folders[recipe, model]

    return make


def load(path: Path, config: AscenditConfig | None = None, **options: Any) -> Any:
    if config is not None:
        options["quantization_config"] = config
    return copied_from_file(WanTransformer3DModel.from_pretrained(path, **options))


def copied_from_file(model: Any) -> Any:
    """Copy every parameter: float sums depend slightly on the alignment in a memory-mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def inputs(model: Any, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(1, model.config.in_channels, 3, 6, 4), torch.randn(1, 64, model.config.text_dim)


def output(model: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    x, text = (t.to(dtype) for t in inputs(model, seed))
    with torch.inference_mode():
        out: Tensor = model(x, torch.tensor([431.0]), text, return_dict=False)[0]
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def raw(t: Tensor) -> Tensor:
        return t.contiguous().view(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(raw(a[n]), raw(b[n])) for n in a
    )


# ---- transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_quantized_folder_gives_the_outputs_of_our_transformer(recipe: str, folder: Any) -> None:
    path = folder(recipe)
    stock = load(path / "transformer")
    layers = [m for m in stock.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 20 + (recipe == "mixed") and not any(p.is_meta for p in stock.parameters())
    ours = load_transformer(recognise(path).parts["transformer"], bind("cpu"), dtype=torch.float32)
    for block in ours.blocks:  # Diffusers does not quantize the attention of the mixed recipe
        assert block.attn1.scheme == ("fp8" if recipe == "mixed" else None)
        block.attn1.scheme = None
    differences = []
    for seed in range(3):
        x, text = inputs(stock, seed)
        with torch.inference_mode():
            expected = ours(x, 431.0, ours.prepare(ours.grid_of(x), text))
        differences.append(relative(output(stock, seed), expected))
    # A different summation order sometimes rounds a value to the next quantized one; hence the median.
    assert sorted(differences)[1] < 1e-5 and max(differences) < 2e-2


@pytest.mark.parametrize("recipe", RECIPES)
def test_online_and_offline_quantization_give_the_stored_tensors(
    recipe: str, folder: Any, scheme_or_file: Any, tiny_t2v_cascade: Path
) -> None:
    path = folder(recipe) / "transformer"
    offline = load(path)
    online = load(tiny_t2v_cascade / "transformer", AscenditConfig(scheme_or_file(recipe)))
    stored = load_file(path / tiny.WEIGHTS)
    as_float32 = {
        n: t.float() if t.dtype == torch.bfloat16 else t for n, t in stored.items() if "_rot" not in n
    }
    assert same_tensors(offline.state_dict(), as_float32) and same_tensors(online.state_dict(), as_float32)
    assert torch.equal(output(online), output(offline))
    config = json.loads((path / "config.json").read_text()).get("quantization_config")
    for model in (online, offline):
        assert model.config.quantization_config.to_dict() == (config or {"quant_method": "ascendit"})


@pytest.mark.parametrize(("name", "recipe"), [("t2v_single", "int8"), ("i2v_21", "mxfp8"), ("ti2v", "fp8")])
def test_other_wan_models_load(name: str, recipe: str, folder: Any) -> None:
    path = folder(recipe, name) / "transformer"
    model = load(path, torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and model.scale_shift_table.dtype == torch.float32
    quantized = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert quantized == {
        n[: -len(".weight_scale")] for n in load_file(path / tiny.WEIGHTS) if "weight_scale" in n
    }


def test_several_shards_and_a_device_map(folder: Any, tmp_path: Path) -> None:
    model = load(folder("mxfp8") / "transformer")
    model.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 4
    for options in ({}, {"device_map": "cpu"}, {"device_map": {"": torch.device("cpu")}}):
        assert torch.equal(output(load(tmp_path / "m", **options)), output(model))


def test_a_single_file_is_quantized_while_it_loads(tiny_t2v_cascade: Path) -> None:
    path = tiny_t2v_cascade / "transformer"
    model = WanTransformer3DModel.from_single_file(
        str(path / tiny.WEIGHTS), config=str(path), quantization_config=AscenditConfig("ascend-w4a4")
    )
    assert torch.equal(
        output(copied_from_file(model)), output(load(path, AscenditConfig(recipe="ascend-w4a4")))
    )


def test_smoothed_layers(folder: Any, tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    names = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v", "blocks.1.attn2.to_q"]
    scales = {name: torch.rand(tiny.WIDTH) + 0.5 for name in names}
    smoothing = {"transformer": scales, "transformer_2": scales}
    keep = ["blocks.1.attn2.to_q"]
    ascendit.quantize(tiny_t2v_cascade, tmp_path / "s", scheme="mxfp8", smoothing=smoothing, keep=keep)
    stock = load(tmp_path / "s/transformer")
    ours = load_transformer(recognise(tmp_path / "s").parts["transformer"], bind("cpu"))
    x, text = inputs(stock, 0)
    with torch.inference_mode():
        expected = ours(x, 431.0, ours.prepare(ours.grid_of(x), text))
    assert relative(output(stock), expected) < 1e-5
    stock.save_pretrained(tmp_path / "again")
    assert torch.equal(output(load(tmp_path / "again")), output(stock))


@pytest.mark.parametrize("name", other_models.BUILDERS)
def test_other_models_are_quantized_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, call = other_models.build(name)
    model.save_pretrained(tmp_path / "float", max_shard_size="500KB")
    ascendit.quantize_(model, "mxfp4", keep=["*.to_out.0"])
    expected = other_models.output(copied_from_file(model), call)
    config = AscenditConfig("mxfp4", keep=["*.to_out.0"])
    online = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    assert torch.equal(other_models.output(copied_from_file(online), call), expected)
    for path, source in ((tmp_path / "a", model), (tmp_path / "b", online)):
        source.save_pretrained(path, max_shard_size="200KB")
        assert torch.equal(
            other_models.output(copied_from_file(type(model).from_pretrained(path)), call), expected
        )


# ---- pipelines ----------------------------------------------------------------------------------


def stock_latents(pipe: Any, prompt: str | list[str] = "a cat", **fields: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(7) for _ in ([prompt] if isinstance(prompt, str) else prompt)]
    out: Tensor = pipe(prompt, generator=generator, output_type="latent", **SMALL, **fields).frames
    return out


def our_latents(path: Path, attention: str | None = None, **fields: Any) -> Tensor:
    pipe = ascendit.load(path, dtype=torch.float32, attention=attention)
    request = pipe.request("a cat", seed=7, **SMALL, **fields)
    return generate.denoise(pipe, request, None, lambda event: None, None)


def test_the_stock_pipeline_gives_our_video(folder: Any, tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    """With guidance and both experts, for one and two prompts, and after saving the pipeline."""
    pipe = WanPipeline.from_pretrained(folder("mxfp8"))
    single = stock_latents(pipe, guidance_scale=4.0)
    expected = our_latents(folder("mxfp8"), guidance_scale=4.0)
    quantization_error = relative(our_latents(tiny_t2v_cascade, guidance_scale=4.0), expected)
    assert relative(single, expected) < 0.3 * quantization_error < 0.03
    pair = stock_latents(pipe, ["a cat", "a dog"], guidance_scale=4.0)
    assert relative(pair[:1], single) < 0.5 * relative(pair[1:], single)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(our_latents(tmp_path / "saved", guidance_scale=4.0), expected)
    configs = [
        json.loads((p / "transformer/config.json").read_text()) for p in (folder("mxfp8"), tmp_path / "saved")
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    report = "\n".join(ascendit.inspect(tmp_path / "saved").lines())
    assert "mxfp8   20 layers" in report and "0 missing, 0 unexpected, 0 misshapen, 0 mistyped   ok" in report


def test_a_mixed_recipe_in_a_pipeline(folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Diffusers neither quantizes attention nor saves its types, and says so."""
    pipe = WanPipeline.from_pretrained(folder("mixed"))
    said = [m for m in caplog.messages if "attention is not quantized, and save_pretrained drops" in m]
    assert len(said) == 2 and all("fp8 for 2" in m for m in said)
    expected = stock_latents(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    assert relative(stock_latents(WanPipeline.from_pretrained(tmp_path / "saved")), expected) < 0.1
    assert torch.equal(our_latents(tmp_path / "saved"), our_latents(folder("mixed"), "bf16"))


def test_a_folder_without_a_quantization_config(folder: Any, tmp_path: Path) -> None:
    """SGLang's format has none: the user passes a config for the quantized folder."""
    ascendit.repack(folder("int8"), tmp_path / "s", engine="sglang")
    assert "quantization_config" not in json.loads((tmp_path / "s/transformer/config.json").read_text())
    config = PipelineQuantizationConfig(
        quant_mapping={"transformer": AscenditConfig(), "transformer_2": AscenditConfig()}
    )
    pipe = WanPipeline.from_pretrained(tmp_path / "s", quantization_config=config)
    assert torch.equal(stock_latents(pipe), stock_latents(WanPipeline.from_pretrained(folder("int8"))))


def test_model_offload(folder: Any) -> None:
    pipe = WanPipeline.from_pretrained(folder("mxfp8"))
    expected = stock_latents(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert relative(stock_latents(pipe), expected) < 2e-2
    model = load(folder("mxfp8") / "transformer")
    expected = output(model)
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    assert torch.equal(output(model), expected)
    hook.offload()
    accelerate.hooks.remove_hook_from_module(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("recipe", ["int8", "mxfp8", "mxfp4_dualscale"])
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(offload_type: str, recipe: str, folder: Any) -> None:
    """Hooks move the parameters of a few layers at a time; the output is unchanged."""
    model = load(folder(recipe) / "transformer")
    expected, cpu = output(model), torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type=offload_type, num_blocks_per_group=1)
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("recipe", ["int8", "fp8", "mxfp4", "mxfp4_dualscale"])
def test_sequential_offload(recipe: str, folder: Any) -> None:
    """accelerate loads each parameter before the layer computes, and offloads it afterwards."""
    model = load(folder(recipe) / "transformer")
    expected, layer = output(model), model.blocks[0].ffn.net[2]
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(output(model), expected)
    assert all(p.is_meta for p in layer.parameters()) and layer.group.extra_nbytes == 0
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(output(model), expected) and layer.weight.dtype == layer.compute_dtype


# ---- errors -------------------------------------------------------------------------------------


def test_diffusers_refuses_the_folder_if_ascendit_is_not_registered(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "mxfp8")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "mxfp8")
    with pytest.raises(ValueError, match="Unknown quantization type, got mxfp8"):
        load(folder("mxfp8") / "transformer")


def test_a_quant_method_of_another_library_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "mxfp8", object)
    register()
    assert auto.AUTO_QUANTIZER_MAPPING["mxfp8"] is object and "quant_method mxfp8" in caplog.text


def test_an_older_diffusers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DiffusersQuantizer, "maybe_update_loaded_keys")
    with pytest.raises(EnvironmentProblem, match=r"0\.39 or newer") as e:
        register()
    assert e.value.code == "E-ENV-01"


def test_casts_are_refused_before_any_tensor_is_cast(folder: Any) -> None:
    model = load(folder("mxfp8") / "transformer")
    expected = output(model)
    for cast in (lambda: model.to(torch.bfloat16), model.half, model.float):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    assert torch.equal(output(model), expected)
    with pytest.raises(UsageError, match="mxfp8 to torch.float8_e4m3fn"):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def test_fusing_into_quantized_weights_is_refused(folder: Any) -> None:
    """The change would be lost, or the layer would no longer be quantized; reading a weight is allowed."""
    model = load(folder("mxfp8") / "transformer")
    expected, layer = output(model), model.blocks[0].attn1.to_q
    for fuse in (model.fuse_qkv_projections, lambda: layer.weight.data.add_(1)):
        with pytest.raises(UsageError, match="weight.data of a quantized layer") as e:
            fuse()
        assert e.value.code == "E-QNT-03" and "fuse before" in e.value.fix
    assert torch.equal(output(model), expected)
    x = torch.randn(3, layer.in_features)
    reference = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert type(reference) is Tensor and relative(layer(x), reference) < 0.05


def edit(path: Path, how: str) -> None:
    """Damage one transformer folder."""
    tensors = load_file(path / tiny.WEIGHTS)
    name = "blocks.1.ffn.net.0.proj"
    if how == "nan":
        tensors[f"{name}.weight_scale"][0, 0] = 255
    elif how == "lost":
        del tensors[f"{name}.bias"]
    elif how == "half":
        del tensors[f"{name}.weight_scale"]
    elif how == "manifest":
        file = path / "quant_model_description.json"
        file.write_text(file.read_text().replace("W8A8_MXFP8", "W4A4_MXFP4", 1))
        return
    save_file(tensors, path / tiny.WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "code", "text"),
    [
        ("nan", "E-CKP-08", "blocks.1.ffn.net.0.proj.weight_scale has 1 NaN scales"),
        ("lost", "E-CKP-04", "blocks.1.ffn.net.0.proj.bias"),
        ("half", "E-CKP-08", "blocks.1.ffn.net.0.proj"),
        ("manifest", "E-CKP-07", "blocks.0.attn1.to_q"),
    ],
)
def test_a_damaged_folder_is_refused(how: str, code: str, text: str, folder: Any, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(folder("mxfp8") / "transformer", path)
    edit(path, how)
    with pytest.raises(CheckpointError, match=text) as e:
        load(path)
    assert e.value.code == code


def test_a_float_folder_without_a_tensor_is_refused(tiny_t2v_cascade: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(tiny_t2v_cascade / "transformer", path)
    edit(path, "lost")
    with pytest.raises(CheckpointError, match="blocks.1.ffn.net.0.proj.bias") as e:
        load(path, AscenditConfig("mxfp8"))
    assert e.value.code == "E-CKP-04"


def test_another_layout_is_refused_with_repack_as_the_fix(folder: Any, tmp_path: Path) -> None:
    ascendit.repack(folder("mxfp4"), tmp_path / "omni", engine="vllm-omni")
    with pytest.raises(CheckpointError, match="F8_E4M3") as e:
        load(tmp_path / "omni/transformer")
    assert e.value.code == "E-CKP-04" and "ascendit repack" in e.value.fix


@pytest.mark.parametrize(
    ("recipe", "config", "code", "text"),
    [
        ("", {}, "E-USE-01", "which is not quantized"),
        ("", {"scheme": "mxfp8", "keep": ["blocks.7.*"]}, "E-USE-05", "blocks.7"),
        ("", {"scheme": "mxfp8", "recipe": "ascend-w4a4"}, "E-USE-01", "2 of recipe and scheme"),
        ("", {"scheme": "mxfp8", "keeps": ["*"]}, "E-USE-01", "keeps="),
        ("", {"scheme": "mxfp7"}, "E-USE-02", "mxfp7"),
        ("", {"scheme": "mxfp8", "device": "twin:a2"}, "E-CAP-01", "mxfp8 on twin:a2"),
    ],
)
@pytest.mark.usefixtures("twin")
def test_invalid_arguments_are_refused(
    recipe: str, config: dict[str, Any], code: str, text: str, folder: Any, tiny_t2v_cascade: Path
) -> None:
    path = folder(recipe) if recipe else tiny_t2v_cascade
    with pytest.raises(AscenditError, match=text) as e:
        load(path / "transformer", AscenditConfig(**config))
    assert e.value.code == code


def test_quantized_weights_are_not_quantized_again(folder: Any, tmp_path: Path) -> None:
    ascendit.repack(folder("int8"), tmp_path / "s", engine="sglang")
    with pytest.raises(UsageError, match="which is already quantized") as e:
        load(tmp_path / "s/transformer", AscenditConfig("mxfp8"))
    assert e.value.code == "E-QNT-01"


def test_offloading_device_maps_are_refused(folder: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="disk") as e:
        load(folder("mxfp8") / "transformer", device_map={"": "disk"}, offload_folder=tmp_path)
    assert "enable_model_cpu_offload" in e.value.fix
