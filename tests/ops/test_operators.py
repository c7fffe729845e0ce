"""Bound operators against `reference`, and their selection."""

from __future__ import annotations

import pytest
import torch
from ops.arguments import S, arguments
from ops.layers import activation_of, decoded, exact, on_disk, weight_of
from torch import Tensor

from ascendit import mx
from ascendit.device.device import parse_device
from ascendit.device.operator_support import native_on
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels import reference
from ascendit.mx.smoothing import smooth_input
from ascendit.ops.operators import OPERATOR_NAMES, Ops, bind
from ascendit.quant.schemes import LINEAR_SCHEMES

# Largest relative error, by the norm: float32 rounding, and half a BF16 step (2^-9) for each rounding.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("spans", [(S,), (5, S - 5)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", OPERATOR_NAMES)
def test_cpu_operators_give_the_reference_numbers(
    name: str, dtype: torch.dtype, spans: tuple[int, ...]
) -> None:
    args = arguments(name, dtype, spans)
    actual, expected = getattr(bind("cpu"), name)(*args), getattr(reference, name)(*args)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == dtype
    assert relative(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_two_phases_of_rms_norm_give_the_fused_numbers(dtype: torch.dtype) -> None:
    x, weight, eps = arguments("rms_norm", dtype, (S,))
    for device in ("cpu", "twin:a5", "cuda"):
        ops = bind(device)
        mean = ops.mean_square(x)
        torch.testing.assert_close(mean, reference.mean_square(x), rtol=2e-6, atol=0)
        assert (
            relative(ops.rms_scale(x, mean, weight, eps), reference.rms_norm(x, weight, eps))
            < TOLERANCE[dtype]
        )
    forced = bind("cpu", "reference")
    assert forced.rms_scale is reference.rms_scale and forced.mean_square is reference.mean_square


def test_reference_can_be_forced_and_choices_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ascendit"):
        forced, free = bind("cpu", "reference"), bind("cpu")
    assert all(getattr(forced, name) is getattr(reference, name) for name in OPERATOR_NAMES)
    assert free.attention is not reference.attention
    assert set(free.choices) == set(OPERATOR_NAMES) and free.choices["linear"].startswith("reference")
    assert "fused PyTorch kernel" in free.choices["adaln"]
    assert "--set ops=reference" in caplog.text


def test_unknown_force_is_refused() -> None:
    with pytest.raises(UsageError, match="ops=fastest") as e:
        bind("cpu", "fastest")
    assert e.value.code == "E-USE-01"


def test_ops_are_frozen() -> None:
    with pytest.raises(AttributeError):
        bind("cpu").linear = reference.linear  # type: ignore[misc]
    assert isinstance(bind("cuda"), Ops)


# ---- quantized linear layers ---------------------------------------------------------------------

K = 544  # 17 blocks of 32, one group of 512 and a short one


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_float32_outputs_equal_float64_up_to_summation_order(scheme, bias):
    ops = bind("cpu").quantized
    encoded, b = weight_of(scheme, 24, K, bias=bias)
    x = activation_of(5, K, torch.float32)
    weight = ops.prepare_weight(*on_disk(encoded, b), scheme)
    out = ops.quantized_linear(ops.quantize_activation(x, scheme), weight)
    expected = exact(x, scheme, encoded, b)
    assert out.dtype == torch.float32 and out.shape == (2, 5, 24)
    assert float((out - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_bfloat16_rounds_once(scheme):
    ops = bind("cpu").quantized
    encoded, bias = weight_of(scheme, 24, K)
    x = activation_of(5, K)
    a = ops.quantize_activation(x, scheme)
    out = ops.quantized_linear(a, ops.prepare_weight(*on_disk(encoded, bias), scheme))
    assert out.dtype == torch.bfloat16
    assert bias is not None
    expected = decoded(a) @ mx.decode(encoded).t() + bias
    torch.testing.assert_close(out.flatten(0, 1), expected.to(torch.bfloat16), rtol=0, atol=0)


def test_one_activation_serves_several_weights_and_w4a8_shares_the_weight_of_mxfp4():
    ops = bind("cpu").quantized
    x = activation_of(4, 64)
    weights = [weight_of("mxfp4", 24, 64) for _ in range(3)]
    prepared = [ops.prepare_weight(*on_disk(*w), "mxfp4") for w in weights]
    w4a4, w4a8 = ops.quantize_activation(x, "mxfp4"), ops.quantize_activation(x, "w4a8")
    for (encoded, bias), weight in zip(weights, prepared, strict=True):
        for scheme, a in (("mxfp4", w4a4), ("w4a8", w4a8)):
            expected = exact(x, scheme, encoded, bias)
            assert mx.sqnr(expected, ops.quantized_linear(a, weight)) > 50
    assert ops.prepare_weight(*on_disk(*weights[0]), "w4a8").scheme == "mxfp4"


def test_fused_q_k_and_v_give_their_concatenated_outputs():
    ops = bind("cpu").quantized
    parts = [weight_of("mxfp4_dualscale", n, 544) for n in (8, 8, 4)]
    a = ops.quantize_activation(activation_of(3, 544), "mxfp4_dualscale")
    singles = [ops.quantized_linear(a, ops.prepare_weight(*on_disk(*p), "mxfp4_dualscale")) for p in parts]
    encoded = [p[0] for p in parts]
    qdata, scale, dual = (
        torch.cat([getattr(e, role) for e in encoded]) for role in ("qdata", "scale", "dual_scale")
    )
    bias = torch.cat([p[1] for p in parts if p[1] is not None])
    whole = ops.quantized_linear(a, ops.prepare_weight(qdata, scale, dual, bias, "mxfp4_dualscale"))
    assert torch.equal(whole, torch.cat(singles, -1))


@pytest.mark.parametrize("scheme", ["int8", "mxfp4"])
def test_mul_scale_multiplies_the_activation_first(scheme):
    ops = bind("cpu").quantized
    x, mul_scale = activation_of(3, 64), torch.rand(64) + 0.1
    a = ops.quantize_activation(x, scheme, mul_scale)
    assert torch.equal(decoded(a), decoded(ops.quantize_activation(smooth_input(x, mul_scale), scheme)))
    assert not torch.equal(decoded(a), decoded(ops.quantize_activation(x, scheme)))


def test_the_rule_of_the_activation_can_be_chosen():
    ops = bind("cpu").quantized
    x = activation_of(3, 64)
    for rule in ("floor", "max:7"):
        expected = mx.encode(x.flatten(0, 1), "mxfp4", scale_rule=rule)
        assert torch.equal(ops.quantize_activation(x, "mxfp4", rule=rule).qdata, expected.qdata)
    with pytest.raises(UsageError, match="scale rule 'ceil_x'"):
        ops.quantize_activation(x, "mxfp4", rule="ceil_x")


@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_stored_weights_are_recovered(scheme):
    encoded, bias = weight_of(scheme, 8, 544)
    ops = bind("cpu").quantized
    weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
    back = ops.stored(weight)
    assert torch.equal(back.qdata.view(torch.uint8), encoded.qdata.view(torch.uint8))
    assert torch.equal(back.scale, encoded.scale) and weight.shape == (8, 544)
    assert weight.nbytes < 8 * 544 * 1.2 + 8 * 20  # not decoded


def test_an_activation_or_scale_that_does_not_fit_is_refused():
    ops = bind("cpu").quantized
    encoded, bias = weight_of("mxfp8", 8, 64)
    weight = ops.prepare_weight(*on_disk(encoded, bias), "mxfp8")
    x = activation_of(3, 64)
    for scheme, width in (("mxfp4", 64), ("mxfp8", 32)):
        with pytest.raises(UsageError) as e:
            ops.quantized_linear(ops.quantize_activation(x[..., :width], scheme), weight)
        assert f"K = {width} in {scheme}" in e.value.got and "mxfp8" in e.value.fix
    with pytest.raises(UsageError, match="scale"):
        ops.prepare_weight(encoded.qdata, encoded.scale[:4], None, bias, "mxfp8")
    with pytest.raises(UsageError) as e:
        ops.quantize_activation(x, "bf16")
    assert e.value.code == "E-USE-01" and "w4a8" in e.value.needs


# ---- schemes by device --------------------------------------------------------------------------


def test_native_schemes_by_chip():
    assert native_on("a2") == native_on("a3") == {"int8", "int8_block"}
    assert native_on("a5") == set(LINEAR_SCHEMES)
    assert parse_device("twin:a5").native_schemes == native_on("a5")
    assert parse_device("cpu").native_schemes == frozenset()


@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize("chip", ["a2", "a3"])
@pytest.mark.parametrize("scheme", [s for s in LINEAR_SCHEMES if not s.startswith("int8")])
def test_a_scheme_without_a_matmul_on_the_chip_is_refused(chip, scheme):
    ops = bind(f"twin:{chip}").quantized
    encoded, bias = weight_of(scheme, 8, 64)
    for call in (
        lambda: ops.prepare_weight(*on_disk(encoded, bias), scheme),
        lambda: ops.quantize_activation(activation_of(2, 64), scheme),
    ):
        with pytest.raises(EnvironmentProblem) as e:
            call()
        assert e.value.code == "E-CAP-01" and f"scheme {scheme} on twin:{chip}" in e.value.got
        assert "Ascend 950" in e.value.needs and f"{chip} has bf16, int8, int8_block" in e.value.needs
        assert 'emulate="decode-on-use"' in e.value.fix and "int8" in e.value.fix


@pytest.mark.usefixtures("twin")
def test_emulation_is_the_reference_and_is_logged(caplog):
    with caplog.at_level("INFO", logger="ascendit"):
        free, forced = bind("twin:a2", emulate=True).quantized, bind("cpu").quantized
        encoded, bias = weight_of("mxfp8", 8, 64)
        x = activation_of(3, 64)
        outs = []
        for ops in (free, forced):
            weight = ops.prepare_weight(*on_disk(encoded, bias), "mxfp8")
            outs.append(ops.quantized_linear(ops.quantize_activation(x, "mxfp8"), weight))
        free.quantize_activation(x, "int8")
    assert torch.equal(*outs)
    assert caplog.text.count("linear layers in mxfp8 on twin:a2 -> reference: emulated") == 1
    assert "linear layers in mxfp8 on cpu -> " in caplog.text
    assert "linear layers in int8 on twin:a2 -> npu: native: NPU matmul" in caplog.text


@pytest.mark.usefixtures("twin")
def test_the_reference_can_be_forced_for_quantized_layers():
    ops = bind("twin:a5", "reference").quantized
    assert {ops.kernel(s).backend for s in LINEAR_SCHEMES} == {"reference"}
