"""Quantized linear kernels on a CPU against float64 and the reference, compiled and in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from ops.layers import activation_of, exact, on_disk, weight_of
from torch import Tensor

from ascendit import mx
from ascendit.device.device import parse_device
from ascendit.errors import UsageError
from ascendit.kernels import reference
from ascendit.kernels.cpu import linear as cpu_linear
from ascendit.kernels.kernel import Emulate, PreparedWeight, Wish
from ascendit.mx.codec import Encoded
from ascendit.mx.smoothing import smooth_input
from ascendit.native.build import Built
from ascendit.ops.operators import Schemes, bind
from ascendit.quant.schemes import LINEAR_SCHEMES

CPU = parse_device("cpu")
EMULATE: tuple[Emulate | None, ...] = (None, "decode-once")
SHAPES = [  # M of each of two samples, N, K
    (1, 64, 32),
    (3, 24, 544),
    (4, 130, 1056),
    (50, 65, 96),
    (1, 1, 2080),
    (7, 200, 512),
]


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, or without a compiler."""
    if request.param == "plain":
        monkeypatch.setattr(cpu_linear, "library", lambda: Built(None, "no C++ compiler"))
    elif cpu_linear.library().library is None:
        pytest.skip(f"no compiled linear layers here: {cpu_linear.library().reason}")
    return str(request.param)


@pytest.fixture
def compiled() -> None:
    if cpu_linear.library().library is None:
        pytest.skip(f"no compiled linear layers here: {cpu_linear.library().reason}")


def schemes(emulate=None) -> Schemes:
    return Schemes(CPU, Wish(emulate=emulate))


def rounded_once(out: Tensor, expected: Tensor, terms: Tensor) -> bool:
    """Within half a bfloat16 step of float64, plus the error of float32 sums of these `terms`."""
    step = 2.0 ** (expected.abs().clamp(min=1e-30).log2().floor() - 7)
    return bool(((out - expected).abs() <= step / 2 * 1.0001 + 2e-6 * terms).all())


def terms_of(x: Tensor, scheme: str, encoded: Encoded, bias: Tensor | None) -> Tensor:
    """Sums of the magnitudes of the products, [.., N]."""
    row = LINEAR_SCHEMES[scheme]
    activation = mx.decode(mx.encode(x.flatten(0, -2), row.activation, scale_rule=row.rule))
    total = activation.abs() @ mx.decode(encoded).abs().t()
    return (total if bias is None else total + bias.abs()).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_bfloat16_outputs_are_rounded_once(way, scheme, m, n, k, emulate):
    ops = schemes(emulate)
    x = activation_of(m, k)
    encoded, bias = weight_of(scheme, n, k, bias=n % 5 != 0)
    weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
    out = ops.quantized_linear(ops.quantize_activation(x, scheme), weight)
    expected = exact(x, scheme, encoded, bias)
    assert out.dtype == torch.bfloat16 and out.shape == (2, m, n)
    assert float((out - expected).norm() / expected.norm()) < 2e-3 or n * m == 1
    assert rounded_once(out, expected, terms_of(x, scheme, encoded, bias))


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_float32_and_float16_inputs_are_not_rounded_to_bfloat16(way, scheme, dtype, emulate):
    ops = schemes(emulate)
    encoded, bias = weight_of(scheme, 72, 1056)
    weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
    x = activation_of(5, 1056, dtype)
    out = ops.quantized_linear(ops.quantize_activation(x, scheme), weight)
    expected = exact(x, scheme, encoded, bias)
    assert out.dtype == dtype
    assert float((out - expected).norm() / expected.norm()) < (2e-6 if dtype == torch.float32 else 4e-4)


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_with_mul_scale_and_another_rule(way, scheme, emulate):
    ops, plain_ops = schemes(emulate), Schemes(CPU, Wish(reference=True))
    encoded, bias = weight_of(scheme, 66, 96)
    x, mul_scale = activation_of(3, 96), torch.rand(96) + 0.1
    rule = "floor" if LINEAR_SCHEMES[scheme].activation.startswith("mx") else None
    a = ops.quantize_activation(x, scheme, mul_scale, rule)
    expected = mx.encode(
        smooth_input(x, mul_scale).flatten(0, 1), LINEAR_SCHEMES[scheme].activation, scale_rule=rule
    )
    assert torch.equal(a.qdata.view(torch.uint8), expected.qdata.view(torch.uint8))
    assert torch.equal(a.scale, expected.scale)
    out = ops.quantized_linear(a, ops.prepare_weight(*on_disk(encoded, bias), scheme))
    oracle = plain_ops.quantized_linear(a, plain_ops.prepare_weight(*on_disk(encoded, bias), scheme))
    assert mx.sqnr(oracle, out) > 50


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_stored_weights_are_recovered_and_take_no_extra_memory(way, scheme, emulate):
    ops = schemes(emulate)
    encoded, bias = weight_of(scheme, 128, 1024)
    weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
    back = ops.stored(weight)
    for role in ("qdata", "scale", "dual_scale"):
        left, right = getattr(back, role), getattr(encoded, role)
        assert left is right is None or torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    small = sum(t.nbytes for t in on_disk(encoded, bias) if t is not None)
    to_float32 = way == "plain" and not cpu_linear.VARIANTS[scheme].bf16_exact
    element_size = 0 if scheme in cpu_linear.INT8_LINEARS else 4 if to_float32 else 2
    decoded = element_size * 128 * (1024 + 3) if emulate else 0
    assert back.format == encoded.format and weight.nbytes <= small + decoded
    if emulate and scheme == "mxfp8":
        assert weight.nbytes > 2 * small


@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_a_width_that_is_no_multiple_of_32(way, scheme):
    ops = schemes()
    for k in (33, 1, 100):
        rows = torch.randn(5, k).bfloat16()
        encoded = mx.encode(rows, LINEAR_SCHEMES[scheme].weight)
        weight = ops.prepare_weight(*on_disk(encoded, None), scheme, width=k)
        x = activation_of(3, k)
        out = ops.quantized_linear(ops.quantize_activation(x, scheme), weight)
        assert rounded_once(out, exact(x, scheme, encoded, None), terms_of(x, scheme, encoded, None))


def test_w4a8_and_w4a4_share_a_weight(way):
    for emulate in EMULATE:
        ops = schemes(emulate)
        assert ops.kernel("w4a8").prepare is ops.kernel("mxfp4").prepare
        encoded, bias = weight_of("mxfp4", 70, 160)
        weight = ops.prepare_weight(*on_disk(encoded, bias), "w4a8")
        x = activation_of(9, 160)
        for scheme in ("mxfp4", "w4a8"):
            out = ops.quantized_linear(ops.quantize_activation(x, scheme), weight)
            assert mx.sqnr(exact(x, scheme, encoded, bias).float(), out) > 50


# ---- extreme values -----------------------------------------------------------------------------


def output_and_reference(
    scheme: str, x: Tensor, rows: Tensor, bias: Tensor | None = None, emulate=None
) -> tuple[Tensor, Tensor]:
    """Output of the CPU kernel, and of the reference."""
    encoded = mx.encode(rows, LINEAR_SCHEMES[scheme].weight)
    outs = []
    for ops in (schemes(emulate), Schemes(CPU, Wish(reference=True))):
        weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
        outs.append(ops.quantized_linear(ops.quantize_activation(x, scheme), weight))
    return outs[0], outs[1]


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "w4a8"])
@pytest.mark.parametrize(("small", "large"), [(1e-38, 1e36), (1e36, 1e-38), (1e38, 1e-30), (1e-30, 1e38)])
def test_the_smallest_and_the_largest_values(way, scheme, small, large, emulate):
    x, rows = (torch.randn(4, 64).clamp(-1, 1) * small).bfloat16(), (torch.randn(9, 64) * large).bfloat16()
    out, expected = output_and_reference(scheme, x, rows.clamp(-1.5e38, 1.5e38), emulate=emulate)
    assert expected.float().abs().max() > 0
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=float(expected.float().abs().max()) * 1e-5)


@pytest.mark.parametrize("emulate", EMULATE)
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_nan_and_infinity_affect_only_their_row(way, scheme, emulate):
    x, rows = activation_of(3, 1056)[0], torch.randn(66, 1056).bfloat16()
    x[0, 700], x[2, 5] = torch.nan, torch.inf
    out, expected = output_and_reference(scheme, x, rows, torch.randn(66), emulate)
    shared = scheme == "int8_block"  # the three rows share their scales
    assert out[0].isnan().all() and out[2].isnan().all() and bool(out[1].isfinite().all()) != shared
    assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_zeros(way, scheme):
    x, rows, bias = torch.zeros(2, 64).bfloat16(), torch.randn(5, 64).bfloat16(), torch.randn(5)
    out, _ = output_and_reference(scheme, x, rows, bias)
    assert torch.equal(out, bias.bfloat16().expand(2, 5))
    out, _ = output_and_reference(scheme, torch.randn(2, 64).bfloat16(), rows * 0, bias)
    assert torch.equal(out, bias.bfloat16().expand(2, 5))


def test_int8_sums_are_exact_at_their_largest(way):
    """Every product has the same sign, so that the sum has its largest magnitude."""
    ops = schemes()
    qdata = torch.full((3, 1 << 16), -128, dtype=torch.int8)
    qdata[1], qdata[2, ::2] = 127, 127
    scale = torch.ones(3, 1)
    weight = ops.prepare_weight(qdata, scale, None, None, "int8")
    x = torch.full((2, 1 << 16), 127.0)
    x[1].neg_()
    out = ops.quantized_linear(ops.quantize_activation(x, "int8"), weight)
    assert torch.equal(out, (x.double() @ qdata.double().t()).float())


# ---- shapes, threads, selection -----------------------------------------------------------------


def test_leading_axes_and_views(way):
    ops = schemes()
    encoded, bias = weight_of("mxfp8", 24, 64)
    weight = ops.prepare_weight(*on_disk(encoded, bias), "mxfp8")
    whole = torch.randn(4, 3, 2, 128).bfloat16()

    def run(x: Tensor) -> Tensor:
        return ops.quantized_linear(ops.quantize_activation(x, "mxfp8"), weight)

    view = whole.transpose(0, 2)[..., 32:96]
    assert not view.is_contiguous()
    assert torch.equal(run(view), run(view.contiguous())) and run(view).shape == (2, 3, 4, 24)
    assert torch.equal(run(view[0, 0, 0]), run(view)[0, 0, 0]) and run(view[:, :0]).shape == (2, 0, 4, 24)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_inputs_longer_than_a_chunk_on_any_number_of_threads(scheme):
    ops = schemes()
    encoded, bias = weight_of(scheme, 70, 96)
    weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
    x = activation_of(cpu_linear.CHUNK // 2 + 50, 96).flatten(0, 1)
    torch.set_num_threads(2)
    whole = ops.quantized_linear(ops.quantize_activation(x, scheme), weight)
    torch.set_num_threads(1)
    pieces = [ops.quantized_linear(ops.quantize_activation(p, scheme), weight) for p in x.split(512)]
    assert torch.equal(whole, torch.cat(pieces))
    terms = terms_of(x, scheme, encoded, bias)
    assert rounded_once(whole, exact(x, scheme, encoded, bias), terms)


def test_the_reason_names_the_implementation_of_each_scheme(way):
    for emulate in EMULATE:
        decoding = "once" if emulate else "on each use"
        kernels = {k.operator: k for k in cpu_linear.list_kernels(emulate)}
        assert list(kernels) == list(LINEAR_SCHEMES)
        dots = [scheme for scheme, variant in cpu_linear.VARIANTS.items() if variant.int8_dot]
        native = dots if way == "compiled" else cpu_linear.INT8_LINEARS
        for scheme, kernel in kernels.items():
            start = "native: " if scheme in native else "emulated: decoded"
            assert kernel.reason.startswith(start), scheme
            if way == "plain" and scheme in ("fp8", "mxfp4_dualscale"):
                assert "float32" in kernel.reason
        assert decoding in kernels["mxfp8"].reason
        suffix = "no C++ compiler" if way == "plain" else "compiled from native/linear.cpp"
        assert all(k.reason.endswith(suffix) for k in kernels.values())


def test_a_scheme_that_is_not_compiled_runs_in_pytorch(way, monkeypatch):
    monkeypatch.setattr(cpu_linear, "VARIANTS", {k: v for k, v in cpu_linear.VARIANTS.items() if k != "fp8"})
    kernels = {kernel.operator: kernel for kernel in cpu_linear.list_kernels(None)}
    assert kernels.keys() == LINEAR_SCHEMES.keys()
    assert "decoded on each use to float32 by PyTorch" in kernels["fp8"].reason


def test_without_bf16_matmul_float32_is_used_and_decoded_once_on_request(monkeypatch):
    monkeypatch.setattr(cpu_linear, "library", lambda: Built(None, "no C++ compiler"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    encoded, bias = weight_of("mxfp8", 24, 64)
    x = activation_of(5, 64)
    for emulate in EMULATE:
        ops = schemes(emulate)
        assert "float32" in ops.kernel("mxfp8").reason
        weight = ops.prepare_weight(*on_disk(encoded, bias), "mxfp8")
        assert (weight.decoded is not None) == (emulate == "decode-once")
        out = ops.quantized_linear(ops.quantize_activation(x, "mxfp8"), weight)
        assert rounded_once(out, exact(x, "mxfp8", encoded, bias), terms_of(x, "mxfp8", encoded, bias))


@pytest.mark.usefixtures("compiled")
def test_compiled_kernels_are_bound_and_called(monkeypatch):
    """The PyTorch path would give the same numbers, so it must not be called."""
    for module, name in ((cpu_linear, "torch_linear"), (reference, "quantized_linear")):
        monkeypatch.setattr(module, name, lambda *a: pytest.fail("called the PyTorch path"))
    ops = bind("cpu").quantized
    for scheme in LINEAR_SCHEMES:
        assert ops.kernel(scheme).backend == "cpu"
        encoded, bias = weight_of(scheme, 40, 64)
        weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
        assert (
            ops.quantized_linear(ops.quantize_activation(activation_of(2, 64), scheme), weight)
            .isfinite()
            .all()
        )
    assert bind("cpu", "reference").quantized.kernel("mxfp8").backend == "reference"


def test_a_weight_of_another_scheme_is_refused():
    ops = schemes()
    encoded, bias = weight_of("mxfp8", 8, 64)
    weight = ops.prepare_weight(*on_disk(encoded, bias), "mxfp8")
    with pytest.raises(UsageError) as e:
        ops.quantized_linear(ops.quantize_activation(activation_of(2, 64), "int8"), weight)
    assert e.value.code == "E-USE-01" and "int8" in e.value.got


def test_the_reference_takes_the_same_weights():
    """A decoded weight in tiles is not read as rows."""
    encoded, bias = weight_of("mxfp8", 24, 64)
    weight = schemes("decode-once").prepare_weight(*on_disk(encoded, bias), "mxfp8")
    assert isinstance(weight, PreparedWeight) and reference.stored(weight).shape == (24, 64)
