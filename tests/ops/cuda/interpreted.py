"""The Triton kernels on a CPU, in Triton's interpreter: TRITON_INTERPRET=1 python interpreted.py activations.

`test_triton_kernels.py` runs each check in its own process, since the variable must be set before Triton is
imported.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from ops.cuda.stand_ins import dequantized, scaled
from ops.layers import activation_of, exact, weight_of
from torch import Tensor

from ascendit import mx
from ascendit.kernels import quantized_attention as definition
from ascendit.kernels import reference
from ascendit.mx.formats import lookup
from ascendit.ops.cuda import kernels, matmul, quantized_attention, steps, triton_linear
from ascendit.quant.schemes import LINEAR_SCHEMES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RULES = {
    "mxfp8": ("ceil", "floor", "pow2", "even", "msms:minmax"),
    "mxfp4": ("floor", "max:7", "max:6.5", "ceil"),
    "mxfp4_dualscale": ("floor",),
    "int8": ("amax",),
    "fp8": ("amax",),
}


def same(actual: Tensor | None, expected: Tensor | None) -> None:
    """Equal bit for bit, with the sign of zero; the sign of NaN is ignored."""
    if actual is None or expected is None:
        assert actual is expected
        return
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.dtype.is_floating_point:
        a, b = actual.float(), expected.float()
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(), b.nan_to_num()
        assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
    else:
        assert torch.equal(actual, expected)


def hard_activation(k: int, dtype: torch.dtype) -> Tensor:
    """Rows of many magnitudes, zeros, ties, an infinity and a NaN.

    No row is entirely subnormal in bfloat16: the interpreter casts those wrongly, a GPU does not.
    """
    top = 4 if dtype == torch.float16 else 30
    x = (torch.randn(7, k) * torch.logspace(-top, top, 7)[:, None]).to(dtype)
    x[0, 3], x[1] = 0, 0
    x[2, : k // 2] = (torch.arange(k // 2) * 0.25).to(dtype)
    x[3, 5], x[4, 9] = float("inf"), float("nan")
    x[5, 1] = torch.finfo(dtype).max
    x[6, 2] = torch.finfo(dtype).tiny / 4
    return x


def activations() -> None:
    """Values, elements, scales and output factors equal those of `mx`, bit for bit."""
    for dtype in DTYPES:
        for k, mul_scale in ((544, None), (96, torch.rand(96) + 0.1)):
            x = hard_activation(k, dtype)
            for format, rules in RULES.items():
                for rule in rules if dtype == torch.bfloat16 else rules[:1]:
                    for actual, expected in zip(
                        triton_linear.fake_quantize(x, format, rule, mul_scale),
                        steps.fake_quantize(x, format, rule, mul_scale),
                        strict=True,
                    ):
                        same(actual, expected)
                    if format != "mxfp4_dualscale":
                        qdata = triton_linear.quantize(x, format, rule, mul_scale)
                        for actual, expected in zip(
                            qdata, steps.quantize(x, format, rule, mul_scale), strict=True
                        ):
                            same(actual, expected)


def strided() -> None:
    """Activations that are columns of a wider tensor, transposed, or empty."""
    x = torch.randn(5, 300).bfloat16()
    for format in ("mxfp8", "int8"):
        rule = lookup(format).default_rule
        for view in (x[:, 64:160], x[:, :96].t().contiguous().t(), x[:0, :64]):
            same(
                triton_linear.fake_quantize(view, format, rule, None)[0],
                steps.fake_quantize(view, format, rule, None)[0],
            )


def weights() -> None:
    """Weights and the appended bias decode bit for bit: every bit pattern, and scales of many magnitudes."""
    bias = torch.randn(20) * 3
    for format in RULES:
        for k in (544, 33, 64):
            w = (torch.randn(20, k) * torch.logspace(-30, 30, 20)[:, None]).bfloat16()
            encoded = mx.encode(w, format)
            same(triton_linear.decode_weight(encoded, bias), steps.decode_weight(encoded, bias))
    patterns = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scale = torch.full((1, 8), 127, dtype=torch.uint8)
    encoded = mx.Encoded(patterns.view(torch.float8_e4m3fn), scale, None, "mxfp8", -1, (1, 256))
    same(triton_linear.decode_weight(encoded, None), steps.decode_weight(encoded, None))


def products() -> None:
    """Decoding and matmul in one kernel equal float64 up to summation order, for each tile."""
    for format in ("mxfp8", "mxfp4", "mxfp4_dualscale"):
        for m, n, k in ((19, 20, 1088), (16, 16, 64), (40, 33, 96)):
            encoded = mx.encode(torch.randn(n, k), format)
            x, bias = torch.randn(m, k), torch.randn(n) if m != 16 else None
            values, outer = steps.fake_quantize(x, format, lookup(format).default_rule, None)
            expected = mx.decode(mx.encode(x, format)).double() @ mx.decode(encoded).double().t()
            expected = expected if bias is None else expected + bias
            for decoded in (None, steps.decode_weight(encoded, bias)):
                out = triton_linear.matmul(values, outer, encoded, decoded, bias, torch.float32)
                assert out.shape == (m, n)
                assert float((out - expected).norm() / expected.norm()) < 2e-6, (format, m, n, k)
                rounded = triton_linear.matmul(values, outer, encoded, decoded, bias, torch.bfloat16)
                same(rounded, out.to(torch.bfloat16))


def epilogues() -> None:
    """Sums times scales, plus the bias, rounded once."""
    for sums in (torch.randint(-(2**24), 2**24, (5, 32), dtype=torch.int32), torch.randn(5, 32) * 1e4):
        row, column, bias = torch.rand(5), torch.rand(30), torch.randn(30)
        for r, c, b in ((row, column, bias), (row, column, None), (None, None, bias), (None, None, None)):
            for dtype in DTYPES:
                actual, expected = (torch.empty(5, 30, dtype=dtype) for _ in range(2))
                triton_linear.finish(sums, r, c, b, actual)
                steps.finish(sums, r, c, b, expected)
                same(actual, expected)


def layers() -> None:
    """Complete layers with Triton steps, for each kind of matmul."""
    steps, _ = triton_linear.triton_steps()
    assert steps is not None
    for scheme in LINEAR_SCHEMES:
        k = 544 if scheme == "mxfp4_dualscale" else 96
        encoded, bias = weight_of(scheme, 20, k)
        matmuls: list[Any] = [dequantized(steps), dequantized(steps, once=True)]
        matmuls += [scaled(steps)] if scheme != "mxfp4_dualscale" else []
        for layer, m in itertools.product(matmuls, (4, 20)):
            x = activation_of(m, k, torch.float32)
            weight = layer.prepare_weight(encoded, bias, torch.device("cpu"))
            out = layer.quantized_linear(layer.quantize_activation(x, scheme), weight)
            expected = exact(x, scheme, encoded, bias)
            assert float((out - expected).norm() / expected.norm()) < 2e-6, scheme


def dense() -> None:
    """Dense operators equal `reference` up to one rounding, for views and batches too."""
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        for batch, spans in ((1, (9,)), (2, (2, 7))):
            joined = torch.randn(batch, 9, 3 * 192).to(dtype) * 3
            x, y, heads = joined.split(192, dim=-1)
            scale, shift, gate = torch.randn(3, len(spans), 192)
            angle = torch.rand(9, 16) * 6
            calls: dict[str, tuple[Any, ...]] = {
                "rms_norm": (x, scale[0], 1e-6),
                "layer_norm": (y, scale[0], shift[0], 1e-6),
                "adaln": (x, scale, shift, spans, 1e-6),
                "gated_residual": (x, y, gate, spans),
                "rope": (heads.unflatten(-1, (6, 32)), angle.cos(), angle.sin()),
            }
            for name, arguments in calls.items():
                actual, expected = getattr(kernels, name)(*arguments), getattr(reference, name)(*arguments)
                assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
                assert (
                    float((actual.double() - expected.double()).norm() / expected.double().norm()) < limit
                ), name
            unweighted = kernels.layer_norm(x, None, None, 1e-6)
            torch.testing.assert_close(
                unweighted, reference.layer_norm(x, None, None, 1e-6), rtol=0.01, atol=1e-5
            )
    assert not any(kernels.problem_of_operator(getattr(kernels, name), "cpu") for name in calls)


def heads(batch: int, queries: int, keys: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v bfloat16: views of a joined projection; rows of zeros, an outlier, and keys with a mean."""
    q = torch.randn(batch, queries, 3, 2, d)[:, :, 0]
    k, v = torch.randn(batch, keys, 3, 2, d)[:, :, 1:].unbind(2)
    q[:, 0], k[:, keys // 2] = 0, 0
    k[:, keys - 1, 1] *= 30
    return q.bfloat16(), (k + 2 * torch.randn(1, 1, 2, d)).bfloat16(), v.bfloat16()


def attention_rows() -> None:
    """Elements and scales of attention operands equal the definition, bit for bit."""
    for d, tokens in ((64, 5), (128, 300)):
        _, k, v = heads(2, 1, tokens, d)
        v[0, 0, 0, 0] = float("inf")
        for x, format, tile in itertools.product((k, v), ("int8", "fp8"), (1, 128, 256)):
            if format == "int8" and tile > 1:
                continue
            actual = quantized_attention.quantize(x, format, tile)
            expected = definition.quantize(x, format, (tile, None))
            same(actual.values.view(torch.uint8), expected.qdata.view(torch.uint8))
            same(actual.scale[..., None], expected.scale)
            if format == "fp8":
                values = quantized_attention.quantize(x, format, tile, values=True).values
                same(values, expected.qdata.to(torch.bfloat16))
        smooth, mean = definition.smooth_key(k)
        actual = quantized_attention.quantize(k, "int8", 1, mean=mean)
        same(actual.values, definition.quantize(smooth, "int8", (1, None)).qdata)


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """float64 attention of [B, S, H, d] and its log-sum-exp."""
    scores = torch.einsum("bshd,blhd->bhsl", q.double(), k.double()) * q.shape[3] ** -0.5
    out = torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v.double())
    return out, scores.logsumexp(-1)


def attention() -> None:
    """Attention with quantized scores against float64 on the dequantized operands, with log-sum-exp."""

    def unused(*args: object, **options: object) -> Tensor:
        raise AssertionError("the kernel supports these inputs")

    calls = {"qk_int8": quantized_attention.qk_int8}
    for scheme, fp8 in (("int8", True), ("fp8", True), ("fp8", False)):
        calls[f"{scheme} {fp8}"] = quantized_attention.quantized(scheme, fp8, unused)
    for batch, queries, keys, d in ((2, 37, 70, 64), (1, 5, 300, 128), (1, 33, 64, 64), (1, 1, 1, 128)):
        q, k, v = heads(batch, queries, keys, d)
        for name, call in calls.items():
            scheme = name.split()[0]
            smooth, mean = definition.smooth_key(k) if "int8" in name else (k, torch.zeros(1))
            a, b, c = definition.dequantized("int8" if scheme == "qk_int8" else scheme, q, smooth, v)
            expected, lse = exact_attention(a, b, v if scheme == "qk_int8" else c)
            lse = lse + (q.double() * mean).sum(-1).transpose(1, 2) * d**-0.5
            out, sums = call(q, k, v, return_lse=True)
            same(call(q, k, v), out)
            assert out.dtype == torch.bfloat16 and out.shape == q.shape and sums.dtype == torch.float32
            error = float((out.double() - expected).norm() / expected.norm())
            assert error < 4e-3, (name, batch, queries, keys, d, error)
            torch.testing.assert_close(sums.double(), lse, rtol=2e-5, atol=2e-5)


CHECKS = {
    c.__name__: c
    for c in (
        activations, strided, weights, products, epilogues, layers, dense, attention_rows, attention
    )
}  # fmt: skip

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    triton_linear.DOT, triton_linear.MATMUL_TILE, triton_linear.LARGE_MATMUL_TILE, triton_linear.MANY_ROWS = (
        "float32",
        (16, 16, 64),
        (32, 16, 32),
        32,
    )
    matmul.FEW_ROWS = 16
    quantized_attention.BLOCKS = {64: (16, 32), 128: (16, 64)}
    CHECKS[sys.argv[1]]()
