"""Quantized linear layers with the NPU's matmuls, on the twin."""

from __future__ import annotations

import pytest
import torch
from ops.layers import NATIVE, activation_of, exact, on_disk, weight_of
from ops.recorder import Recorder

from ascendit import mx
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.mx.smoothing import smooth_input
from ascendit.ops.npu import linear as npu_linear
from ascendit.ops.npu.linear import scale_algorithm
from ascendit.ops.operators import bind
from ascendit.quant.schemes import LINEAR_SCHEMES

pytestmark = pytest.mark.usefixtures("twin")
PAIRS = [(chip, scheme) for chip, schemes in NATIVE.items() for scheme in sorted(schemes)]


@pytest.mark.parametrize("k", [64, 96, 544])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("chip", "scheme"), PAIRS)
def test_outputs_equal_the_cpu_and_float64(chip, scheme, bias, k):
    encoded, b = weight_of(scheme, 24, k, bias=bias)
    x = activation_of(5, k)
    outs = []
    for ops in (bind("cpu").quantized, bind(f"twin:{chip}").quantized):
        weight = ops.prepare_weight(*on_disk(encoded, b), scheme)
        outs.append(ops.quantized_linear(ops.quantize_activation(x, scheme), weight))
    expected, actual = outs
    assert actual.shape == (2, 5, 24) and actual.dtype == torch.bfloat16
    assert mx.sqnr(expected, actual) > 50
    assert mx.sqnr(exact(x, scheme, encoded, b).float(), actual) > 50


@pytest.mark.parametrize("scheme", ["int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale", "w4a8"])
def test_float16_activations(scheme):
    ops = bind("twin:a5").quantized
    encoded, bias = weight_of(scheme, 16, 64)
    x = activation_of(4, 64, torch.float16)
    out = ops.quantized_linear(
        ops.quantize_activation(x, scheme), ops.prepare_weight(*on_disk(encoded, bias), scheme)
    )
    assert out.dtype == torch.float16 and mx.sqnr(exact(x, scheme, encoded, bias).float(), out) > 50


@pytest.mark.parametrize(("chip", "scheme"), [p for p in PAIRS if p[1] not in ("fp8", "int8_block")])
def test_fractal_nz_gives_the_same_numbers(chip, scheme):
    ops = bind(f"twin:{chip}").quantized
    encoded, bias = weight_of(scheme, 32, 64)
    a = ops.quantize_activation(activation_of(4, 64), scheme)
    nd, nz_weight = (ops.prepare_weight(*on_disk(encoded, bias), scheme, nz=nz) for nz in (False, True))
    assert int(torch.ops.npu.get_npu_format(nz_weight.qdata)) == 29
    assert torch.equal(ops.quantized_linear(a, nd), ops.quantized_linear(a, nz_weight))
    for weight in (nd, nz_weight):
        back = ops.stored(weight)
        assert torch.equal(back.qdata.view(torch.uint8), encoded.qdata.view(torch.uint8))
        assert torch.equal(back.scale, encoded.scale)
        if encoded.dual_scale is not None and back.dual_scale is not None:
            assert torch.equal(back.dual_scale, encoded.dual_scale)
        assert (encoded.dual_scale is None) == (back.dual_scale is None)


def test_one_kernel_to_quantize_and_one_to_multiply():
    ops = bind("twin:a5").quantized
    for scheme in LINEAR_SCHEMES:
        encoded, bias = weight_of(scheme, 16, 64)
        weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
        x = activation_of(4, 64)
        with torch.no_grad(), Recorder() as recorder:
            a = ops.quantize_activation(x, scheme)
            for _ in range(3):
                ops.quantized_linear(a, weight)
        quantizers = sum(n for name, n in recorder.launched.items() if "dynamic" in name)
        copies = 1 if scheme == "int8_block" else 0  # of scales, for every row
        assert (quantizers, recorder.launched.total()) == (1, 4 + copies), (scheme, recorder.launched)
        mul_scale = torch.rand(64) + 0.1
        with torch.no_grad(), Recorder() as smoothed:
            ops.quantize_activation(x, scheme, mul_scale)
        assert smoothed.launched.total() == 2 + copies and smoothed.launched["mul"] == 1


def test_mul_scale():
    ops = bind("twin:a5").quantized
    x, mul_scale = activation_of(3, 64), torch.rand(64) + 0.1
    for scheme in ("int8", "mxfp4_dualscale"):
        actual = ops.quantize_activation(x, scheme, mul_scale)
        expected = ops.quantize_activation(smooth_input(x, mul_scale), scheme)
        assert torch.equal(actual.qdata, expected.qdata) and torch.equal(actual.scale, expected.scale)


@pytest.mark.parametrize(
    ("scheme", "rule"), [("mxfp8", "floor"), ("mxfp8", "ceil"), ("mxfp4", "floor"), ("mxfp4", "max:7")]
)
def test_scale_rules_are_those_of_mx(scheme, rule):
    x = activation_of(6, 96)
    qdata = [
        bind(device).quantized.quantize_activation(x, scheme, rule=rule).qdata.view(torch.uint8)
        for device in ("cpu", "twin:a5")
    ]
    assert torch.equal(*qdata)


def test_scale_rules_without_a_kernel_are_refused():
    assert scale_algorithm("max:7.25", 296) == {"scale_alg": 2, "dst_type_max": 7.25}
    ops = bind("twin:a5").quantized
    for scheme, rule in (
        ("mxfp8", "max:7"),
        ("mxfp4", "ceil"),
        ("int8", "msms:int8"),
        ("mxfp4_dualscale", "x"),
    ):
        with pytest.raises(UsageError, match=f"scale rule '{rule}'"):
            ops.quantize_activation(activation_of(2, 64), scheme, rule=rule)


@pytest.mark.parametrize(("chip", "n", "k"), [("a2", 256, 512), ("a3", 512, 8960), ("a5", 100, 8960)])
def test_int8_in_tiles_is_padded_only_if_the_chip_needs_it(chip, n, k):
    ops = bind(f"twin:{chip}").quantized
    encoded, bias = weight_of("int8_block", n, k)
    weight = ops.prepare_weight(*on_disk(encoded, bias), "int8_block")
    shares = weight.qdata.untyped_storage().data_ptr() == encoded.qdata.untyped_storage().data_ptr()
    assert shares == (chip == "a5" or k == 512)
    assert tuple(weight.qdata.shape) == (k if chip == "a5" else -(-k // 512) * 512, n)


def test_int8_in_tiles_supports_only_bfloat16():
    with pytest.raises(UsageError, match="an activation in float16 for int8_block"):
        bind("twin:a5").quantized.quantize_activation(torch.randn(4, 64).half(), "int8_block")


def test_float32_activations_are_refused():
    with pytest.raises(UsageError, match="an activation in float32 for int8") as e:
        bind("twin:a5").quantized.quantize_activation(torch.randn(4, 64), "int8")
    assert e.value.fix == 'dtype="bfloat16"'


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp4_dualscale"])
def test_shapes_without_an_fp4_matmul_are_refused(scheme):
    ops = bind("twin:a5").quantized
    with Recorder() as recorder:
        for n, k in ((16, 2), (1, 64)):
            encoded, bias = weight_of(scheme, n, k)
            with pytest.raises(UsageError, match=f"a weight of N = {n} and K = {k} in {scheme}") as e:
                ops.prepare_weight(*on_disk(encoded, bias), scheme)
            assert e.value.code == "E-QNT-01" and "an even K above 2" in e.value.needs
    assert not any("npu" in name for name in recorder.launched)
    qdata, scale = torch.zeros(16, 33, dtype=torch.uint8), torch.zeros(16, 3, dtype=torch.uint8)
    dual = torch.ones(16, 1, 1) if "dual" in scheme else None
    with pytest.raises(UsageError, match="N = 16 and K = 65"):
        ops.prepare_weight(qdata, scale, dual, None, scheme, width=65)
    mxfp8, _ = weight_of("mxfp8", 16, 65)  # a short last block is fine
    ops.prepare_weight(*on_disk(mxfp8, None), "mxfp8")


def test_w4a8_needs_a_multiple_of_8():
    ops, x = bind("twin:a5").quantized, activation_of(2, 68)
    with Recorder() as recorder, pytest.raises(UsageError, match="K = 68 in w4a8") as e:
        ops.quantize_activation(x, "w4a8")
    assert (
        e.value.code == "E-QNT-01" and e.value.needs.startswith("a multiple of 8") and not recorder.launched
    )
    ops.quantize_activation(x, "mxfp4")


def test_an_activation_of_another_scheme_or_width_is_refused():
    ops = bind("twin:a5").quantized
    weight = ops.prepare_weight(*on_disk(*weight_of("mxfp8", 16, 64)), "mxfp8")
    for scheme, k in (("mxfp4", 64), ("mxfp8", 96), ("w4a8", 64)):
        with pytest.raises(UsageError, match=rf"K = {k} in {scheme} with a weight \(16, 64\) in mxfp8"):
            ops.quantized_linear(ops.quantize_activation(activation_of(2, k), scheme), weight)


def test_nz_applies_to_schemes_that_allow_both_layouts():
    """No document says that the fp8 matmul reads FRACTAL_NZ; the dual-scale matmul reads nothing else."""
    ops = bind("twin:a5", nz=True).quantized
    for scheme, layout in (("int8", 29), ("fp8", 2), ("mxfp8", 29), ("mxfp4", 29), ("mxfp4_dualscale", 29)):
        weight = ops.prepare_weight(*on_disk(*weight_of(scheme, 16, 64)), scheme)
        assert int(torch.ops.npu.get_npu_format(weight.qdata)) == layout
    plain = bind("twin:a5").quantized.prepare_weight(*on_disk(*weight_of("int8", 16, 64)), "int8")
    assert int(torch.ops.npu.get_npu_format(plain.qdata)) == 2


def test_a_cast_that_stays_nd_is_an_error(monkeypatch):
    ops = bind("twin:a2").quantized
    encoded, bias = weight_of("int8", 16, 64)
    monkeypatch.setattr(npu_linear, "internal_format", lambda device, allowed: _nothing())
    with (
        pytest.warns(UserWarning, match="returns ND"),
        pytest.raises(EnvironmentProblem, match="returned format 2") as e,
    ):
        ops.prepare_weight(*on_disk(encoded, bias), "int8", nz=True)
    assert e.value.needs == "format 29 (FRACTAL_NZ)" and e.value.code == "E-CAP-01"


def _nothing():
    import contextlib

    return contextlib.nullcontext()
