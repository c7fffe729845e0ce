"""The Triton kernels on a CPU, in Triton's interpreter: TRITON_INTERPRET=1 python interpreted.py tokens.

`test_triton_kernels.py` runs each check in a process of its own: the variable must be set before Triton
is imported.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from ops.cuda.stand_ins import dequantized, scaled
from ops.layers import exact, tokens_of, weight_of
from torch import Tensor

from ascendit import mx
from ascendit.kernels import reference
from ascendit.mx.formats import lookup
from ascendit.ops.cuda import kernels, matmul, steps, triton_linear
from ascendit.quant.schemes import LINEAR_SCHEMES

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RULES = {
    "mxfp8": ("ceil", "floor", "pow2", "even", "msms:minmax"),
    "mxfp4": ("floor", "max:7", "max:6.5", "ceil"),
    "mxfp4_dualscale": ("floor",),
    "int8": ("amax",),
    "fp8": ("amax",),
}


def same(found: Tensor | None, wanted: Tensor | None) -> None:
    """To the bit; the sign of zero counts, that of NaN does not."""
    if found is None or wanted is None:
        assert found is wanted
        return
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if found.dtype.is_floating_point:
        a, b = found.float(), wanted.float()
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(), b.nan_to_num()
        assert torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
    else:
        assert torch.equal(found, wanted)


def hard_tokens(k: int, dtype: torch.dtype) -> Tensor:
    """Rows of many sizes, zeros, halves between two numbers, an infinity and a NaN.

    None is all subnormal in bfloat16: the interpreter casts those wrongly, a card does not.
    """
    top = 4 if dtype == torch.float16 else 30
    x = (torch.randn(7, k) * torch.logspace(-top, top, 7)[:, None]).to(dtype)
    x[0, 3], x[1] = 0, 0
    x[2, : k // 2] = (torch.arange(k // 2) * 0.25).to(dtype)
    x[3, 5], x[4, 9] = float("inf"), float("nan")
    x[5, 1] = torch.finfo(dtype).max
    x[6, 2] = torch.finfo(dtype).tiny / 4
    return x


def tokens() -> None:
    """Values, codes, scales and what multiplies the sums are those of `mx`, to the bit."""
    for dtype in DTYPES:
        for k, mul_scale in ((544, None), (96, torch.rand(96) + 0.1)):
            x = hard_tokens(k, dtype)
            for format, rules in RULES.items():
                for rule in rules if dtype == torch.bfloat16 else rules[:1]:
                    for found, wanted in zip(
                        triton_linear.fake_quantize(x, format, rule, mul_scale),
                        steps.fake_quantize(x, format, rule, mul_scale),
                        strict=True,
                    ):
                        same(found, wanted)
                    if format != "mxfp4_dualscale":
                        qdata = triton_linear.quantize(x, format, rule, mul_scale)
                        for found, wanted in zip(
                            qdata, steps.quantize(x, format, rule, mul_scale), strict=True
                        ):
                            same(found, wanted)


def strided() -> None:
    """Tokens that are columns of a wider tensor; none at all."""
    x = torch.randn(5, 300).bfloat16()
    for format in ("mxfp8", "int8"):
        rule = lookup(format).default_rule
        for view in (x[:, 64:160], x[:, :96].t().contiguous().t(), x[:0, :64]):
            same(
                triton_linear.fake_quantize(view, format, rule, None)[0],
                steps.fake_quantize(view, format, rule, None)[0],
            )


def weights() -> None:
    """Decoded to the bit, the bias behind them; every code of a byte, and scales of all sizes."""
    bias = torch.randn(20) * 3
    for format in RULES:
        for k in (544, 33, 64):
            w = (torch.randn(20, k) * torch.logspace(-30, 30, 20)[:, None]).bfloat16()
            encoded = mx.encode(w, format)
            same(triton_linear.decode_weight(encoded, bias), steps.decode_weight(encoded, bias))
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scale = torch.full((1, 8), 127, dtype=torch.uint8)
    encoded = mx.Encoded(every.view(torch.float8_e4m3fn), scale, None, "mxfp8", -1, (1, 256))
    same(triton_linear.decode_weight(encoded, None), steps.decode_weight(encoded, None))


def products() -> None:
    """Decoded and multiplied in one kernel: within the order of the sums of float64, for each tile."""
    for format in ("mxfp8", "mxfp4", "mxfp4_dualscale"):
        for m, n, k in ((19, 20, 1088), (16, 16, 64), (40, 33, 96)):
            encoded = mx.encode(torch.randn(n, k), format)
            x, bias = torch.randn(m, k), torch.randn(n) if m != 16 else None
            values, outer = steps.fake_quantize(x, format, lookup(format).default_rule, None)
            wanted = mx.decode(mx.encode(x, format)).double() @ mx.decode(encoded).double().t()
            wanted = wanted if bias is None else wanted + bias
            for decoded in (None, steps.decode_weight(encoded, bias)):
                out = triton_linear.matmul(values, outer, encoded, decoded, bias, torch.float32)
                assert out.shape == (m, n)
                assert float((out - wanted).norm() / wanted.norm()) < 2e-6, (format, m, n, k)
                narrow = triton_linear.matmul(values, outer, encoded, decoded, bias, torch.bfloat16)
                same(narrow, out.to(torch.bfloat16))


def ends() -> None:
    """Sums times scales, plus the bias, rounded once."""
    for sums in (torch.randint(-(2**24), 2**24, (5, 32), dtype=torch.int32), torch.randn(5, 32) * 1e4):
        row, column, bias = torch.rand(5), torch.rand(30), torch.randn(30)
        for r, c, b in ((row, column, bias), (row, column, None), (None, None, bias), (None, None, None)):
            for dtype in DTYPES:
                found, wanted = (torch.empty(5, 30, dtype=dtype) for _ in range(2))
                triton_linear.finish(sums, r, c, b, found)
                steps.finish(sums, r, c, b, wanted)
                same(found, wanted)


def forms() -> None:
    """Whole layers whose steps are kernels, by each way that they can go."""
    steps, _ = triton_linear.triton_steps()
    assert steps is not None
    for scheme in LINEAR_SCHEMES:
        k = 544 if scheme == "mxfp4_dualscale" else 96
        encoded, bias = weight_of(scheme, 20, k)
        ways: list[Any] = [dequantized(steps), dequantized(steps, once=True)]
        ways += [scaled(steps)] if scheme != "mxfp4_dualscale" else []
        for layer, m in itertools.product(ways, (4, 20)):
            x = tokens_of(m, k, torch.float32)
            weight = layer.prepare_weight(encoded, bias, torch.device("cpu"))
            out = layer.quantized_linear(layer.quantize_activation(x, scheme), weight)
            wanted = exact(x, scheme, encoded, bias)
            assert float((out - wanted).norm() / wanted.norm()) < 2e-6, scheme


def dense() -> None:
    """The dense operators: one rounding away from `reference`, for views and more than one batch too."""
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 4e-3)):
        for batch, spans in ((1, (9,)), (2, (2, 7))):
            wide = torch.randn(batch, 9, 3 * 192).to(dtype) * 3
            x, y, heads = wide.split(192, dim=-1)
            scale, shift, gate = torch.randn(3, len(spans), 192)
            angle = torch.rand(9, 16) * 6
            given: dict[str, tuple[Any, ...]] = {
                "rms_norm": (x, scale[0], 1e-6),
                "layer_norm": (y, scale[0], shift[0], 1e-6),
                "adaln": (x, scale, shift, spans, 1e-6),
                "gated_residual": (x, y, gate, spans),
                "rope": (heads.unflatten(-1, (6, 32)), angle.cos(), angle.sin()),
            }
            for name, arguments in given.items():
                found, wanted = getattr(kernels, name)(*arguments), getattr(reference, name)(*arguments)
                assert found.dtype == dtype and found.shape == wanted.shape and found.is_contiguous()
                assert float((found.double() - wanted.double()).norm() / wanted.double().norm()) < limit, name
            plain = kernels.layer_norm(x, None, None, 1e-6)
            torch.testing.assert_close(plain, reference.layer_norm(x, None, None, 1e-6), rtol=0.01, atol=1e-5)
    assert not any(kernels.problem_of_operator(getattr(kernels, name), "cpu") for name in given)


CHECKS = {c.__name__: c for c in (tokens, strided, weights, products, ends, forms, dense)}

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
    CHECKS[sys.argv[1]]()
