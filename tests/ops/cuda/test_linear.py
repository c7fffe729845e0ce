"""Quantized linear layers for CUDA: on a CPU with stand-ins for the GPU's matmuls, and on a GPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from ops.cuda.stand_ins import dequantized, scaled
from ops.layers import activation_of, exact, on_disk, weight_of

from ascendit import mx
from ascendit.device.device import parse_device
from ascendit.errors import UsageError
from ascendit.kernels.kernel import QuantLinearKernel, Wish
from ascendit.ops import select as selection
from ascendit.ops.cuda import linear, matmul, triton_linear
from ascendit.ops.cuda.linear import CudaCard, candidates, problem_of_kernel, with_trials
from ascendit.ops.cuda.steps import PLAIN, fake_quantize, split_bias, width_of
from ascendit.ops.operators import Schemes, bind
from ascendit.ops.select import select
from ascendit.quant.schemes import LINEAR_SCHEMES

CPU, HOST = parse_device("cpu"), torch.device("cpu")
IMPLEMENTATIONS = [
    pytest.param(
        make(PLAIN, once=once), scheme, id=f"{make.__name__}-{scheme}-{'once' if once else 'on-use'}"
    )
    for make in (scaled, dequantized)
    for scheme in LINEAR_SCHEMES
    for once in (False, True)
    if scheme != "int8_block" and (make is dequantized or scheme != "mxfp4_dualscale")
]


@pytest.fixture
def schemes_of(monkeypatch):
    """`schemes_of(implementation)`: `Schemes` of a device with only the kernels of `implementation`."""

    def schemes(implementation) -> Schemes:
        listed = [implementation.kernel(scheme, "native: by a stand-in") for scheme in LINEAR_SCHEMES]
        monkeypatch.setattr(selection, "kernels_of", lambda device, wish: listed)
        return Schemes(CPU)

    return schemes


@pytest.mark.parametrize(("n", "k"), [(24, 544), (20, 96), (48, 64)])
@pytest.mark.parametrize(("implementation", "scheme"), IMPLEMENTATIONS)
def test_float32_outputs_equal_float64_up_to_summation_order(schemes_of, implementation, scheme, n, k):
    ops, (encoded, bias) = schemes_of(implementation), weight_of(scheme, n, k)
    x = activation_of(5, k, torch.float32)
    weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
    out = ops.quantized_linear(ops.quantize_activation(x, scheme), weight)
    expected = exact(x, scheme, encoded, bias)
    assert out.shape == (2, 5, n) and out.dtype == torch.float32
    assert float((out - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("implementation", "scheme"), IMPLEMENTATIONS)
def test_sum_and_bias_are_rounded_once(schemes_of, implementation, scheme, dtype):
    ops, (encoded, bias) = schemes_of(implementation), weight_of(scheme, 24, 544)
    x = activation_of(40, 544, dtype)
    weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
    out = ops.quantized_linear(ops.quantize_activation(x, scheme), weight)
    expected = exact(x, scheme, encoded, bias).to(dtype)
    assert out.dtype == dtype
    assert float((out != expected).float().mean()) < 5e-3  # near ties; 0.1 if rounded twice
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(("implementation", "scheme"), IMPLEMENTATIONS)
def test_no_bias_mul_scale_and_another_rule(schemes_of, implementation, scheme):
    ops, (encoded, _) = schemes_of(implementation), weight_of(scheme, 24, 96, bias=False)
    x, mul_scale = activation_of(5, 96, torch.float32), torch.rand(96) + 0.1
    rule = {"mxfp8": "floor", "w4a8": "floor", "mxfp4": "max:7"}.get(scheme)
    a = ops.quantize_activation(x, scheme, mul_scale, rule)
    out = ops.quantized_linear(a, ops.prepare_weight(*on_disk(encoded, None), scheme))
    expected = exact(x * mul_scale, scheme, encoded, None, rule)
    assert float((out - expected).norm() / expected.norm()) < 2e-6
    with pytest.raises(UsageError, match="scale rule 'upward'"):
        ops.quantize_activation(x, scheme, rule="upward")


@pytest.mark.parametrize(("n", "k"), [(24, 544), (20, 40)])
@pytest.mark.parametrize(("implementation", "scheme"), IMPLEMENTATIONS)
def test_stored_weights_are_recovered_and_small(schemes_of, implementation, scheme, n, k):
    ops, (encoded, bias) = schemes_of(implementation), weight_of(scheme, n, k)
    weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
    back = ops.stored(weight)
    assert back.qdata.dtype == encoded.qdata.dtype and back.shape == encoded.shape
    assert torch.equal(back.qdata.view(torch.uint8), encoded.qdata.view(torch.uint8))
    assert torch.equal(back.scale, encoded.scale)
    for actual, expected in ((weight.bias, bias), (back.dual_scale, encoded.dual_scale)):
        assert (actual is None) == (expected is None)
        assert actual is None or expected is None or torch.equal(actual, expected)
    if implementation.once and weight.decoded is None:
        assert isinstance(implementation, matmul.ScaledMatmul) and scheme in ("int8", "fp8", "mxfp8")
    if not implementation.once and isinstance(implementation, matmul.DequantizedMatmul):
        assert weight.decoded is None
        assert weight.nbytes == sum(t.nbytes for t in on_disk(encoded, bias) if t is not None)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 20, 40), (40, 24, 544), (150, 130, 256), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_in_tiles_is_exact_up_to_one_rounding(schemes_of, m, n, k, dtype):
    """On a CPU torch._int_mm accepts the padded sizes too."""
    ops, (encoded, bias) = schemes_of(matmul.TileMatmul()), weight_of("int8_block", n, k)
    x = activation_of(m, k, dtype)
    weight = ops.prepare_weight(*on_disk(encoded, bias), "int8_block")
    a = ops.quantize_activation(x, "int8_block")
    assert bias is not None
    out, total = ops.quantized_linear(a, weight), bias.double().expand(2 * m, n)
    for i in range(a.scale.shape[1]):
        block = slice(128 * i, 128 * i + 128)
        rows, channels = (s[:, i].double().repeat_interleave(128) for s in (a.scale, encoded.scale))
        sums = a.qdata[:, block].double() @ encoded.qdata[:, block].double().t()
        total = total + sums * rows[: 2 * m, None] * channels[:n]
    assert torch.equal(out, total.float().to(dtype).view(2, m, n))
    assert torch.equal(ops.stored(weight).qdata, encoded.qdata)


def test_a_weight_for_a_gpu_matmul_is_as_small_as_its_stored_tensors():
    for scheme, bits in (("int8", 8), ("mxfp8", 8.25), ("mxfp4", 4.25)):
        encoded, _ = weight_of(scheme, 256, 1024, bias=False)
        weight = scaled(PLAIN).prepare_weight(encoded, None, HOST)
        assert weight.nbytes <= 256 * 1024 * bits / 8 + 4 * 256


@pytest.mark.parametrize("scheme", ["int8", "mxfp8", "mxfp4", "mxfp4_dualscale"])
def test_long_inputs_are_computed_in_chunks(monkeypatch, scheme):
    monkeypatch.setattr(matmul, "CHUNK_BYTES", 1)
    assert list(matmul.row_chunks(300, 8)) == [slice(0, 256), slice(256, 300)]
    encoded, bias = weight_of(scheme, 24, 64)
    x = activation_of(150, 64, torch.float32)
    implementations: list[Any] = [dequantized(PLAIN), scaled(PLAIN)]
    for implementation in implementations[:1] if "dual" in scheme else implementations:
        weight = implementation.prepare_weight(encoded, bias, HOST)
        out = implementation.quantized_linear(implementation.quantize_activation(x, scheme), weight)
        expected = exact(x, scheme, encoded, bias)
        assert float((out - expected).norm() / expected.norm()) < 2e-6


def test_three_bfloat16_parts_sum_to_the_bias():
    bias = torch.cat([torch.randn(100) * 10.0**e for e in (-6, 0, 6)])
    parts = split_bias(bias)
    assert parts.dtype == torch.bfloat16 and torch.equal(parts.double().sum(1).float(), bias)
    values, outer = fake_quantize(torch.ones(2, 100), "mxfp8", "ceil", None)
    assert width_of(100) == 128 and outer is None
    assert values[0].tolist() == [1.0] * 103 + [0.0] * 25


def test_the_setting_for_bfloat16_sums_is_restored():
    cuda = torch.backends.cuda.matmul
    before = cuda.allow_bf16_reduced_precision_reduction
    a, b = torch.randn(4, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    torch.testing.assert_close(
        matmul.bf16_product(a, b).float(), a.float() @ b.float().t(), rtol=0.01, atol=0.1
    )
    assert cuda.allow_bf16_reduced_precision_reduction == before


def test_gpu_matmul_calls_match_pytorchs_signatures():
    """On meta tensors: names, arguments and dtypes; nothing is computed."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    f8, tiles = torch.float8_e4m3fn, [meta(512, dtype=torch.uint8) for _ in range(2)]
    outputs = {
        "int8": matmul.int8_product(meta(40, 64, dtype=torch.int8), meta(32, 64, dtype=torch.int8)),
        "fp8": matmul.fp8_product(meta(40, 64, dtype=f8), meta(32, 64, dtype=f8)),
        "float32": matmul.float32_product(meta(40, 64), meta(32, 64)),
        "bf16": matmul.bf16_product(meta(40, 64), meta(32, 64)),
    }
    if hasattr(torch.nn.functional, "scaled_mm"):
        outputs["mxfp8"] = matmul.mxfp8_product(meta(40, 64, dtype=f8), meta(32, 64, dtype=f8), *tiles)
    assert {tuple(out.shape) for out in outputs.values()} == {(40, 32)}
    dtypes = {"int8": torch.int32, "bf16": torch.bfloat16}
    assert all(out.dtype == dtypes.get(name, torch.float32) for name, out in outputs.items())


# ---- kernels by GPU -----------------------------------------------------------------------------


def reasons(capability, emulate=None, *, triton=True, scaled_mm=True, hip=False) -> dict[str, list[str]]:
    card = CudaCard("a card", capability, scaled_mm, hip)
    kernels = candidates(
        card, emulate, PLAIN if triton else None, "3.9" if triton else "Triton is not installed"
    )
    listed: dict[str, list[str]] = {}
    for kernel in kernels:
        listed.setdefault(kernel.operator, []).append(kernel.reason)
    return listed


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ((8, 0), {"int8", "int8_block"}),
        ((8, 6), {"int8", "int8_block"}),
        ((8, 9), {"int8", "int8_block", "fp8"}),
        ((9, 0), {"int8", "int8_block", "fp8"}),
        ((10, 0), {"int8", "int8_block", "fp8", "mxfp8", "mxfp4"}),
        ((12, 0), {"int8", "int8_block", "fp8", "mxfp8", "mxfp4"}),
    ],
)
def test_native_schemes_by_capability(capability, native):
    listed = reasons(capability)
    assert set(listed) == {s.weight for s in LINEAR_SCHEMES.values()}
    assert {s for s, row in listed.items() if row[0].startswith("native: ")} == native
    assert all(row[-1].startswith("emulated: ") for row in listed.values())


def test_older_pytorch_amd_gpus_and_old_gpus():
    listed = reasons((10, 0), scaled_mm=False)
    assert {s for s, row in listed.items() if row[0].startswith("native: ")} == {"int8", "int8_block", "fp8"}
    assert all(row[0].startswith("emulated: ") for row in reasons((9, 4), hip=True).values())
    assert reasons((7, 5)) == {}


def test_reasons_name_the_method_and_the_library():
    assert reasons((9, 0))["mxfp8"][0] == "emulated: decoded to BF16 on each use by Triton 3.9"
    once = reasons((9, 0), "decode-once", triton=False)["mxfp8"]
    assert once == ["emulated: decoded once to BF16 by PyTorch, Triton is not installed"]
    assert reasons((9, 0))["int8"][0] == "native: torch._int_mm, other steps by Triton 3.9"


def kernel(reason: str) -> QuantLinearKernel:
    return dequantized(PLAIN).kernel("mxfp4", reason)


def test_a_kernel_that_is_wrong_on_this_gpu_is_skipped_and_named(monkeypatch):
    row = (kernel("native: scaled_mm"), kernel("emulated: by Triton"), kernel("emulated: by PyTorch"))
    tried = []

    def wrong(scheme, kernel):
        tried.append(scheme)
        return {row[0]: "RuntimeError: no such kernel", row[1]: "wrong results"}.get(kernel)

    listed = with_trials(row, wrong)
    monkeypatch.setattr(selection, "kernels_of", lambda device, wish: listed)
    assert tried == []  # a kernel is tried only when it is selected
    w4a8, mxfp4 = (select(scheme, CPU, Wish()) for scheme in ("w4a8", "mxfp4"))
    assert w4a8.call == mxfp4.call == row[2].call and w4a8.prepare == mxfp4.prepare == row[2].prepare
    assert (
        w4a8.reason
        == mxfp4.reason
        == ("emulated: by PyTorch; not scaled_mm: RuntimeError: no such kernel; not by Triton: wrong results")
    )
    assert tried == ["mxfp4", "w4a8"] * 3
    assert select("int8", CPU, Wish()).backend == "reference"
    assert [k.operator for k in listed] == ["mxfp4", "w4a8"] * 3
    listed = with_trials(row, lambda scheme, kernel: "broken")
    assert select("mxfp4", CPU, Wish()).backend == "reference"


@pytest.mark.parametrize("scheme", [s for s in LINEAR_SCHEMES if s != "int8_block"])
def test_the_trial_accepts_correct_kernels_and_detects_wrong_ones(scheme):
    good = dequantized(PLAIN)
    before = torch.get_rng_state()
    assert problem_of_kernel(scheme, good.kernel(scheme, ""), HOST) is None
    assert torch.equal(torch.get_rng_state(), before)
    shifted = matmul.DequantizedMatmul(PLAIN, False, lambda a, b: good.float32(a, b) * 1.01, good.bf16)
    assert "relative error" in str(problem_of_kernel(scheme, shifted.kernel(scheme, ""), HOST))

    def refuse(a, b):
        raise RuntimeError("no kernel for this card\nand more")

    broken = matmul.DequantizedMatmul(PLAIN, False, refuse, refuse)
    assert (
        problem_of_kernel(scheme, broken.kernel(scheme, ""), HOST) == "RuntimeError: no kernel for this card"
    )


def test_there_are_no_kernels_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert linear.list_kernels(parse_device("cuda"), None) == ()


# ---- on a GPU -----------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("emulate", [None, "decode-once"])
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_every_candidate_is_correct_on_a_gpu(scheme, emulate):
    device, fast = parse_device("cuda"), triton_linear.triton_steps()
    card = CudaCard.from_device(device)
    assert card is not None
    row = [k for k in candidates(card, emulate, *fast) if k.operator == LINEAR_SCHEMES[scheme].weight]
    wrong = {k.reason: p for k in row if (p := problem_of_kernel(scheme, k, torch.device(device.torch_name)))}
    assert wrong == {}


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("rows", [40, 1100])
@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
def test_the_bound_kernels_are_correct_on_a_gpu(scheme, rows, caplog):
    with caplog.at_level(logging.INFO, logger="ascendit"):
        ops = bind("cuda").quantized
        encoded, bias = weight_of(scheme, 200, 1056)
        x = activation_of(rows // 2, 1056)
        weight = ops.prepare_weight(*on_disk(encoded, bias), scheme)
        out = ops.quantized_linear(ops.quantize_activation(x.cuda(), scheme), weight)
    assert mx.sqnr(exact(x, scheme, encoded, bias).float(), out.cpu()) > 50
    assert f"linear layers in {scheme} on cuda -> cuda: " in caplog.text
    assert torch.equal(ops.stored(weight).qdata.cpu().view(torch.uint8), encoded.qdata.view(torch.uint8))
