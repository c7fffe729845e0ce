"""LoRA files that are added while a model loads: the same bytes as a folder quantized with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import tiny
import torch
from convert import loras
from convert.models import same
from pipeline import headers
from safetensors.torch import load_file, save_file
from torch import Tensor

import ascendit
from ascendit.checkpoint.component import EXPERTS
from ascendit.errors import AscenditError
from ascendit.family import SPECS
from ascendit.model.linear import QuantLinear
from ascendit.model.loader import load_expert
from ascendit.ops.operators import bind
from ascendit.option_text import command_line
from ascendit.pipeline.job import prepare, prepare_model
from ascendit.pipeline.options import LoadOptions
from ascendit.quant.schemes import QUANTIZED
from ascendit.weights.lora.fold import LoraSource, lora_sources

PROMPT = "a red circle moves right"
LAYER = "blocks.1.attn2.to_v"
SMALL: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 5, "width": 32, "height": 32, "seed": 3}
Factors = dict[str, tuple[Tensor, Tensor]]

CASES: dict[str, tuple[str, ...]] = {
    "everything": ("{style}:-0.75", "high={details}", "{pair}:1.25", "low={style}:0.3"),
    "one with a weight": ("{style}:0.5",),
    "one for each expert": ("high={style}:0.3", "low={details}:2"),
    "the second expert alone": ("transformer_2={style}",),
}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T2V model with two experts, in BF16."""
    return tiny.build_t2v_cascade(tmp_path_factory.mktemp("cascade") / "model", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def shapes(cascade: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in load_file(cascade / "transformer" / tiny.WEIGHTS).items()}


@pytest.fixture(scope="module")
def factors(shapes: dict[str, tuple[int, ...]]) -> Factors:
    """Layer -> (down, up) of every linear layer of the blocks."""
    factors = loras.matrices(shapes, loras.block_layers(loras.LAYERS))
    return {layer: (0.1 * down, 0.1 * up) for layer, (down, up) in factors.items()}


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, factors: Factors, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Path]:
    """Name -> LoRA file: factors of every layer, differences of other tensors, and one for both experts."""
    folder = tmp_path_factory.mktemp("loras")
    style = loras.write(
        factors, lambda layer: f"diffusion_model.{layer}", ".lora_down.weight", ".lora_up.weight"
    )
    details = {
        f"{LAYER}.diff": torch.randn(64, 64),
        f"{LAYER}.diff_b": torch.randn(64),
        "blocks.0.norm2.diff": torch.randn(64),
        "proj_out.diff": torch.randn(shapes["proj_out.weight"]),
    }
    pair: dict[str, Tensor] = {}
    for number, expert in enumerate(EXPERTS):
        down, up = loras.matrices(shapes, {LAYER: ""}, seed=number)[LAYER]
        key = f"{expert}.{LAYER}"
        pair |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    tensors = {"style": style, "details": {k: 0.1 * v for k, v in details.items()}, "pair": pair}
    return {name: loras.save(folder / f"{name}.safetensors", x).path for name, x in tensors.items()}


@pytest.fixture(scope="module")
def folded(cascade: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float folder of the case `everything`."""
    folder = tmp_path_factory.mktemp("folded") / "model"
    ascendit.quantize(cascade, folder, scheme="bf16", loras=texts(CASES["everything"], files))
    return folder


def texts(case: Sequence[str], files: dict[str, Path]) -> list[str]:
    return [text.format(**files) for text in case]


def contents(model: Path, **options: Any) -> dict[str, Tensor]:
    """All tensors of the loaded transformers, with the BF16 weights of quantized layers."""
    prepared = prepare_model(LoadOptions(model=str(model), **options))
    floats = "bf16" in prepared.schedule.precisions
    tensors: dict[str, Tensor] = {}
    for expert, applied in prepared.experts:
        loaded = load_expert(expert, applied, bind("cpu", "reference"), floats=floats)
        named = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
        tensors |= {f"{expert.name}.{name}": tensor for name, tensor in named.items()}
        for name, layer in loaded.named_modules():
            for i, tensor in enumerate((layer.floats or ()) if isinstance(layer, QuantLinear) else ()):
                if tensor is not None:
                    tensors[f"{expert.name}.{name}.floats.{i}"] = tensor
    return tensors


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [name for name, tensor in ours.items() if not same(tensor.detach(), theirs[name].detach())]
    assert different == []


# ---- loading equals a folder with the LoRA -------------------------------------------------------


GRID = [
    pytest.param(scheme, case, marks=[] if case == "everything" else pytest.mark.slow)
    for scheme in ("bf16", *QUANTIZED)
    for case in CASES
]


@pytest.mark.parametrize(("scheme", "case"), GRID)
def test_loading_gives_the_bytes_of_the_folder(
    scheme: str, case: str, cascade: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    chosen = texts(CASES[case], files)
    ascendit.quantize(cascade, tmp_path / "folder", scheme=scheme, loras=chosen)
    ours = contents(cascade, scheme=scheme, loras=chosen)
    assert_same(ours, contents(tmp_path / "folder"))
    plain = contents(cascade, scheme=scheme)
    changed = {name.split(".")[0] for name in ours if not same(ours[name], plain[name])}
    assert changed == ({"transformer_2"} if "alone" in case else {*EXPERTS})


def test_unquantized_weights_equal_float64_rounded_once(
    cascade: Path, factors: Factors, files: dict[str, Path]
) -> None:
    """Without a scheme: NumPy's float64 product, added and rounded to BF16; other tensors do not change."""
    ours = contents(cascade, loras=[f"high={files['style']}:0.3", LoraSource(files["style"], -0.125)])
    for expert, scales in (("transformer", (0.3, -0.125)), ("transformer_2", (-0.125,))):
        for name, tensor in load_file(cascade / expert / tiny.WEIGHTS).items():
            if (layer := name.removesuffix(".weight")) in factors:
                tensor = loras.merged(tensor, *((scale, *factors[layer]) for scale in scales))
            loaded = ours[f"{expert}.{name}"].detach()
            assert same(loaded, tensor.to(loaded.dtype)), name


@pytest.mark.parametrize(
    "case", ["bf16 steps", *(pytest.param(x, marks=pytest.mark.slow) for x in ("scheme", "recipe", "keep"))]
)
def test_the_folded_float_folder_loads_the_same_way(
    case: str, cascade: Path, files: dict[str, Path], folded: Path
) -> None:
    """`quantize --scheme bf16 --lora`, then any way to load it, equals loading the source with the LoRA."""
    options: dict[str, dict[str, Any]] = {
        "scheme": {},
        "recipe": {"recipe": "recommended-fp4"},
        "bf16 steps": {"scheme": "mxfp4", "step_policy": "0:bf16,default:w4a8"},
        "keep": {"scheme": "int8", "keep": "blocks.0.*"},
    }
    ours = contents(cascade, **options[case], loras=texts(CASES["everything"], files))
    assert_same(ours, contents(folded, **options[case]))
    assert any(".floats." in name for name in ours) == (case == "bf16 steps")


@pytest.mark.parametrize("device", ["cpu", pytest.param("twin:a5", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("twin")
def test_the_video_is_that_of_the_folder(
    device: str, cascade: Path, files: dict[str, Path], folded: Path
) -> None:
    chosen = texts(CASES["everything"], files)
    ours = ascendit.load(cascade, scheme="mxfp8", loras=chosen, device=device).generate(PROMPT, **SMALL)
    theirs = ascendit.load(folded, scheme="mxfp8", device=device).generate(PROMPT, **SMALL)
    assert np.array_equal(ours.frames, theirs.frames)
    assert ours.loaded["loras"] == [
        f"{files['style']}:-0.75",
        f"transformer={files['details']}",
        f"{files['pair']}:1.25",
        f"transformer_2={files['style']}:0.3",
    ]


@pytest.mark.parametrize("kind", ["plain fp8", "GGUF"])
def test_files_whose_floats_are_decoded_first(
    kind: str, cascade: Path, factors: Factors, files: dict[str, Path], tmp_path: Path
) -> None:
    """`parts` with weights that are read as BF16: the values of the file and the LoRA, in float64."""
    stored = load_file(cascade / "transformer" / tiny.WEIGHTS)
    if kind == "GGUF":
        file = tmp_path / "wan_high_noise.gguf"
        values = gguf_files.write_model(file, stored, "Q8_0")
    else:
        file = tmp_path / "wan_high_noise.safetensors"
        fp8 = {n: x.to(torch.float8_e4m3fn) if n[:-7] in factors else x for n, x in stored.items()}
        values = {name: x.to(torch.bfloat16) for name, x in fp8.items()}
        save_file(fp8, file)
    ours = contents(cascade, parts=[f"transformer={file}"], loras=[f"high={files['style']}:0.3"])
    for name, tensor in values.items():
        if (layer := name.removesuffix(".weight")) in factors:
            tensor = loras.merged(tensor, (0.3, *factors[layer]))
        loaded = ours[f"transformer.{name}"].detach()
        assert same(loaded, tensor.to(loaded.dtype)), name


def test_a_skipped_group_of_keys(cascade: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """A file for Wan2.1 image-to-video, without the image: the same as the file without these keys."""
    image = {f"diffusion_model.blocks.{i}.cross_attn.k_img.diff": torch.ones(64, 64) for i in range(2)}
    save_file(load_file(files["style"]) | image, tmp_path / "i2v.safetensors")
    lora = f"{tmp_path / 'i2v.safetensors'}:0.5"
    assert 'lora_skip=["image"]' in refused("E-LRA-01", cascade, loras=lora).fix
    options: dict[str, Any] = {"loras": lora, "lora_skip": "image"}
    assert_same(contents(cascade, **options), contents(cascade, loras=f"{files['style']}:0.5"))
    prepared = prepare(LoadOptions(model=str(cascade), **options), PROMPT)
    assert f"--lora {lora} --lora-skip image " in prepared.replay
    assert prepared.loras[0]["applied"]["transformer_2"]["skipped"] == {"image": 2}
    assert prepared.model.options.record["lora_skip"] == ["image"]
    refused("E-USE-05", cascade, loras=f"{files['style']}", lora_skip="image")
    refused("E-USE-01", cascade, loras=f"{files['style']}", lora_skip="pictures")


# ---- refusals ------------------------------------------------------------------------------------


def refused(code: str, model: Path, **options: Any) -> AscenditError:
    with pytest.raises(AscenditError) as error:
        prepare(LoadOptions(model=str(model), **options), PROMPT)
    assert error.value.code == code, error.value
    return error.value


def test_stored_quantized_layers_are_refused(cascade: Path, files: dict[str, Path], tmp_path: Path) -> None:
    ascendit.quantize(cascade, tmp_path / "int8", scheme="int8")
    error = refused("E-QNT-03", tmp_path / "int8", loras=texts(["low={style}:0.5"], files))
    assert f"{tmp_path / 'int8' / 'transformer_2'}, which is stored quantized (int8)" in error.got
    assert f'scheme="int8" and loras=["transformer_2={files["style"]}:0.5"];' in error.fix
    error = refused("E-QNT-03", tmp_path / "int8", loras=texts(CASES["everything"], files))
    assert 'scheme="int8" and the same LoRA files;' in error.fix
    refused("E-QNT-01", tmp_path / "int8", scheme="bf16", loras=texts(["{style}"], files))


@pytest.mark.parametrize(
    ("code", "lora", "text"),
    [
        ("E-USE-02", "nowhere.safetensors", "no LoRA file at nowhere.safetensors"),
        ("E-USE-01", "{style}:nan", "has the weight nan"),
        ("E-USE-01", "{style}:strong", "a number after the last colon"),
        ("E-LRA-01", "{other}", "blocks.9"),
        ("E-CKP-02", "{damaged}", "truncated"),
    ],
)
def test_a_bad_file_is_refused_without_weights(
    code: str, lora: str, text: str, cascade: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    save_file({"transformer.blocks.9.attn1.to_q.diff": torch.ones(64, 64)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(files["style"].read_bytes()[:-9])
    made = {name: tmp_path / f"{name}.safetensors" for name in ("other", "damaged")}
    error = refused(code, cascade, loras=lora.format(**files, **made))
    assert text in str(error)


def test_a_file_for_a_missing_expert_and_a_skip_without_a_file(
    tiny_t2v_single: Path, files: dict[str, Path]
) -> None:
    assert "transformer_2" in refused("E-USE-01", tiny_t2v_single, loras=[f"low={files['style']}"]).got
    error = refused("E-USE-01", tiny_t2v_single, lora_skip="image")
    assert error.fix == 'add loras=["FILE"], or omit lora_skip'
    with command_line("generate"):
        assert "--lora-skip image without a LoRA" in str(error)
        error = refused("E-USE-01", tiny_t2v_single, keep=["blocks.0.*"])
        assert "--set keep=blocks.0.* without a scheme" in str(error)
    with pytest.raises(AscenditError, match="LoRA 7"):
        LoadOptions(model="demo", loras=[7])  # type: ignore[arg-type]


def test_a_file_that_changes_before_loading_is_noticed(
    cascade: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(files["style"].read_bytes())
    prepared = prepare_model(LoadOptions(model=str(cascade), loras=[file]))  # type: ignore[arg-type]
    save_file({name: 2 * x for name, x in load_file(file).items()}, file)
    expert, applied = prepared.experts[0]
    with pytest.raises(AscenditError, match="changed since its header was read"):
        load_expert(expert, applied, bind("cpu", "reference"))


def test_a_warning_about_a_file_for_one_noise_level(
    cascade: Path, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "Wan22_HighNoise.safetensors"
    file.write_bytes(files["details"].read_bytes())
    text = "Wan22_HighNoise.safetensors is added to both experts; for the high-noise one: --lora high=FILE"
    prepare_model(LoadOptions(model=str(cascade), loras=file))  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [text]
    report = ascendit.quantize(cascade, tmp_path / "out", scheme="bf16", loras=[file], dry_run=True)
    assert report.warnings == (text,)
    report = ascendit.quantize(cascade, tmp_path / "out", scheme="bf16", loras=[f"high={file}"], dry_run=True)
    assert report.warnings == ()
    file = file.rename(tmp_path / "style_high.safetensors")
    report = ascendit.quantize(cascade, tmp_path / "out", scheme="bf16", loras=[file], dry_run=True)
    assert report.warnings == (text.replace("Wan22_HighNoise", "style_high"),)


# ---- records -------------------------------------------------------------------------------------


def test_loras_are_texts_paths_or_sources() -> None:
    mixed: list[Any] = [
        Path("a.safetensors"),
        "high=b.safetensors:0.50",
        LoraSource(Path("c:1.5"), 2.0, "transformer"),
    ]
    options = LoadOptions(model="demo", loras=mixed)  # type: ignore[arg-type]
    assert options.loras == ("a.safetensors", "transformer=b.safetensors:0.5", "transformer=c:1.5:2")
    strange = LoadOptions(model="demo", loras=Path("high=a.safetensors"))  # type: ignore[arg-type]
    assert lora_sources(strange.loras) == (LoraSource(Path("high=a.safetensors")),)
    assert LoadOptions.from_json(options.to_json()) == options
    assert LoadOptions(model="demo", **options.record) == options
    assert LoadOptions(model="demo", loras="a.safetensors").loras == ("a.safetensors",)  # type: ignore[arg-type]


def test_few_step_files_of_wan22_with_their_preset(tmp_path: Path) -> None:
    """Lightning's two files under its own keys, on headers of the published sizes."""
    spec = SPECS["Wan2.2-T2V-A14B"]
    config = headers.CONFIG | {
        "num_attention_heads": spec.dim // 128,
        "attention_head_dim": 128,
        "num_layers": spec.num_layers,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
    }
    root = headers.write_pipeline(tmp_path / "wan", 2, config)
    lora: headers.Stored = {}
    for layer, wan in loras.block_layers(loras.LAYERS, spec.num_layers).items():
        n, k = headers.floats(config)[f"{layer}.weight"][1]
        key = f"diffusion_model.{wan}"
        lora |= {f"{key}.lora_down.weight": ("BF16", (64, k)), f"{key}.lora_up.weight": ("BF16", (n, 64))}
    for expert, name in zip(EXPERTS, ("high", "low"), strict=True):
        headers.write_expert(root / expert, headers.floats(config), config)
        headers.write_weights(tmp_path / f"{name}_noise_model.safetensors", lora)
    chosen = [f"{name}={tmp_path}/{name}_noise_model.safetensors" for name in ("high", "low")]
    options = LoadOptions(model=str(root), loras=chosen, scheme="mxfp8")  # type: ignore[arg-type]
    prepared = prepare(options, PROMPT, preset="lightning", seed=1)
    request = prepared.request
    assert (request.num_inference_steps, request.flow_shift, request.guidance_scale) == (4, 5.0, 1.0)
    for _, applied in prepared.model.experts:
        assert applied and applied.folds and len(applied.folds.names) == 10 * spec.num_layers
    assert f"--lora transformer={chosen[0].removeprefix('high=')}" in prepared.replay
