"""Calibration: its statistics match hooks on Diffusers' model, its factors msModelSlim's; smoothing helps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from convert.exports import SMOOTH
from convert.models import read, same
from diffusers import WanTransformer3DModel
from kill import contents
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ascendit
from ascendit.checkpoint.journal import Journal
from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.transformer import read_expert
from ascendit.convert.calibration import STATISTICS
from ascendit.convert.quantize import quantize
from ascendit.errors import AscenditError, CheckpointError, UsageError
from ascendit.mx.codec import Encoded, decode, encode
from ascendit.names import is_block_linear
from ascendit.pipeline import calibrate
from ascendit.pipeline.calibrate import Calibrator, Input
from ascendit.quant.fusion import first_in_group
from ascendit.quant.schemes import LINEAR_SCHEMES

SMALL: dict[str, Any] = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": 5,
    "guidance_scale": 4.0,
}
PROMPTS = ["a cat on a piano", "a dog on a boat"]
LAYER = "blocks.0.attn2.to_q"
EXPERTS = ("transformer", "transformer_2")


def calibrator(prompts: Any = PROMPTS, **options: Any) -> Calibrator:
    return Calibrator(prompts=prompts, fields=SMALL | options.pop("fields", {}), **options)


def statistics_of(folder: Path, to: Path, rows: int = 0, **options: Any) -> Any:
    journal = Journal(to / "journal.json", to, "")
    return calibrator(**options)(recognise(folder), (), rows, journal)


@pytest.fixture(scope="session")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade in which two inputs of each cross-attention are 64 times as large and weights as small."""
    folder = tiny.build_t2v_cascade(tmp_path_factory.mktemp("calibrate") / "model", dtype=torch.bfloat16)
    for name in EXPERTS:
        file = folder / name / tiny.WEIGHTS
        tensors = load_file(file)
        for i in range(2):
            for part in ("weight", "bias"):
                tensors[f"blocks.{i}.norm2.{part}"][[5, 40]] *= 64
            tensors[f"blocks.{i}.attn2.to_q.weight"][:, [5, 40]] /= 64
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def smoothed(bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bf16` quantized to MXFP4 with calibration."""
    to = tmp_path_factory.mktemp("smoothed") / "out"
    quantize(bf16, to, scheme="mxfp4", calibrate=calibrator())
    return to


# ---- statistics ---------------------------------------------------------------------------------


def test_statistics_are_those_of_hooks_on_diffusers_model(tiny_t2v_single: Path) -> None:
    pipe = ascendit.load(tiny_t2v_single)
    model = pipe.transformer
    x, text = torch.randn(1, 16, 3, 4, 6), torch.randn(1, 20, tiny.TEXT_DIM)
    inputs = calibrate.inputs_of(pipe, 8)
    with_recording = calibrate.with_recording(pipe, inputs, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = model(x, 700.0, model.prepare(model.grid_of(x), text, make=with_recording.make_state))
    inputs = {name.removeprefix("transformer."): recorded for name, recorded in inputs.items()}

    theirs = WanTransformer3DModel.from_pretrained(tiny_t2v_single / "transformer").eval()
    input_amax: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            input_amax[name] = args[0].abs().flatten(0, -2).amax(0)

        return hook

    linears = {
        n: m for n, m in theirs.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")
    }
    for name, module in linears.items():
        module.register_forward_hook(watch(name))
    with torch.inference_mode():
        expected = theirs(x, torch.tensor([700.0]), text, return_dict=False)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert len(input_amax) == 20 and len(inputs) == 2 * 7
    for name, amax in input_amax.items():
        stats = inputs[first_in_group(name)].statistics()
        torch.testing.assert_close(stats.input_amax, amax, rtol=1e-4, atol=1e-5)
        assert stats.rows.shape == (8, linears[name].in_features)
        assert bool((stats.rows.abs().amax(0) <= stats.input_amax).all())
    for first in inputs:
        group = [m.weight for n, m in linears.items() if first_in_group(n) == first]
        assert torch.equal(inputs[first].weight_amax, torch.cat(group).detach().abs().amax(0)), first


def test_all_prompts_steps_and_branches_are_recorded(bf16: Path, tmp_path: Path) -> None:
    """One prompt or one branch alone has other statistics than all together."""
    everything = statistics_of(bf16, tmp_path)
    assert set(everything) == set(EXPERTS) and all(len(inputs) == 14 for inputs in everything.values())
    partial = [
        statistics_of(bf16, tmp_path, prompts=PROMPTS[:1]),
        statistics_of(bf16, tmp_path, fields={"guidance_scale": 1.0}),
    ]
    for experts in partial:
        pairs = [
            (experts[expert][first].input_amax, stats.input_amax)
            for expert, inputs in everything.items()
            for first, stats in inputs.items()
        ]
        assert not all(torch.equal(a, b) for a, b in pairs)
    # The input of attn2.to_k is the text, which does not depend on the noise.
    one_prompt = partial[0]["transformer"]["blocks.0.attn2.to_k"].input_amax
    assert bool((one_prompt <= everything["transformer"]["blocks.0.attn2.to_k"].input_amax).all())


def test_rows_are_sampled_evenly_up_to_a_limit() -> None:
    drawn = torch.zeros(1000)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        sample = Input(torch.ones(1), 50)
        for part in torch.arange(1000.0)[:, None].split([7, 400, 93, 500]):
            sample.add(part, generator)
        assert sample.rows.shape == (50, 1) and sample.amax == 999
        drawn[sample.rows[:, 0].long()] += 1
    assert int(drawn.sum()) == 200 * 50
    means = [float(part.mean()) for part in drawn.split([7, 400, 93, 500])]
    assert all(9 < mean < 11 for mean in means[1:]) and 6 < means[0] < 14


def test_layers_on_image_tokens_are_a_group_of_their_own(tiny_i2v_21: Path, tmp_path: Path) -> None:
    Image.new("RGB", (60, 40), (200, 30, 60)).save(tmp_path / "first.png")
    (tmp_path / "prompts.txt").write_text("first.png\ta cat\n\n", encoding="utf-8")
    quantize(tiny_i2v_21, tmp_path / "out", scheme="int8", calibrate=calibrator(tmp_path / "prompts.txt"))
    tensors = read(tmp_path / "out" / "transformer")
    k, v = (tensors[f"blocks.0.attn2.add_{x}_proj.mul_scale"] for x in "kv")
    assert same(k, v) and not same(k, tensors["blocks.0.attn2.to_k.mul_scale"])


def test_a_line_may_have_a_last_image(
    tiny_flf2v: Path, tiny_i2v_cascade: Path, tiny_i2v_21: Path, tmp_path: Path
) -> None:
    for name, size in (("a.png", (60, 60)), ("z.png", (40, 30))):
        Image.new("RGB", size).save(tmp_path / name)
    prompts = tmp_path / "prompts.txt"

    def requests(folder: Path, line: str) -> Any:
        prompts.write_text(line, encoding="utf-8")
        return Calibrator(prompts=prompts).requests(recognise(folder))[0]

    for folder in (tiny_flf2v, tiny_i2v_cascade):
        request = requests(folder, "a.png\tz.png\ta cat\n")
        assert (request.image, request.last_image) == (str(tmp_path / "a.png"), str(tmp_path / "z.png"))
        assert request.prompt == "a cat" and request.width == request.height == 624
    assert requests(tiny_i2v_cascade, "a.png\ta cat\n").last_image is None
    assert requests(tiny_i2v_21, "a.png\ta\tcat\n").prompt == "a\tcat"
    with pytest.raises(UsageError, match="no last image") as error:
        requests(tiny_flf2v, "a.png\ta cat\n")
    assert error.value.code == "E-REQ-04"
    with pytest.raises(UsageError, match="no file .*no.png") as error:
        requests(tiny_flf2v, "a.png\tno.png\ta cat\n")
    assert error.value.code == "E-USE-02" and "last frame" in error.value.needs


def test_groups_match_a_real_export() -> None:
    """Two layers have the same `mul_scale` in the export exactly if they are in one group here."""
    expert = read_expert(recognise(SMOOTH).experts[0])
    with_scale = {
        n: layer.tensors["mul_scale"] for n, layer in expert.layers.items() if "mul_scale" in layer.tensors
    }
    data = {n: info.file.read_bytes()[info.start : info.end] for n, info in with_scale.items()}
    assert len(data) == 60
    for a in data:
        for b in data:
            assert (data[a] == data[b]) == (first_in_group(a) == first_in_group(b)), (a, b)


# ---- the formula --------------------------------------------------------------------------------


def factors(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """msModelSlim's `compute_smooth_scale` under the NPU's autocast, which makes `pow` float32."""
    a_scale, w_scale = x.to(torch.bfloat16), w.to(torch.bfloat16)
    w_scale = w_scale.to(torch.float32).clamp(min=1e-5).to(torch.bfloat16)
    scales = a_scale.float().pow(alpha) / w_scale.float().pow(1 - alpha)
    return scales.clamp(min=1e-5).to(torch.bfloat16)


@pytest.mark.parametrize("alpha", [0.9, 0.5])
def test_mul_scale_and_weight_equal_msmodelslims(bf16: Path, tmp_path: Path, alpha: float) -> None:
    quantize(bf16, tmp_path / "out", scheme="mxfp4_dualscale", calibrate=calibrator(alpha=alpha))
    stats = statistics_of(bf16, tmp_path)
    for expert in EXPERTS:
        source, written = read(bf16 / expert), read(tmp_path / "out" / expert)
        layers = [n.removesuffix(".mul_scale") for n in written if n.endswith(".mul_scale")]
        assert len(layers) == 20 and all(map(is_block_linear, layers))
        for layer in layers:
            group = [n for n in layers if first_in_group(n) == first_in_group(layer)]
            top = torch.stack([source[f"{n}.weight"].abs().amax(0) for n in group]).amax(0)
            s = factors(stats[expert][first_in_group(layer)].input_amax, top, alpha)
            assert same(written[f"{layer}.mul_scale"], 1 / s.float())
            qdata = encode(source[f"{layer}.weight"] * s, "mxfp4_dualscale")  # one rounding, in bfloat16
            assert same(written[f"{layer}.weight"], qdata.qdata) and qdata.dual_scale is not None
            assert same(written[f"{layer}.weight_dual_scale"], qdata.dual_scale)


def test_excluded_layers_are_unchanged(bf16: Path, tmp_path: Path) -> None:
    quantize(
        bf16, tmp_path / "out", scheme="mxfp4", keep=["*.attn1.to_q", "*.1.ffn.*"], calibrate=calibrator()
    )
    source, written = read(bf16 / "transformer"), read(tmp_path / "out" / "transformer")
    for layer in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"):
        assert same(source[f"{layer}.weight"], written[f"{layer}.weight"])
        assert f"{layer}.mul_scale" not in written
    assert same(written["blocks.0.attn1.to_k.mul_scale"], written["blocks.0.attn1.to_v.mul_scale"])


# ---- the benefit --------------------------------------------------------------------------------


def snr(expected: Tensor, actual: Tensor) -> float:
    return float(10 * (expected.square().sum() / (expected - actual).square().sum()).log10())


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp4_dualscale"])
def test_smoothing_reduces_the_error_of_outliers(bf16: Path, tmp_path: Path, scheme: str) -> None:
    report = quantize(bf16, tmp_path / "out", scheme=scheme, calibrate=calibrator(), report=True)
    rows = statistics_of(bf16, tmp_path, rows=256)["transformer"][LAYER].rows
    source, written = read(bf16 / "transformer"), read(tmp_path / "out" / "transformer")
    outputs = report.experts[0].outputs
    assert len(outputs.layers) == 20
    quality = outputs.layers[LAYER]
    assert quality.smoothed > quality.plain + 4
    assert outputs.kinds["attn2.to_q"].smoothed > outputs.kinds["attn2.to_q"].plain + 4

    rule = LINEAR_SCHEMES[scheme].rule
    x, weight = rows.float(), source[f"{LAYER}.weight"]
    plain = decode(encode(rows, scheme, scale_rule=rule)) @ decode(encode(weight, scheme)).t()
    qdata, scale = (written[f"{LAYER}.{role}"] for role in ("weight", "weight_scale"))
    dual = written.get(f"{LAYER}.weight_dual_scale")
    stored = decode(Encoded(qdata, scale, dual, scheme, -1, tuple(weight.shape)))
    smooth = (x * written[f"{LAYER}.mul_scale"]).to(torch.bfloat16)
    after = decode(encode(smooth, scheme, scale_rule=rule)) @ stored.t()
    expected = x @ weight.float().t()
    assert quality.plain == pytest.approx(snr(expected, plain), abs=0.01)
    assert quality.smoothed == pytest.approx(snr(expected, after), abs=0.01)


def test_the_table_has_both_columns(bf16: Path, tmp_path: Path) -> None:
    report = quantize(bf16, tmp_path / "out", scheme="mxfp4", calibrate=calibrator(), report=True)
    lines = report.lines()
    assert any(
        line.startswith("Smoothing") and "alpha 0.9, from 2 prompts of 5 steps" in line for line in lines
    )
    start = next(i for i, line in enumerate(lines) if "outputs of 20 layers" in line)
    assert lines[start + 1].split() == ["without", "smoothed", "gain"]
    row = next(line.split() for line in lines[start:] if "mean of attn2.to_q" in line)
    assert float(row[-1]) == pytest.approx(float(row[-2]) - float(row[-3]), abs=0.011) and float(row[-1]) > 4
    data = report.as_dict()
    assert data["calibration"]["prompts"] == 2 and data["calibration"]["alpha"] == 0.9
    measured = data["experts"][1]["output_sqnr_db"]
    assert len(measured) == 20 and set(measured[LAYER]) == {"plain", "smoothed"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| layers | without smoothing | smoothed |" in card and "| mean of attn2.to_q |" in card


def test_schemes_of_weights_quantize_activations_in_the_same_format() -> None:
    for name, scheme in LINEAR_SCHEMES.items():
        if name == scheme.weight:
            assert scheme.activation == name
            assert LINEAR_SCHEMES[name] is scheme


# ---- the folder ---------------------------------------------------------------------------------


def test_the_folder_is_complete_and_records_the_calibration(bf16: Path, smoothed: Path) -> None:
    expert = read_expert(recognise(smoothed).experts[1])
    assert all("mul_scale" in layer.tensors for layer in expert.layers.values()) and len(expert.layers) == 20
    assert json.loads((smoothed / "transformer" / "config.json").read_text())["quantization_config"][
        "require_smooth_scale"
    ]
    record = json.loads((smoothed / "ascendit.json").read_text())
    sha256 = record["calibration"].pop("prompts_sha256")
    assert record["calibration"] == {
        "alpha": 0.9,
        "prompts": 2,
        "steps": 5,
        "size": "48x32",
        "frames": 9,
        "guidance": [4.0, 4.0],
        "device": "cpu",
        "settings": SMALL,
    }
    assert sha256 == hashlib.sha256(json.dumps([[p, None] for p in PROMPTS]).encode()).hexdigest()
    assert "--calibrate - --alpha 0.9" in record["command"]
    assert not list(smoothed.rglob(f"{STATISTICS}*")) and not (smoothed.parent / ".out.partial").exists()
    assert {p.name for p in smoothed.iterdir()} == {p.name for p in bf16.iterdir()} | {
        "ascendit.json",
        "README.md",
    }


def test_msmodelslim_names_for_mindie(smoothed: Path, tmp_path: Path) -> None:
    ascendit.repack(smoothed, tmp_path / "mindie", engine="mindie")
    (file,) = (tmp_path / "mindie" / "high_noise_model").glob("*.safetensors")
    wrapped, canonical = load_file(file), read(smoothed / "transformer")
    mul_scale = wrapped["blocks.1.cross_attn.q.div.mul_scale"]
    assert same(mul_scale, canonical["blocks.1.attn2.to_q.mul_scale"])
    assert mul_scale.dtype == torch.float32


def test_a_dry_run_runs_nothing(bf16: Path, smoothed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(calibrate, "load", None)
    report = quantize(bf16, tmp_path / "out", scheme="mxfp4", calibrate=calibrator(), dry_run=True)
    total = sum(t.nbytes for name in EXPERTS for t in read(smoothed / name).values())
    assert report.bytes_after == total and report.calibration["steps"] == 5
    assert not list(tmp_path.iterdir())


def test_a_lora_is_folded_in_before_the_run(bf16: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
    layer = "blocks.0.attn1.to_v"
    save_file(
        {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up},
        tmp_path / "lora.safetensors",
    )
    baked = tiny.copy(bf16, tmp_path / "baked")
    for name in EXPERTS:
        tensors = load_file(baked / name / tiny.WEIGHTS)
        weight = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = (weight.double() + 0.5 * (up.double() @ down.double())).to(weight.dtype)
        save_file(tensors, baked / name / tiny.WEIGHTS, metadata={"format": "pt"})
    options: dict[str, Any] = {"scheme": "mxfp4", "calibrate": calibrator(PROMPTS[:1])}
    quantize(bf16, tmp_path / "lora", **options, loras=[f"{tmp_path / 'lora.safetensors'}:0.5"])
    quantize(baked, tmp_path / "expected", **options)
    quantize(bf16, tmp_path / "without", **options)
    for name in EXPERTS:
        ours, expected, without = (read(tmp_path / x / name) for x in ("lora", "expected", "without"))
        assert all(same(ours[n], tensor) for n, tensor in expected.items())
        later = "blocks.1.attn1.to_q.mul_scale"  # not a layer of the LoRA, but its input changes
        assert not same(ours[later], without[later])


# ---- interrupted and resumed --------------------------------------------------------------------


class Stopper:
    """Interrupts a calibration at step `last`, and counts its steps."""

    def __init__(self, last: int) -> None:
        self.last, self.steps = last, 0

    def __call__(self, event: Any) -> None:
        if event.stage == "denoise":
            self.steps += 1
            if event.step == self.last:
                raise KeyboardInterrupt


def test_a_calibration_resumes_at_the_interrupted_prompt(bf16: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme": "mxfp4", "report": True}
    quantize(bf16, tmp_path / "whole" / "out", **options, calibrate=calibrator())
    with pytest.raises(KeyboardInterrupt):
        quantize(bf16, tmp_path / "out", **options, calibrate=calibrator(on_progress=Stopper(8)))
    partial = tmp_path / ".out.partial" / "out"
    assert [p.name for p in partial.iterdir()] == [STATISTICS]
    stopper = Stopper(0)
    quantize(bf16, tmp_path / "out", **options, calibrate=calibrator(on_progress=stopper), resume=True)
    assert stopper.steps == 5  # of 10
    assert contents(tmp_path / "out") == contents(tmp_path / "whole" / "out")


def test_a_finished_calibration_is_not_repeated(
    bf16: Path, smoothed: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def stop(event: Any) -> None:
        if event.stage == "transformer_2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(bf16, tmp_path / "out", scheme="mxfp4", calibrate=calibrator(), on_progress=stop)
    with pytest.raises(UsageError, match="E-USE-01") as error:
        quantize(bf16, tmp_path / "out", scheme="mxfp4", calibrate=calibrator(alpha=0.8), resume=True)
    assert "is from a run with another source" in error.value.got
    monkeypatch.setattr(calibrate, "load", None)
    quantize(bf16, tmp_path / "out", scheme="mxfp4", calibrate=calibrator(), resume=True)
    assert contents(tmp_path / "out") == contents(smoothed)


# ---- errors -------------------------------------------------------------------------------------


def refused(code: str, folder: Path, to: Path, **options: Any) -> str:
    with pytest.raises(AscenditError) as error:
        quantize(folder, to / "out", **({"scheme": "mxfp4"} | options))
    assert error.value.code == code, error.value
    assert not (to / "out").exists() and not (to / ".out.partial").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "code", "text"),
    [
        ("", "E-USE-01", "no prompts in"),
        (" \n\n\t\n", "E-USE-01", "no prompts in"),
        (b"\xff\xfe\x00", "E-USE-01", "not UTF-8"),
        (None, "E-USE-02", "no file"),
        ("none.png\ta cat", "E-USE-02", "none.png"),
        ("first.png\ta cat", "E-REQ-04", "takes no image"),
    ],
)
def test_invalid_prompts(
    bf16: Path, tmp_path: Path, content: str | bytes | None, code: str, text: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "first.png")
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert text in refused(code, bf16, tmp_path, calibrate=calibrator(file))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"alpha": 1.5}, "alpha 1.5"),
        ({"alpha": -0.1}, "alpha -0.1"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": 4}, "prompts of the demo model for"),
        ({"prompts": "demo"}, "prompts of the demo model for"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_invalid_options(bf16: Path, tmp_path: Path, options: dict[str, Any], text: str) -> None:
    assert text in refused("E-USE-01", bf16, tmp_path, calibrate=calibrator(**options))


def test_models_that_cannot_be_calibrated(
    bf16: Path, smoothed: Path, tiny_i2v_cascade: Path, tmp_path: Path
) -> None:
    text = refused("E-CKP-01", bf16 / "transformer", tmp_path, calibrate=calibrator())
    assert "a standalone Diffusers transformer" in text
    assert "already quantized" in refused("E-QNT-01", smoothed, tmp_path, calibrate=calibrator())
    text = refused("E-REQ-04", tiny_i2v_cascade, tmp_path, calibrate=calibrator())
    assert "prompt 1 has no image" in text and "<tab>" in text
    both: dict[str, Any] = {"smoothing": {"transformer": {LAYER: torch.ones(64)}}, "calibrate": calibrator()}
    assert "both smoothing and calibrate" in refused("E-USE-01", bf16, tmp_path, **both)


def test_an_expert_that_never_ran(bf16: Path, tmp_path: Path) -> None:
    late = calibrator(fields={"boundary_ratio": 0.0001})
    assert "transformer_2: blocks.0.attn1.to_q was not used in the calibration" in refused(
        "E-QNT-01", bf16, tmp_path, calibrate=late
    )


def test_a_model_that_computes_nan(bf16: Path, tmp_path: Path) -> None:
    broken = tiny.damage(tiny.copy(bf16, tmp_path / "broken"), "nan_weights")
    with pytest.raises((CheckpointError, AscenditError), match="E-OUT-01"):
        quantize(broken, tmp_path / "out", scheme="mxfp4", calibrate=calibrator())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "key"),
    [("vae/config.json", "scale_factor_temporal"), ("scheduler/scheduler_config.json", "flow_shift")],
)
def test_a_damaged_config_is_refused_before_the_prompts(
    file: str, key: str, tiny_t2v_single: Path, tmp_path: Path
) -> None:
    folder = tiny.copy(tiny_t2v_single, tmp_path / "m")
    for value in ("x", [1]):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        with pytest.raises(CheckpointError, match=key) as e:
            Calibrator(prompts=["a"]).record(recognise(folder))
        assert e.value.code == "E-CKP-06"
