"""Real exports of msModelSlim, original and repacked: every layer computes with its stored tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convert import exports
from safetensors import safe_open
from stored import load_transformer

from ascendit.checkpoint.layout import recognise
from ascendit.checkpoint.reader import RowReader
from ascendit.checkpoint.tensor_info import TensorInfo
from ascendit.checkpoint.transformer import Expert, read_expert
from ascendit.convert.repack import repack
from ascendit.errors import CheckpointError
from ascendit.model.linear import QuantLinear, SmoothLinear
from ascendit.model.loader import load_expert
from ascendit.model.wan import Attention
from ascendit.mx.codec import Encoded, decode, encode
from ascendit.ops.operators import bind
from ascendit.quant.schemes import LINEAR_SCHEMES
from ascendit.schedule import StepSchedule

FORMATS = {
    "W8A8_MXFP8": "mxfp8",
    "W4A4_MXFP4": "mxfp4",
    "W4A4_MXFP4_DUALSCALE": "mxfp4_dualscale",
    "W8A8_DYNAMIC": "int8",
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a canonical transformer folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}
    return tensors


def experts_of(folder: Path) -> list[Expert]:
    """Experts of a folder, with two heads if its files do not give the number, as in the smaller exports."""
    experts = [read_expert(part) for part in recognise(folder).experts]
    heads = {"num_attention_heads": 2, "attention_head_dim": 32}
    unknown = [e.config["num_attention_heads"] is None for e in experts]
    return [replace(e, config=e.config | heads) if u else e for e, u in zip(experts, unknown, strict=True)]


def load(expert: Expert, **kw: Any) -> Any:
    return load_expert(expert, None, bind("cpu"), **kw)


def test_each_mul_scale_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    for method in ("read_blocks", "read_into"):
        real = getattr(RowReader, method)

        def read(self: RowReader, info: TensorInfo, *args: Any, real: Any = real, **kw: Any) -> Any:
            reads.append(info.name)
            return real(self, info, *args, **kw)

        monkeypatch.setattr(RowReader, method, read)
    expert = experts_of(exports.SMOOTH)[0]
    load(expert)
    factors = [layer.tensors["mul_scale"].name for layer in expert.layers.values()]
    assert sorted(name for name in reads if name in factors) == sorted(factors) and factors


def exact(tensors: dict[str, torch.Tensor], name: str, scheme: str, x: torch.Tensor) -> torch.Tensor:
    """decode -> matmul in float64, from the stored tensors alone."""
    n = tensors[f"{name}.weight"].shape[0]
    if (mul := tensors.get(f"{name}.mul_scale")) is not None:
        x = (x.float() * mul).to(x.dtype)
    a = encode(x, LINEAR_SCHEMES[scheme].activation, scale_rule=LINEAR_SCHEMES[scheme].rule)
    dual = tensors.get(f"{name}.weight_dual_scale")
    w = Encoded(
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], dual, scheme, -1, (n, x.shape[-1])
    )
    y = decode(a, torch.float32).double() @ decode(w, torch.float32).double().t()
    return y + tensors[f"{name}.bias"].double() if f"{name}.bias" in tensors else y


@pytest.mark.parametrize("export", exports.ALL, ids=lambda p: p.name)
@pytest.mark.parametrize("layout", ["original", "repacked"])
def test_a_real_export_loads_and_each_layer_computes_with_its_stored_tensors(export, layout, tmp_path):
    repack(export, tmp_path / "m")
    folder = tmp_path / "m" if layout == "repacked" else export
    for expert, canonical in zip(experts_of(folder), recognise(tmp_path / "m").experts, strict=True):
        model = load(expert, dtype=torch.bfloat16)
        tensors = stored(canonical.folder)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert set(layers) == {
            n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")
        }
        assert layers
        for name, m in layers.items():
            x = torch.randn(3, m.in_features, generator=torch.Generator().manual_seed(len(name))).bfloat16()
            actual, expected = m(x[None])[0].double(), exact(tensors, name, m.scheme, x)
            assert torch.allclose(actual, expected, rtol=2**-8, atol=2e-5 * float(expected.abs().max())), name
            back = m.state_dict()
            assert all(
                torch.equal(back[role], tensors[f"{name}.{role}"]) for role in ("weight", "weight_scale")
            ), name
        attention = {n: m for n, m in model.named_modules() if isinstance(m, Attention)}
        for name, a in attention.items():
            quant_type = expert.attention.get(f"{name}.quant_type")
            assert a.scheme == (quant_type and {"FP8_DYNAMIC": "fp8"}[quant_type])
            for role, rotation in (("q_rot", a.q_rot), ("k_rot", a.k_rot)):
                if (kept := tensors.get(f"{name}.{role}")) is None:
                    assert rotation is None
                else:
                    assert (
                        rotation is not None and torch.equal(rotation, kept) and kept.dtype == torch.bfloat16
                    )
        assert any(a.q_rot is not None for a in attention.values()) == (export == exports.MXFP8)
        smooth = {n.removesuffix(".mul_scale") for n in tensors if n.endswith(".mul_scale")} - set(layers)
        assert {n for n, m in model.named_modules() if isinstance(m, SmoothLinear)} == smooth


@pytest.mark.parametrize("export", exports.ALL, ids=lambda p: p.name)
def test_a_real_export_runs_a_forward(export, caplog):
    expert = experts_of(export)[0]
    with caplog.at_level("WARNING", logger="ascendit"):
        model = load(expert, dtype=torch.bfloat16)
    c = model.config
    assert not caplog.messages
    for grid in ((1, 2, 3), (2, 2, 2)):  # two resolutions, one after the other
        shape = [n * p for n, p in zip(grid, c.patch_size, strict=True)]
        x = torch.randn(1, c.in_channels, *shape).bfloat16()
        text = torch.randn(1, 5, c.text_dim).bfloat16()
        out = model(x, 500.0, model.prepare(grid, text))
        assert out.shape == (1, c.out_channels, *shape) and bool(out.isfinite().all())


def test_the_rotated_export_makes_the_same_latents_on_a_cpu_and_its_twin(twin):
    """Its FP8 attention is native there; without it the result differs."""
    expert, outputs = experts_of(exports.MXFP8)[0], []
    for device, schemes in (("cpu", True), ("twin:a5", True), ("cpu", False)):
        model = load_expert(expert, None, bind(device), dtype=torch.bfloat16)
        assert [b.attn1.scheme for b in model.blocks] == ["fp8"]
        if not schemes:
            model.blocks[0].attn1.scheme = None
        c, generator = model.config, torch.Generator().manual_seed(0)
        x = torch.randn(1, c.in_channels, 2, 8, 8, generator=generator).bfloat16()
        text = torch.randn(1, 5, c.text_dim, generator=generator).bfloat16()
        outputs.append(model(x, 500.0, model.prepare((2, 4, 4), text)))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_q_k_and_v_are_fused_if_their_schemes_agree():
    model = load(experts_of(exports.DUAL)[0])
    sizes = {n: len(m.group.layers) for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert {count for n, count in sizes.items() if n.endswith(("attn1.to_q", "attn1.to_v"))} == {3}
    assert {count for n, count in sizes.items() if n.endswith("attn2.to_k")} == {2}
    assert {count for n, count in sizes.items() if n.endswith(("attn2.to_q", "ffn.net.2", "to_out.0"))} == {1}


def test_a_step_in_w4a8_differs_from_a_step_in_w4a4():
    model = load(experts_of(exports.MXFP4)[0], dtype=torch.bfloat16)
    c, grid = model.config, (1, 2, 2)
    x = torch.randn(1, c.in_channels, *(n * p for n, p in zip(grid, c.patch_size, strict=True))).bfloat16()
    text = torch.randn(1, 5, c.text_dim).bfloat16()
    state = model.prepare(grid, text, steps=StepSchedule.parse("0:w4a8").resolve(2))
    outs = []
    for step in range(2):
        state.step = step
        outs.append(model(x, 500.0, state))
    plain = model.prepare(grid, text)
    assert state.current.precision == "stored" and plain.current.precision == "stored"
    assert not torch.equal(*outs)
    assert torch.equal(model(x, 500.0, plain), outs[1])


def test_an_unknown_number_of_heads_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="number of attention heads is unknown") as e:
        load_transformer(recognise(exports.INT8).experts[0], bind("cpu"))
    assert e.value.code == "E-CKP-06" and "--base" in e.value.fix
    repack(exports.INT8, tmp_path / "m")
    for config in (tmp_path / "m").glob("*/config.json"):
        heads = {"num_attention_heads": 2, "attention_head_dim": 32}
        config.write_text(json.dumps(json.loads(config.read_text()) | heads))
    model = load_transformer(recognise(tmp_path / "m").experts[0], bind("cpu"))
    assert model.config.num_attention_heads == 2
