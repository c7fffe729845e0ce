"""Quantized layers as modules: the two steps, fused groups, state dicts, and errors."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from ascendit import mx
from ascendit.errors import UsageError
from ascendit.model.linear import (
    LinearInput,
    QuantLinear,
    SmoothLinear,
    fused_linears,
    linear,
    stored_tensors,
)
from ascendit.mx.smoothing import smooth_input
from ascendit.ops.operators import bind
from ascendit.quant.schemes import LINEAR_SCHEMES, SCHEMES

OPS = bind("cpu", "reference")
STORED = sorted(s for s in LINEAR_SCHEMES if s != "w4a8")


def weight_of(scheme: str, n: int = 24, k: int = 64, seed: int = 0) -> tuple[mx.Encoded, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return mx.encode(torch.randn(n, k, generator=generator).bfloat16(), scheme), torch.randn(
        n, generator=generator
    )


def layer(scheme: str, **kw) -> QuantLinear:
    encoded, bias = weight_of(scheme)
    return QuantLinear.from_encoded(encoded, bias, schemes=OPS.quantized, **kw)


def activation(k: int = 64) -> torch.Tensor:
    return torch.randn(2, 5, k, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("scheme", STORED)
def test_output_is_the_decoded_activation_times_the_decoded_weight(scheme):
    m, x = layer(scheme), activation()
    assert m.bias is not None
    encoded, bias = weight_of(scheme)
    a = mx.encode(x.flatten(0, 1), LINEAR_SCHEMES[scheme].activation, scale_rule=LINEAR_SCHEMES[scheme].rule)
    expected = mx.decode(a).double() @ mx.decode(encoded).double().t() + bias.double()
    out = m(x)
    assert isinstance(m, nn.Linear) and out.dtype == torch.bfloat16 and out.shape == (2, 5, 24)
    assert torch.allclose(out.flatten(0, 1).double(), expected, rtol=2**-8, atol=1e-4)
    assert (m.in_features, m.out_features) == (64, 24) and f"64, 24, {scheme}" in repr(m)
    assert torch.equal(m.weight, mx.decode(encoded).bfloat16()) and torch.equal(m.bias, bias)
    assert m.weight.dtype == m.compute_dtype == torch.bfloat16
    assert not any(p.requires_grad for p in m.parameters())
    state = m.state_dict(keep_vars=True)
    assert {n: id(p) for n, p in m.named_parameters()} == {n: id(t) for n, t in state.items()}


def group_of(*seeds: int, scheme: str = "mxfp8") -> tuple[list[QuantLinear], list[mx.Encoded]]:
    unit = SCHEMES[scheme].tile or 8
    parts = [weight_of(scheme, n=unit * (i + 1), seed=seed) for i, seed in enumerate(seeds)]
    stored = [stored_tensors(e, bias) for e, bias in parts]
    tensors = {role: torch.cat([t[role] for t in stored]) for role in stored[0]}
    sizes = [e.shape[0] for e, _ in parts]
    layers = fused_linears(tensors, sizes, scheme, OPS.quantized, width=64, compute_dtype=torch.bfloat16)
    return layers, [e for e, _ in parts]


def test_fused_layers_quantize_and_multiply_once(monkeypatch):
    layers, parts = group_of(1, 2, 3)
    alone = [
        QuantLinear.from_encoded(e, m.bias, schemes=OPS.quantized) for e, m in zip(parts, layers, strict=True)
    ]
    calls: list[str] = []
    schemes_type = type(OPS.quantized)

    def spy(name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        return call

    for name in ("quantize_activation", "quantized_linear"):
        monkeypatch.setattr(schemes_type, name, spy(name, getattr(schemes_type, name)))
    t = LinearInput(activation())
    outs = [linear(OPS, m, t) for m in layers]
    assert calls == ["quantize_activation", "quantized_linear"]
    assert all(torch.equal(out, m(activation())) for out, m in zip(outs, alone, strict=True))
    assert torch.equal(linear(OPS, layers[0], t), outs[0])  # a second request computes it again


def test_layers_with_one_input_but_different_groups_quantize_it_once(monkeypatch):
    mul = torch.rand(64) + 0.5
    layers = [layer("mxfp8"), layer("mxfp8"), layer("mxfp8", mul_scale=mul), layer("mxfp8", mul_scale=mul)]
    mul_scales: list[Any] = []
    original = type(OPS.quantized).quantize_activation

    def spy(*args: Any) -> Any:
        mul_scales.append(args[3])
        return original(*args)

    monkeypatch.setattr(type(OPS.quantized), "quantize_activation", spy)
    t = LinearInput(activation())
    outs = [linear(OPS, m, t) for m in layers]
    assert len(mul_scales) == 2 and mul_scales[0] is None and mul_scales[1].data_ptr() == mul.data_ptr()
    assert torch.equal(outs[2], layer("mxfp8")(smooth_input(activation(), mul)))


def test_precision_of_a_step():
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    m, x = layer("mxfp4"), activation()
    assert m.bias is not None
    stored, w4a4, w4a8 = (linear(OPS, m, x, p) for p in ("stored", "w4a4", "w4a8"))
    exact = x.double() @ m.weight.double().t() + m.bias.double()
    error = [float((y.double() - exact).norm()) for y in (w4a4, w4a8)]
    assert torch.equal(stored, w4a4) and error[1] < error[0] / 4
    assert torch.equal(linear(OPS, layer("mxfp8"), x, "w4a8"), layer("mxfp8")(x))
    m.floats = (weight, None)
    assert torch.equal(linear(OPS, m, x, "bf16"), nn.functional.linear(x, weight))
    assert torch.equal(linear(OPS, m, x, "stored"), stored)


@pytest.mark.parametrize("scheme", STORED)
def test_the_state_dict_has_the_stored_tensors_and_loads_again(scheme):
    mul = torch.rand(64) + 0.5
    m = nn.ModuleDict({"to_q": layer(scheme, mul_scale=mul)})
    encoded, bias = weight_of(scheme)
    state = m.state_dict()
    expected = {"weight": encoded.qdata, "weight_scale": encoded.scale, "mul_scale": mul, "bias": bias}
    expected |= {"weight_offset": torch.zeros(24, 1)} if scheme == "int8" else {}
    expected |= {"weight_dual_scale": encoded.dual_scale} if encoded.dual_scale is not None else {}
    assert {k.removeprefix("to_q.") for k in state} == set(expected)
    assert all(torch.equal(state[f"to_q.{k}"], v) for k, v in expected.items())
    other, b = weight_of(scheme, seed=9)
    blank = nn.ModuleDict(
        {"to_q": QuantLinear.from_encoded(other, b, schemes=OPS.quantized, mul_scale=mul * 2)}
    )
    blank.load_state_dict(state)
    assert torch.equal(blank["to_q"](activation()), m["to_q"](activation()))
    with pytest.raises(RuntimeError, match="loaded unchanged"):
        blank.load_state_dict(state | {"to_q.weight": torch.zeros(24, 64)})
    with pytest.raises(RuntimeError, match="Missing key"):
        blank.load_state_dict({k: v for k, v in state.items() if "scale" not in k})


def test_one_layer_of_a_group_is_replaced_alone():
    layers, _ = group_of(1, 2, 3)
    before = [m(activation()) for m in layers]
    other, bias = weight_of("mxfp8", n=16, seed=7)
    layers[1].load_state_dict({"weight": other.qdata, "weight_scale": other.scale, "bias": bias})
    assert torch.equal(layers[0](activation()), before[0]) and torch.equal(layers[2](activation()), before[2])
    assert torch.equal(layers[1].weight, mx.decode(other).bfloat16())


def test_casts_are_refused_and_moves_are_not():
    m, x = layer("mxfp8"), activation()
    before = m(x)
    for cast in (lambda: m.float(), lambda: m.half(), lambda: m.to(torch.float32), lambda: m.to("meta")):
        with pytest.raises(UsageError) as e:
            cast()
        assert e.value.code == "E-QNT-03" and "mxfp8" in e.value.got
    same = m.to(torch.bfloat16).to("cpu").cpu()
    assert same is m and torch.equal(m(x), before) and torch.equal(copy.deepcopy(m)(x), before)


def count_products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the scheme of each following call of `Schemes.quantized_linear`."""
    calls: list[str] = []
    original = type(OPS.quantized).quantized_linear

    def spy(self: Any, a: Any, weight: Any) -> Any:
        calls.append(weight.scheme)
        return original(self, a, weight)

    monkeypatch.setattr(type(OPS.quantized), "quantized_linear", spy)
    return calls


def storage_of(m: QuantLinear) -> int:
    qdata: Any = m._parameters["weight"]
    return qdata.untyped_storage().data_ptr()


def outputs(layers: list[QuantLinear]) -> list[torch.Tensor]:
    t = LinearInput(activation())
    return [linear(OPS, m, t) for m in layers]


@pytest.mark.parametrize("scheme", STORED)
def test_layers_are_rows_of_one_storage_and_fused_again_after_a_move(scheme, monkeypatch):
    layers, _ = group_of(1, 2, 3, scheme=scheme)
    expected, calls = outputs(layers), count_products(monkeypatch)
    storages = {storage_of(m) for m in layers}
    held = [m.group.weight for m in layers]  # so that its memory is not reused
    assert len(storages) == 1 and layers[0].extra_nbytes == 0
    for m in layers:
        m._apply(torch.clone)  # like a move, tensor by tensor
    assert all(torch.equal(a, b) for a, b in zip(outputs(layers), expected, strict=True))
    assert calls == [scheme]
    assert len({storage_of(m) for m in layers} | storages) == 2 and held


def test_replaced_parameters_are_multiplied_alone_and_not_cached(monkeypatch):
    layers, _ = group_of(1, 2, 3)
    expected = outputs(layers)
    for m in layers:
        for p in m.parameters():
            p.data = p.data.clone()
    calls = count_products(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(outputs(layers), expected, strict=True))
    assert len(calls) == 3 and layers[0].group.weight is None
    layers[0].group.fuse()
    assert all(torch.equal(a, b) for a, b in zip(outputs(layers), expected, strict=True)) and len(calls) == 4


def saved_and_loaded(m: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(m, file)  # pickles it
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
def test_a_copy_is_fused_when_it_first_computes(duplicate, inference, monkeypatch):
    layers, _ = group_of(1, 2, 3)
    expected = outputs(layers)
    copied = list(duplicate(nn.ModuleList(layers)))
    products, prepared = count_products(monkeypatch), []
    original = type(OPS.quantized).prepare_weight

    def spy(*args: Any, **kwargs: Any) -> Any:
        prepared.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(type(OPS.quantized), "prepare_weight", spy)
    with torch.inference_mode(inference):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(outputs(copied), expected, strict=True))
            assert len(prepared) == 1
    assert len(products) == 2
    assert len({storage_of(m) for m in copied}) == 1 and storage_of(copied[0]) != storage_of(layers[0])
    assert (
        all(torch.equal(a, b) for a, b in zip(outputs(layers), expected, strict=True)) and len(prepared) == 1
    )


def test_writes_to_a_parameter_are_used():
    once = bind("cpu", "reference", emulate="decode-once").quantized
    encoded, bias = weight_of("int8")
    m: Any = QuantLinear.from_encoded(encoded, bias, schemes=once)
    assert m.extra_nbytes == 24 * 64 * 4
    m._parameters["weight"].zero_()
    assert torch.equal(m(activation())[0, 0], bias.bfloat16())


def test_a_state_dict_that_is_loaded_in_inference_mode_is_used():
    once = bind("cpu", "reference", emulate="decode-once").quantized
    with torch.inference_mode():
        (old, bias), (new, _) = weight_of("int8"), weight_of("int8", seed=9)
        m = QuantLinear.from_encoded(old, bias, schemes=once)
        m.load_state_dict(stored_tensors(new, bias) | {"weight_offset": torch.zeros(24, 1)})
        expected = QuantLinear.from_encoded(new, bias, schemes=once)(activation())
        assert torch.equal(m(activation()), expected)


def test_a_cast_of_a_parameter_is_refused_when_it_is_used():
    for role, dtype in (("weight_scale", torch.bfloat16), ("weight", torch.bfloat16)):
        m: Any = layer("fp8")
        m._parameters[role] = nn.Parameter(m._parameters[role].to(dtype), requires_grad=False)
        with pytest.raises(UsageError, match=f"fp8 to {dtype}") as e:
            m(activation())
        assert e.value.code == "E-QNT-03"


def test_loading_mul_scale_changes_one_of_the_layers_that_shared_it():
    mul, other = torch.rand(64) + 0.5, torch.rand(64) + 0.5
    encoded, bias = weight_of("mxfp8", n=48)
    q: Any
    q, k = fused_linears(
        stored_tensors(encoded, bias), [24, 24], "mxfp8", OPS.quantized,
        width=64, compute_dtype=torch.bfloat16, mul_scale=mul,
    )  # fmt: skip
    assert q.mul_scale is k.mul_scale
    q.load_state_dict(q.state_dict() | {"mul_scale": other})
    assert torch.equal(q.state_dict()["mul_scale"], other) and torch.equal(k.state_dict()["mul_scale"], mul)
    alone = QuantLinear.from_encoded(q.encoded(), q.bias, schemes=OPS.quantized, mul_scale=other)
    assert torch.equal(outputs([q, k])[0], alone(activation()))


def test_a_smoothed_float_layer():
    w, b, mul = torch.randn(8, 16).bfloat16(), torch.randn(8).bfloat16(), torch.rand(16) + 0.5
    m, x = SmoothLinear(w, b, mul), activation(16)
    assert torch.equal(m(x), nn.functional.linear(smooth_input(x, mul), w, b))
    assert set(m.state_dict()) == {"weight", "bias", "mul_scale"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"extra": torch.zeros(1)}, "Unexpected key"),
        ({"mul_scale": torch.ones(64)}, "Unexpected key"),
        ({"weight_offset": torch.ones(24, 1)}, "not zero"),
        ({"weight_scale": torch.full((24, 1), float("nan"))}, "not finite"),
        ({"bias": torch.full((24,), float("inf"))}, "not finite"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change, text):
    m = nn.ModuleDict({"to_q": layer("int8")})
    before = m["to_q"](activation())
    with pytest.raises(RuntimeError, match=text):
        m.load_state_dict(m.state_dict() | {f"to_q.{k}": v for k, v in change.items()})
    assert torch.equal(m["to_q"](activation()), before)


def test_nan_scales_and_float_weights_refuse_a_state_dict():
    m = nn.ModuleDict({"to_q": layer("mxfp8", mul_scale=torch.ones(64) * 2)})
    state = m.state_dict()
    for role, value in (
        ("weight_scale", torch.full_like(state["to_q.weight_scale"], 255)),
        ("mul_scale", -torch.ones(64)),
    ):
        with pytest.raises(RuntimeError, match="255|zero, negative"):
            m.load_state_dict(state | {f"to_q.{role}": value})
    quantized: Any = m["to_q"]
    quantized.floats = (torch.zeros(24, 64), None)
    with pytest.raises(RuntimeError, match="load the model again"):
        m.load_state_dict(state)


def test_fused_layers_with_a_changed_mul_scale_stay_correct():
    layers, parts = group_of(1, 2, 3)
    layers[1].mul_scale = nn.Parameter(torch.rand(64) + 0.5, requires_grad=False)
    t = LinearInput(activation())
    for m in layers:
        assert torch.equal(linear(OPS, m, t), m(activation()))
    alone = QuantLinear.from_encoded(
        parts[1], layers[1].bias, schemes=OPS.quantized, mul_scale=layers[1].mul_scale
    )
    assert torch.equal(layers[1](activation()), alone(activation()))
