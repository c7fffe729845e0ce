"""The twin and the CPU give the same bits: their operators on the same inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ascendit import mx
from ascendit.kernels import reference
from ascendit.kernels.cpu import attention, elementwise
from ascendit.kernels.kernel import in_dtype
from ascendit.ops.npu.elementwise import mindiesd_layer_norm
from ascendit.ops.npu.kernels import KERNELS
from ascendit.ops.operators import Ops, bind
from ascendit.quant.schemes import LINEAR_SCHEMES
from ascendit.twin import cpu_kernels

compiled = pytest.mark.skipif(
    not attention.list_kernels()[0].needs, reason="the C++ attention is not built on this machine"
)
EPS = 1e-6


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def cpu_and_twin() -> tuple[Ops, Ops]:
    return bind("cpu"), bind("twin:a5")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spans", [(37,), (5, 32)])
def test_modulation(batch: int, spans: tuple[int, ...]) -> None:
    x, y = bf16(batch, 37, 192), bf16(batch, 37, 192)
    scale, shift, gate = torch.randn(3, len(spans), 192)
    results = []
    for ops in cpu_and_twin():
        rows = ops.prepare("adaln", scale, shift, dtype=x.dtype)
        (gates,) = ops.prepare("gated_residual", gate, dtype=x.dtype)
        results.append((ops.adaln(x, *rows, spans, EPS), ops.gated_residual(x, y, gates, spans)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], bind("cpu").adaln(x, scale, shift, spans, EPS))  # with float32 rows


@pytest.mark.parametrize("batch", [1, 2])
def test_norms_rotation_and_gelu(batch: int) -> None:
    x, weight, angle = bf16(batch, 37, 192), torch.rand(192), torch.rand(37, 32) * 7
    for dtype in (torch.bfloat16, torch.float32):
        hidden, results = x.to(dtype), []
        for ops in cpu_and_twin():
            table = ops.prepare("rope", angle.cos(), angle.sin(), dtype=dtype)
            rotated = ops.rope(hidden.unflatten(2, (3, 64)), *table)
            norms = ops.rms_norm(hidden, weight, EPS), ops.layer_norm(hidden, weight, weight, 1e-5)
            results.append((*norms, rotated, ops.gelu_tanh(hidden), ops.gelu(hidden)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert torch.equal(mindiesd_layer_norm(hidden, weight, weight, 1e-5), results[0][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_every_dtype_that_a_chip_supports(dtype: torch.dtype) -> None:
    x, weight = bf16(2, 5, 64).to(dtype), torch.rand(64)
    scale, shift = bf16(2, 2, 1, 64).to(dtype).unbind()
    samples = [
        reference.adaln(x[i : i + 1].float(), scale[i].float(), shift[i].float(), (5,), EPS) for i in (0, 1)
    ]
    for actual, expected in (
        (cpu_kernels.adaln(x, scale, shift, EPS), torch.cat(samples)),
        (cpu_kernels.rms_norm(x, weight, EPS), reference.rms_norm(x.float(), weight, EPS)),
        (cpu_kernels.layer_norm(x, weight, None, EPS), reference.layer_norm(x.float(), weight, None, EPS)),
        (cpu_kernels.gelu(x, "tanh"), reference.gelu_tanh(x.float())),
        (cpu_kernels.gelu(x, "none"), reference.gelu(x.float())),
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.float(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


@compiled
@pytest.mark.parametrize("kernel", [k.call for k in KERNELS if k.name in ("fusion", "fused_infer")])
@pytest.mark.parametrize("batch", [1, 2])
def test_attention(kernel: Any, batch: int) -> None:
    whole = bf16(batch, 90, 3, 4, 64)
    q, k, v = whole[:, :, 0], whole[:, :, 1], whole[:, :, 2]
    assert torch.equal(kernel(q, k, v), bind("cpu").attention(q, k, v))


def test_other_attention_is_computed_in_float32() -> None:
    q, k = bf16(1, 4, 9, 64), bf16(1, 2, 9, 64)
    assert not cpu_kernels.can_attend(q, k, k, 0.125)  # two query heads per key head
    assert not cpu_kernels.can_attend(k, k, k, 1.0)
    assert not cpu_kernels.can_attend(k.half(), k.half(), k.half(), 0.125)
    assert not cpu_kernels.can_attend(k[..., :20], k[..., :20], k[..., :20], 20**-0.5)
    assert cpu_kernels.can_attend(k.float(), k.float(), k.float(), 0.125)


@pytest.mark.parametrize("scheme", list(LINEAR_SCHEMES))
@pytest.mark.parametrize("k", [192, 1024, 1056])
def test_quantized_linear_layers(scheme: str, k: int) -> None:
    x, w, bias = bf16(1, 50, k), bf16(100, k), torch.randn(100).bfloat16().float()
    e = mx.encode(w, LINEAR_SCHEMES[scheme].weight)
    results = []
    for ops in (o.quantized for o in cpu_and_twin()):
        weight = ops.prepare_weight(e.qdata, e.scale, e.dual_scale, bias, scheme)
        results.append(ops.quantized_linear(ops.quantize_activation(x, scheme), weight))
    assert torch.equal(*results)


def test_a_weight_in_fractal_nz_gives_the_same_output() -> None:
    x, e = bf16(1, 50, 192), mx.encode(bf16(96, 192), "mxfp4")
    results = []
    for ops, nz in zip((o.quantized for o in cpu_and_twin()), (False, True), strict=True):
        weight = ops.prepare_weight(e.qdata, e.scale, None, None, "mxfp4", nz=nz)
        results.append(ops.quantized_linear(ops.quantize_activation(x, "mxfp4"), weight))
    assert torch.equal(*results)


def test_an_npu_and_a_cpu_cast_the_same_rows() -> None:
    rounded = {k.operator for k in KERNELS if k.prepare is in_dtype}
    assert rounded == {k.operator for k in elementwise.list_kernels() if k.prepare is in_dtype}
