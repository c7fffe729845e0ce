"""Kernels that a denoiser's forward launches on an NPU, counted on the twin: aten's and the NPU's own.

Views are free. Diffusers' model of two layers launches 219 on the same stack. A quantized model has 6
quantizations and 6 matmuls per block from the second step on. The first step has one matmul more per block,
and quantizes the text once per `mul_scale`. `tools/npu_conformance.py` counts them on the real dispatcher.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.layers import NATIVE
from ops.recorder import SYNCHRONIZES, Recorder
from safetensors.torch import load_file, save_file
from stored import load_transformer

import ascendit
import ascendit.twin
from ascendit.checkpoint.layout import recognise
from ascendit.model.linear import FusedGroup, QuantLinear
from ascendit.model.quantize_on_load import Online
from ascendit.model.wan import WanTransformer
from ascendit.ops import operators
from ascendit.ops.npu import kernels
from ascendit.ops.operators import bind
from ascendit.schedule import StepSchedule

pytestmark = pytest.mark.usefixtures("twin")
TOKENS, ROW = 18, 6
WITH_MINDIESD, WITHOUT, OUTSIDE = 26, 28, 20
"""Kernels of one block in BF16; and of patches, timestep embedding, modulation and the last norm."""
NPU_OPS = {"npu_rms_norm": 3, "npu_rotary_mul": 2, "npu_fusion_attention": 2, "npu_gelu": 1}
"""Operators of torch_npu in one block; MindIE-SD adds two AdaLN."""


def tiny(folder: Path, chip: str, dtype: torch.dtype = torch.bfloat16) -> WanTransformer:
    return load_transformer(recognise(folder).parts["transformer"], bind(f"twin:{chip}"), dtype=dtype)


def forward(
    model: WanTransformer, timesteps: tuple[float, ...] = (500.0,), spans: tuple[int, ...] | None = None
) -> Recorder:
    """One forward of a step whose modulation is new."""
    x, text = torch.randn(1, model.config.in_channels, 3, 6, 4), torch.randn(1, 32, model.config.text_dim)
    with torch.no_grad():
        state = model.prepare(model.grid_of(x), text, timesteps=timesteps)
        ascendit.twin.reset()
        with Recorder() as recorder:
            model(x, timesteps, state, spans)
    return recorder


def block(model: WanTransformer) -> Recorder:
    x, text = torch.randn(1, model.config.in_channels, 3, 6, 4), torch.randn(1, 32, model.config.text_dim)
    hidden = torch.randn(1, TOKENS, model.config.dim).to(torch.bfloat16)
    with torch.no_grad():
        state = model.prepare(model.grid_of(x), text)
        mod = model.modulation((500.0,), (TOKENS,))
        with Recorder() as recorder:
            model.blocks[0](0, hidden, mod, state)
    return recorder


@pytest.mark.parametrize("chip", ["a2", "a3", "a5"])
def test_a_forward_of_two_layers(chip: str, tiny_t2v_single: Path) -> None:
    recorder = forward(tiny(tiny_t2v_single, chip))
    assert recorder.launched.total() == 2 * WITH_MINDIESD + OUTSIDE <= 100, recorder.launched
    adaln = "mindiesd::adaln_v2" if chip == "a5" else "mindiesd::adaln"
    expected = {name: 2 * n for name, n in NPU_OPS.items()} | {adaln: 5}
    assert ascendit.twin.launches() == expected
    assert {n: c for n, c in recorder.launched.items() if "npu_" in n or "::" in n} == expected


@pytest.mark.parametrize("chip", ["a2", "a5"])
def test_a_block(chip: str, tiny_t2v_single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = block(tiny(tiny_t2v_single, chip))
    assert recorder.launched.total() == WITH_MINDIESD, recorder.launched
    real = kernels.missing
    monkeypatch.setattr(kernels, "missing", lambda c, chip: "none" if "mindiesd" in c else real(c, chip))
    assert block(tiny(tiny_t2v_single, chip)).launched.total() == WITHOUT


def test_two_timesteps_cost_less_than_a_second_forward(tiny_ti2v: Path) -> None:
    model = tiny(tiny_ti2v, "a5")
    single, double = forward(model), forward(model, (0.0, 500.0), (ROW, TOKENS - ROW))
    assert single.launched.total() < double.launched.total() <= single.launched.total() + 9 * 2 + 4


@pytest.mark.parametrize("name", ["t2v_single", "ti2v", "i2v_cascade"])
def test_a_forward_neither_synchronizes_nor_copies_from_the_host(
    name: str, tiny_folder: Callable[[str], Path]
) -> None:
    """No value is read back, no table is computed, and no float64 or complex tensor is created."""
    kwargs: dict[str, Any] = (
        {"timesteps": (0.0, 500.0), "spans": (ROW, TOKENS - ROW)} if name == "ti2v" else {}
    )
    recorder = forward(tiny(tiny_folder(name), "a5"), **kwargs)
    assert not SYNCHRONIZES & set(recorder.launched)
    assert not {"arange", "cos", "sin", "lift_fresh", "full"} & {called for called, _ in recorder.calls}
    assert recorder.dtypes == {torch.bfloat16, torch.float32}


# ---- quantized ----------------------------------------------------------------------------------

LAYERS = 2
QUANTIZERS = {
    "int8": "npu_dynamic_quant",
    "fp8": "npu_dynamic_quant",
    "mxfp8": "npu_dynamic_mx_quant",
    "mxfp4": "npu_dynamic_mx_quant",
    "mxfp4_dualscale": "npu_dynamic_dual_level_mx_quant",
}
ON_CHIPS = [(chip, scheme) for chip, schemes in NATIVE.items() for scheme in QUANTIZERS if scheme in schemes]
QUANTIZED = WITH_MINDIESD - 8 + 12
"""Kernels of one quantized block: six quantizations and six matmuls replace its eight linear layers."""


def matmul(scheme: str) -> str:
    return "npu_dual_level_quant_matmul" if scheme == "mxfp4_dualscale" else "npu_quant_matmul"


def quantized_model(folder: Path, chip: str, online: Online | None = None, **kw: Any) -> WanTransformer:
    """The tiny model in BF16, quantized while it loads, or with the schemes of the folder."""
    part, ops = recognise(folder).parts["transformer"], bind(f"twin:{chip}", **kw)
    return load_transformer(part, ops, dtype=torch.bfloat16, online=online)


def two_steps(model: WanTransformer, policy: str = "") -> list[Counter[str]]:
    """Launches of the first step, with its text, and of the second."""
    x, text = torch.randn(1, model.config.in_channels, 3, 6, 4), torch.randn(1, 32, model.config.text_dim)
    with torch.no_grad():
        shared = model.share(model.grid_of(x), (500.0, 400.0))
        with Recorder() as first:
            schedule = StepSchedule.parse(policy) if policy else StepSchedule()
            state = model.prepare(shared, text, steps=schedule.resolve(2))
            model(x, 500.0, state)
        state.step = 1
        with Recorder() as second:
            model(x, 400.0, state)
    assert not SYNCHRONIZES & (set(first.launched) | set(second.launched))
    return [first.launched, second.launched]


def quantized_launches(launched: Counter[str]) -> tuple[int, int]:
    """Numbers of quantizations and of quantized matmuls."""
    quantizations = sum(n for name, n in launched.items() if name.startswith("npu_dynamic"))
    return quantizations, sum(n for name, n in launched.items() if name.endswith("quant_matmul"))


@pytest.mark.parametrize(("chip", "scheme"), ON_CHIPS)
def test_every_scheme(chip: str, scheme: str, tiny_t2v_single: Path) -> None:
    model = quantized_model(tiny_t2v_single, chip, Online.from_options(scheme, None))
    first, second = two_steps(model)
    assert first[QUANTIZERS[scheme]] == 6 * LAYERS + 1 and first[matmul(scheme)] == 7 * LAYERS
    assert second[QUANTIZERS[scheme]] == second[matmul(scheme)] == 6 * LAYERS
    assert quantized_launches(first) == (13, 14) and quantized_launches(second) == (12, 12)
    assert second.total() == LAYERS * QUANTIZED + OUTSIDE
    assert "npu_format_cast" not in first  # weights were cast for the matmul while loading


def test_steps_in_w4a8_cost_the_same(tiny_t2v_single: Path) -> None:
    model = quantized_model(tiny_t2v_single, "a5", Online.from_options("mxfp4", None))
    stored = two_steps(model)
    assert two_steps(model, "default:w4a8") == stored


def test_text_keys_are_recomputed_if_the_precision_changes_them(tiny_t2v_single: Path) -> None:
    model = quantized_model(tiny_t2v_single, "a5", Online.from_options("mxfp4", None))
    first, second = two_steps(model, "0:w4a8,default:w4a4")
    assert quantized_launches(first) == quantized_launches(second) == (6 * LAYERS + 1, 7 * LAYERS)
    assert (
        second.total() == LAYERS * QUANTIZED + OUTSIDE + 1 + 3 * LAYERS
    )  # the text; K and V, norm, a copy of V
    int8 = quantized_model(tiny_t2v_single, "a5", Online.from_options("int8", None))
    assert two_steps(int8, "0:w4a8") == two_steps(int8)  # W4A8 is for MXFP4 weights: nothing is recomputed


def test_a_mixed_recipe(tiny_t2v_single: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.toml"
    rules = {"*": "mxfp4", "*.attn*": "mxfp8", "blocks.1.attn2.*": "mxfp4_dualscale", "*.1.ffn.*": "int8"}
    recipe.write_text("".join(f'[[rules]]\nlayers = "{n}"\nscheme = "{s}"\n\n' for n, s in rules.items()))
    first, second = two_steps(quantized_model(tiny_t2v_single, "a5", Online.from_options(None, str(recipe))))
    assert quantized_launches(second) == (6 * LAYERS, 6 * LAYERS)
    assert quantized_launches(first) == (6 * LAYERS + 2, 7 * LAYERS)  # the text in mxfp8 and in dual scale
    assert second["npu_dynamic_quant"] == 2 and second["npu_dual_level_quant_matmul"] == 2


def test_a_group_of_two_schemes_is_two_matmuls(tiny_t2v_single: Path) -> None:
    online = Online.from_options("mxfp8", None, ["blocks.0.attn1.to_v"])
    _, second = two_steps(quantized_model(tiny_t2v_single, "a5", online))
    assert quantized_launches(second) == (6 * LAYERS, 6 * LAYERS)  # Q and K in one, V in BF16 beside it
    assert second.total() == LAYERS * QUANTIZED + OUTSIDE + 1


@pytest.fixture
def smoothed(tiny_t2v_single: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder whose layers have `mul_scale`; if `alike`, all layers that read the text have the same one."""

    def write(scheme: str, *, alike: bool) -> Path:
        folder = tmp_path / f"{scheme}-{alike}"
        ascendit.quantize(tiny_t2v_single, folder, scheme=scheme)
        (file,) = (folder / "transformer").glob("*.safetensors")
        tensors, manifest = load_file(file), folder / "transformer/quant_model_description.json"
        entries = json.loads(manifest.read_text())
        for name in [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]:
            owner, _, leaf = name.rpartition(".")
            reads = f"{owner} text" if "attn2" in owner and leaf in ("to_k", "to_v") else owner
            key = (
                "text" if alike and reads.endswith("text") else f"{reads} {leaf if 'to_' not in leaf else ''}"
            )
            seed = torch.Generator().manual_seed(sum(key.encode()) + 1000 * len(key))
            width = 80 if name.endswith("ffn.net.2") else 64
            tensors[f"{name}.mul_scale"] = torch.rand(width, generator=seed) + 0.5
            entries[f"{name}.mul_scale"] = "FLOAT"
        save_file(tensors, file, {"format": "pt"})
        manifest.write_text(json.dumps(entries))
        return folder

    return write


@pytest.mark.parametrize(("scheme", "chip"), [("int8", "a2"), ("mxfp8", "a5"), ("mxfp4_dualscale", "a5")])
def test_a_smoothed_checkpoint(scheme: str, chip: str, smoothed: Callable[..., Path]) -> None:
    """The product with `mul_scale` is one kernel; the text is quantized once per `mul_scale`."""
    alike, apart = (two_steps(quantized_model(smoothed(scheme, alike=a), chip)) for a in (True, False))
    assert quantized_launches(alike[0]) == (6 * LAYERS + 1, 7 * LAYERS)
    assert quantized_launches(apart[0]) == (6 * LAYERS + LAYERS, 7 * LAYERS)
    for _, second in (alike, apart):
        assert quantized_launches(second) == (6 * LAYERS, 6 * LAYERS)
        assert second.total() == LAYERS * (QUANTIZED + 6) + OUTSIDE


# ---- FRACTAL_NZ ---------------------------------------------------------------------------------


def groups(model: WanTransformer) -> list[FusedGroup]:
    """Every prepared weight, once."""
    return list({id(m.group): m.group for m in model.modules() if isinstance(m, QuantLinear)}.values())


def formats(model: WanTransformer) -> set[int]:
    weights: Any = [group.weight for group in groups(model)]
    return {int(torch.ops.npu.get_npu_format(weight.qdata)) for weight in weights}


def velocity(model: WanTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(s, generator=generator) for s in ((1, 16, 3, 6, 4), (1, 32, 32)))
    with torch.no_grad():
        return model(x, 500.0, model.prepare(model.grid_of(x), text))


@pytest.mark.parametrize(("chip", "scheme"), [("a2", "int8"), ("a5", "mxfp8"), ("a5", "mxfp4")])
def test_fractal_nz_on_request(chip: str, scheme: str, tiny_t2v_single: Path) -> None:
    online = Online.from_options(scheme, None)
    nd = quantized_model(tiny_t2v_single, chip, online)
    blocked = quantized_model(tiny_t2v_single, chip, online, nz=True)
    assert formats(nd) == {2} and formats(blocked) == {29}
    assert torch.equal(velocity(nd), velocity(blocked))


def test_nz_weights_save_and_load_the_stored_state_dict(tiny_t2v_single: Path) -> None:
    """They replace the parameters of their group, so that no weight is in memory twice."""
    online = Online.from_options("mxfp4_dualscale", None)
    model = quantized_model(tiny_t2v_single, "a5", online)
    on_cpu = load_transformer(
        recognise(tiny_t2v_single).parts["transformer"], bind("cpu"), dtype=torch.bfloat16, online=online
    )
    before, state, expected = velocity(model), model.state_dict(), on_cpu.state_dict()
    assert formats(model) == {29} and state.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in state.items())
    extra = sum(m.extra_nbytes for m in model.modules() if isinstance(m, QuantLinear))
    layers: list[Any] = [m for m in on_cpu.modules() if isinstance(m, QuantLinear)]
    qdata = sum(m._parameters["weight"].nbytes for m in layers)
    assert qdata <= extra < 1.5 * qdata
    assert "blocks.0.attn1.to_q.weight" not in dict(model.named_parameters())
    model.load_state_dict(expected)
    assert formats(model) == {29} and torch.equal(velocity(model), before)


@pytest.mark.parametrize(("scheme", "nz"), [("mxfp4_dualscale", False), ("mxfp8", True), ("mxfp4", False)])
def test_the_layout_is_restored_after_a_move_to_the_host_and_back(
    scheme: str, nz: bool, tiny_t2v_single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "mxfp4=max:7" if scheme == "mxfp4" else None
    model = quantized_model(
        tiny_t2v_single, "a5", Online.from_options(scheme, None), nz=nz, activation_rule=rule
    )
    before, layout = velocity(model), formats(model)
    assert layout == ({29} if nz or "dual" in scheme else {2})
    original = operators._device
    monkeypatch.setattr(operators, "_device", lambda d: original("twin:a5" if d == "npu:0" else d))
    for group in groups(model):
        group.fuse(operators.schemes_on("cpu", group.schemes))
        assert group.schemes.device.kind == "cpu" and group.schemes.rules == (
            {"mxfp4": "max:7"} if rule else {}
        )
        assert not group.packed and len(list(group.layers[0].parameters())) > 2
        group.fuse(operators.schemes_on("npu:0", group.schemes))
    assert formats(model) == layout and torch.equal(velocity(model), before)
