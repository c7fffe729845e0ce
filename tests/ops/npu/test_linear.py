"""Linear layers on codes with the NPU's matmuls, on its twin."""

from __future__ import annotations

import pytest
import torch
from ops.layers import NATIVE, exact, on_disk, tokens_of, weight_of
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
def test_the_references_numbers(chip, scheme, bias, k):
    encoded, b = weight_of(scheme, 24, k, bias=bias)
    x = tokens_of(5, k)
    outs = []
    for ops in (bind("cpu").quantized, bind(f"twin:{chip}").quantized):
        weight = ops.prepare_weight(*on_disk(encoded, b), scheme)
        outs.append(ops.quantized_linear(ops.quantize_activation(x, scheme), weight))
    wanted, got = outs
    assert got.shape == (2, 5, 24) and got.dtype == torch.bfloat16
    assert mx.sqnr(wanted, got) > 50
    assert mx.sqnr(exact(x, scheme, encoded, b).float(), got) > 50


@pytest.mark.parametrize("scheme", ["int8", "fp8", "mxfp8", "mxfp4", "mxfp4_dualscale", "w4a8"])
def test_float16_tokens(scheme):
    ops = bind("twin:a5").quantized
    encoded, bias = weight_of(scheme, 16, 64)
    x = tokens_of(4, 64, torch.float16)
    out = ops.quantized_linear(
        ops.quantize_activation(x, scheme), ops.prepare_weight(*on_disk(encoded, bias), scheme)
    )
    assert out.dtype == torch.float16 and mx.sqnr(exact(x, scheme, encoded, bias).float(), out) > 50


@pytest.mark.parametrize(("chip", "scheme"), [p for p in PAIRS if p[1] not in ("fp8", "int8_block")])
def test_fractal_nz_gives_the_same_numbers(chip, scheme):
    ops = bind(f"twin:{chip}").quantized
    encoded, bias = weight_of(scheme, 32, 64)
    a = ops.quantize_activation(tokens_of(4, 64), scheme)
    plain, blocked = (ops.prepare_weight(*on_disk(encoded, bias), scheme, nz=nz) for nz in (False, True))
    assert int(torch.ops.npu.get_npu_format(blocked.qdata)) == 29
    assert torch.equal(ops.quantized_linear(a, plain), ops.quantized_linear(a, blocked))
    for weight in (plain, blocked):
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
        x = tokens_of(4, 64)
        with torch.no_grad(), Recorder() as seen:
            a = ops.quantize_activation(x, scheme)
            for _ in range(3):
                ops.quantized_linear(a, weight)
        quantizers = sum(n for name, n in seen.launched.items() if "dynamic" in name)
        copies = 1 if scheme == "int8_block" else 0  # of scales, for every row
        assert (quantizers, seen.launched.total()) == (1, 4 + copies), (scheme, seen.launched)
        mul_scale = torch.rand(64) + 0.1
        with torch.no_grad(), Recorder() as smoothed:
            ops.quantize_activation(x, scheme, mul_scale)
        assert smoothed.launched.total() == 2 + copies and smoothed.launched["mul"] == 1


def test_mul_scale():
    ops = bind("twin:a5").quantized
    x, mul_scale = tokens_of(3, 64), torch.rand(64) + 0.1
    for scheme in ("int8", "mxfp4_dualscale"):
        got = ops.quantize_activation(x, scheme, mul_scale)
        wanted = ops.quantize_activation(smooth_input(x, mul_scale), scheme)
        assert torch.equal(got.qdata, wanted.qdata) and torch.equal(got.scale, wanted.scale)


@pytest.mark.parametrize(
    ("scheme", "rule"), [("mxfp8", "floor"), ("mxfp8", "ceil"), ("mxfp4", "floor"), ("mxfp4", "max:7")]
)
def test_scale_rules_are_those_of_mx(scheme, rule):
    x = tokens_of(6, 96)
    qdata = [
        bind(device).quantized.quantize_activation(x, scheme, rule=rule).qdata.view(torch.uint8)
        for device in ("cpu", "twin:a5")
    ]
    assert torch.equal(*qdata)


def test_rules_that_no_kernel_has():
    assert scale_algorithm("max:7.25", 296) == {"scale_alg": 2, "dst_type_max": 7.25}
    ops = bind("twin:a5").quantized
    for scheme, rule in (
        ("mxfp8", "max:7"),
        ("mxfp4", "ceil"),
        ("int8", "msms:int8"),
        ("mxfp4_dualscale", "x"),
    ):
        with pytest.raises(UsageError, match=f"scale rule '{rule}'"):
            ops.quantize_activation(tokens_of(2, 64), scheme, rule=rule)


@pytest.mark.parametrize(("chip", "n", "k"), [("a2", 256, 512), ("a3", 512, 8960), ("a5", 100, 8960)])
def test_int8_in_tiles_pads_only_where_the_chip_needs_it(chip, n, k):
    ops = bind(f"twin:{chip}").quantized
    encoded, bias = weight_of("int8_block", n, k)
    weight = ops.prepare_weight(*on_disk(encoded, bias), "int8_block")
    shares = weight.qdata.untyped_storage().data_ptr() == encoded.qdata.untyped_storage().data_ptr()
    assert shares == (chip == "a5" or k == 512)
    assert tuple(weight.qdata.shape) == (k if chip == "a5" else -(-k // 512) * 512, n)


def test_int8_in_tiles_takes_bfloat16_alone():
    with pytest.raises(UsageError, match="an activation in torch.float16 for int8_block"):
        bind("twin:a5").quantized.quantize_activation(torch.randn(4, 64).half(), "int8_block")


def test_float32_tokens_are_refused():
    with pytest.raises(UsageError, match="an activation in torch.float32 for int8") as e:
        bind("twin:a5").quantized.quantize_activation(torch.randn(4, 64), "int8")
    assert e.value.fix == "--set dtype=bfloat16"


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp4_dualscale"])
def test_shapes_that_no_fp4_matmul_takes(scheme):
    ops = bind("twin:a5").quantized
    with Recorder() as seen:
        for n, k in ((16, 2), (1, 64)):
            encoded, bias = weight_of(scheme, n, k)
            with pytest.raises(UsageError, match=f"a weight of N = {n} and K = {k} in {scheme}") as e:
                ops.prepare_weight(*on_disk(encoded, bias), scheme)
            assert e.value.code == "E-QNT-01" and "an even K above 2" in e.value.needs
    assert not any("npu" in name for name in seen.launched)
    qdata, scale = torch.zeros(16, 33, dtype=torch.uint8), torch.zeros(16, 3, dtype=torch.uint8)
    dual = torch.ones(16, 1, 1) if "dual" in scheme else None
    with pytest.raises(UsageError, match="N = 16 and K = 65"):
        ops.prepare_weight(qdata, scale, dual, None, scheme, width=65)
    mxfp8, _ = weight_of("mxfp8", 16, 65)  # a short last block is fine
    ops.prepare_weight(*on_disk(mxfp8, None), "mxfp8")


def test_w4a8_wants_eights():
    ops, x = bind("twin:a5").quantized, tokens_of(2, 68)
    with Recorder() as seen, pytest.raises(UsageError, match="K = 68 in w4a8") as e:
        ops.quantize_activation(x, "w4a8")
    assert e.value.code == "E-QNT-01" and e.value.needs.startswith("a multiple of 8") and not seen.launched
    ops.quantize_activation(x, "mxfp4")


def test_tokens_and_weight_belong_together():
    ops = bind("twin:a5").quantized
    weight = ops.prepare_weight(*on_disk(*weight_of("mxfp8", 16, 64)), "mxfp8")
    for scheme, k in (("mxfp4", 64), ("mxfp8", 96), ("w4a8", 64)):
        with pytest.raises(UsageError, match=rf"K = {k} in {scheme} with a weight \(16, 64\) in mxfp8"):
            ops.quantized_linear(ops.quantize_activation(tokens_of(2, k), scheme), weight)


def test_nz_is_for_schemes_that_leave_a_choice():
    """Of fp8 no document says that FRACTAL_NZ is read; the dual-scale matmul reads nothing else."""
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
