"""Every mode of npu_quant_matmul, and the dual-level one, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ascendit.twin
from ascendit import mx
from ascendit.mx import layouts
from ascendit.twin import cpu_kernels
from ascendit.twin.contract import Call
from ascendit.twin.operators import quant_matmul

npu = torch.ops.npu
E8M0, E2M1, E4M3 = 293, 296, 292
MX = {"scale_dtype": E8M0, "pertoken_scale_dtype": E8M0, "group_sizes": [1, 1, 32]}
LIMIT = 2e-6  # relative, before the output cast


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative difference of two matrices."""
    return float((actual.double() - exact).norm() / exact.norm())


def quantized(x: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized data, paired scales and float64 values, from `mx`."""
    encoded = mx.encode(x, format, scale_rule="floor")
    return encoded.qdata, layouts.to_pairs(encoded.scale), mx.decode(encoded).double()


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    return x, w, torch.randn(n)


@pytest.mark.parametrize(("m", "n", "k"), [(5, 16, 64), (3, 8, 1024), (7, 24, 160), (2, 4, 13824)])
@pytest.mark.parametrize("format", ["mxfp8", "mxfp8_e5m2", "mxfp4"])
def test_mx_modes(format: str, m: int, n: int, k: int) -> None:
    x, w, bias = operands(m, n, k)
    (q, s, a), (wq, ws, b) = quantized(x, format), quantized(w, format)
    fp4: dict[str, Any] = {"x1_dtype": E2M1, "x2_dtype": E2M1} if format == "mxfp4" else {}
    kwargs = {**MX, **fp4, "pertoken_scale": s, "bias": bias, "output_dtype": torch.float32}
    y = npu.npu_quant_matmul(q, wq.t(), ws.transpose(0, 1), **kwargs)
    assert relative_error(y, a @ b.t() + bias) < LIMIT
    rounded = npu.npu_quant_matmul(
        q, wq.t(), ws.transpose(0, 1), **{**kwargs, "output_dtype": torch.bfloat16}
    )
    assert torch.equal(rounded, y.bfloat16())


def test_mx_activation_of_three_axes_and_a_plain_weight() -> None:
    x, w, _ = operands(6, 10, 96)
    (q, s, a), (wq, ws, b) = quantized(x, "mxfp8"), quantized(w, "mxfp8")
    kwargs = {**MX, "output_dtype": torch.float32}
    y = npu.npu_quant_matmul(
        q.view(2, 3, 96), wq.t(), ws.transpose(0, 1), pertoken_scale=s.view(2, 3, 2, 2), **kwargs
    )
    assert y.shape == (2, 3, 10) and relative_error(y.view(6, 10), a @ b.t()) < LIMIT
    plain = npu.npu_quant_matmul(
        q, wq.t().contiguous(), ws.transpose(0, 1).contiguous(), pertoken_scale=s, **kwargs
    )
    assert relative_error(plain, a @ b.t()) < LIMIT


def test_mxfp4_weight_packed_along_its_rows() -> None:
    x, w, _ = operands(3, 8, 64)
    (q, s, a), (_, ws, b) = quantized(x, "mxfp4"), quantized(w, "mxfp4")
    nibbles = mx.encode(w, "mxfp4", scale_rule="floor").qdata
    qdata = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(-2).t()  # [K, N]
    packed = (qdata[:, 0::2] | (qdata[:, 1::2] << 4)).contiguous()  # [K, N / 2]
    kwargs = {**MX, "x1_dtype": E2M1, "x2_dtype": E2M1, "pertoken_scale": s, "output_dtype": torch.float32}
    y = npu.npu_quant_matmul(q, packed, ws.transpose(0, 1).contiguous(), **kwargs)
    assert relative_error(y, a @ b.t()) < LIMIT


@pytest.mark.parametrize("groups", [[0, 0, 32], [1, 1, 32]])
def test_w4a8(groups: list[int]) -> None:
    x, w, bias = operands(5, 16, 1024)
    (q, s, a), (wq, ws, b) = quantized(x, "mxfp8"), quantized(w, "mxfp4")
    kwargs = {**MX, "x2_dtype": E2M1, "group_sizes": groups, "output_dtype": torch.bfloat16}
    bias_row = bias.bfloat16()[None]
    y = npu.npu_quant_matmul(q, wq.t(), ws.transpose(0, 1), pertoken_scale=s, bias=bias_row, **kwargs)
    exact = a @ b.t() + bias_row.double()
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("chip", ["a2", "a3", "a5"])
@pytest.mark.parametrize("k", [48, 5000])
def test_int8(on: Callable[[str], None], chip: str, k: int) -> None:
    on(chip)
    x, w, bias = operands(4, 12, k)
    (q, s), (wq, ws) = npu.npu_dynamic_quant(x), npu.npu_dynamic_quant(w)
    exact = (q.double() @ wq.double().t()) * ws.double() * s.double()[:, None]
    y = npu.npu_quant_matmul(q, wq.t(), ws, pertoken_scale=s, bias=bias, output_dtype=torch.bfloat16)
    expected = exact + bias
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()
    half = npu.npu_quant_matmul(q, wq.t(), ws, pertoken_scale=s, output_dtype=torch.float16)
    assert ((half.double() - exact).abs() <= exact.abs() * 2**-11 + 1e-6).all()
    ints = torch.randint(-1000, 1000, (12,), dtype=torch.int32)
    y = npu.npu_quant_matmul(q, wq.t(), ws.bfloat16(), pertoken_scale=s, bias=ints, output_dtype=15)
    expected = (q.double() @ wq.double().t() + ints) * ws.bfloat16().double() * s.double()[:, None]
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()


def test_int8_sums_are_exact_beyond_float32() -> None:
    a = torch.full((2, 20000), -128, dtype=torch.int8)
    b = torch.full((20000, 3), 127, dtype=torch.int8)
    a[0, 0], b[1, 0] = 1, -1
    assert torch.equal(quant_matmul.int8_matmul(a, b), a.long() @ b.long())


def test_float32_before_the_output_cast() -> None:
    x, w, bias = operands(16, 32, 4096)
    q, s = npu.npu_dynamic_quant(x)
    wq, ws = npu.npu_dynamic_quant(w)
    names = ascendit.twin.registry.signature("npu_quant_matmul").names
    arguments: dict[str, Any] = dict.fromkeys(names) | {
        "x1": q,
        "x2": wq.t(),
        "scale": ws,
        "output_dtype": 15,
    }
    call = Call(**arguments | {"pertoken_scale": s, "bias": bias})
    exact = (q.double() @ wq.double().t()) * ws.double() * s.double()[:, None] + bias
    assert relative_error(quant_matmul.MODES["int8"](call, wq.t()), exact) < LIMIT


def test_static_int8_keeps_19_bits_of_the_scale() -> None:
    x, w, _ = operands(4, 12, 64)
    (q, _), (wq, ws) = npu.npu_dynamic_quant(x), npu.npu_dynamic_quant(w)
    sums = q.double() @ wq.double().t()
    cut = (ws.view(torch.int32) & ~0x1FFF).view(torch.float32).double()
    bias = torch.randint(-1000, 1000, (12,), dtype=torch.int32)
    half = npu.npu_quant_matmul(q, wq.t(), ws, bias=bias, output_dtype=torch.float16)
    exact = (sums + bias) * cut
    assert ((half.double() - exact).abs() <= exact.abs() * 2**-11 + 1e-6).all()
    param = npu.npu_trans_quant_param(ws)
    assert ((param >> 46) == 1).all() and torch.equal(
        half, npu.npu_quant_matmul(q, wq.t(), param, bias=bias, output_dtype=5)
    )
    small = npu.npu_quant_matmul(q, wq.t(), ws / 100)
    assert small.dtype == torch.int8
    assert torch.equal(
        small.double(),
        torch.round(sums * (ws / 100).view(torch.int32).bitwise_and(~0x1FFF).view(torch.float32))
        .clamp(-128, 127)
        .double(),
    )
    whole = npu.npu_quant_matmul(q, wq.t(), ws, output_dtype=torch.int32)
    assert torch.equal(whole.double(), sums)


def test_fp8_per_token_and_in_blocks() -> None:
    x, w, bias = operands(5, 150, 200)
    (q, s), (wq, ws) = (npu.npu_dynamic_quant(t, dst_type=E4M3) for t in (x, w))
    kwargs = {"output_dtype": torch.float32}
    y = npu.npu_quant_matmul(q, wq.t(), ws, pertoken_scale=s, bias=bias, **kwargs)
    exact = (q.double() * s.double()[:, None]) @ (wq.double() * ws.double()[:, None]).t() + bias
    assert relative_error(y, exact) < LIMIT
    tiles, rows = torch.rand(2, 2), torch.rand(5, 2)
    y = npu.npu_quant_matmul(q, wq.t(), tiles.t(), pertoken_scale=rows, group_sizes=[1, 128, 128], **kwargs)
    tile_scales = tiles.repeat_interleave(128, 0)[:150].repeat_interleave(128, 1)[:, :200].double()
    row_scales = rows.repeat_interleave(128, 1)[:, :200].double()
    assert relative_error(y, (q.double() * row_scales) @ (wq.double() * tile_scales).t()) < LIMIT


@pytest.mark.parametrize(
    ("chip", "m", "n", "k"),
    [("a5", 5, 150, 200), ("a5", 3, 7, 1), ("a5", 300, 20, 128), ("a2", 130, 256, 512)],
)
def test_int8_in_blocks(on: Callable[[str], None], chip: str, m: int, n: int, k: int) -> None:
    on(chip)
    generator = np.random.default_rng(m)
    q, w = (generator.integers(-128, 128, (rows, k), dtype=np.int8) for rows in (m, n))
    rows, tiles = (generator.random((x, -(-k // 128)), dtype=np.float32) for x in (m, -(-n // 128)))
    bias = generator.standard_normal(n, dtype=np.float32)
    total = np.zeros((m, n)) + bias
    for i in range(rows.shape[1]):
        at = slice(128 * i, 128 * i + 128)
        sums = q[:, at].astype(np.float64) @ w[:, at].astype(np.float64).T
        total += (
            sums * rows[:, i, None].astype(np.float64) * np.repeat(tiles[:, i], 128)[:n].astype(np.float64)
        )
    args = [torch.from_numpy(x) for x in (q, w, tiles, rows, bias)]
    y = npu.npu_quant_matmul(
        args[0], args[1].t(), args[2].t(), pertoken_scale=args[3], bias=args[4],
        output_dtype=torch.bfloat16, group_sizes=[1, 128, 128],
    )  # fmt: skip
    wanted = torch.from_numpy(total.astype(np.float32)).to(torch.bfloat16)
    assert torch.equal(y, wanted)


def test_a_nan_scale_makes_its_row_nan() -> None:
    x, w, _ = operands(3, 4, 64)
    (q, s, _), (wq, ws, _) = quantized(x, "mxfp8"), quantized(w, "mxfp8")
    s[1, 0, 0] = 255
    y = npu.npu_quant_matmul(
        q, wq.t(), ws.transpose(0, 1), pertoken_scale=s, output_dtype=torch.float32, **MX
    )
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


# ---- two levels -----------------------------------------


def dual(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized data, coarse scales [N, G], paired fine scales and float64 values, from `mx`."""
    encoded = mx.encode(x, "mxfp4_dualscale", scale_rule="floor")
    assert encoded.dual_scale is not None
    values = mx.decode(encoded).double()
    return encoded.qdata, encoded.dual_scale.squeeze(-1), layouts.to_pairs(encoded.scale), values


@pytest.mark.parametrize(("m", "n", "k"), [(4, 32, 512), (3, 16, 8960), (5, 20, 640)])
def test_dual_level(m: int, n: int, k: int) -> None:
    x, w, bias = operands(m, n, k)
    (q, s0, s1, a), (wq, w0, w1, b) = dual(x), dual(w)
    weight = npu.npu_format_cast(wq.view(torch.int8), 29, customize_dtype=torch.int8)
    y = npu.npu_dual_level_quant_matmul(q, weight, s0, w0.t().contiguous(), s1, w1, bias=bias)
    exact = a @ b.t() + bias
    assert y.dtype == torch.bfloat16 and ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
    encoded_x, encoded_w = (mx.encode(t, "mxfp4_dualscale", scale_rule="floor") for t in (x, w))
    assert relative_error(cpu_kernels.linear(encoded_x, encoded_w, None, torch.float32), a @ b.t()) < LIMIT


def test_weight_only() -> None:
    x, w, bias = operands(4, 16, 64)
    wq, ws = npu.npu_dynamic_quant(w)
    scale, offset = ws.bfloat16(), torch.ones(16).bfloat16()
    y = npu.npu_weight_quant_batchmatmul(x, wq.t(), scale, offset, bias=bias)
    exact = x.double() @ ((wq.double() + 1) * scale.double()[:, None]).t() + bias
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
    ints = torch.randint(-8, 8, (64, 16), dtype=torch.int32)
    packed = npu.npu_convert_weight_to_int4pack(ints)
    groups = torch.rand(2, 16).bfloat16()
    y = npu.npu_weight_quant_batchmatmul(x, packed, groups, antiquant_group_size=32)
    exact = x.double() @ (ints.double() * groups.repeat_interleave(32, 0).double())
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
