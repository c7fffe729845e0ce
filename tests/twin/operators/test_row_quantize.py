"""Quantizers with float32 scales, and static ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ascendit import mx

npu = torch.ops.npu
E4M3, E5M2 = 292, 291


def test_int8_on_a5_has_the_bits_of_mx() -> None:
    x = (torch.randn(40, 200) * 3).bfloat16()
    qdata, scale = npu.npu_dynamic_quant(x)
    expected = mx.encode(x, "int8")
    assert torch.equal(qdata, expected.qdata) and torch.equal(scale, expected.scale[:, 0])


def test_int8_on_a2_and_a3_multiplies_by_the_inverse(on: Callable[[str], None]) -> None:
    x = (torch.randn(500, 400) * 3).bfloat16()
    exact = x.double()
    a5, scale5 = npu.npu_dynamic_quant(x)
    for chip in ("a2", "a3"):
        on(chip)
        qdata, scale = npu.npu_dynamic_quant(x)
        factor = torch.tensor(127.0) / x.float().abs().amax(-1, keepdim=True)
        assert torch.equal(qdata, torch.round(x.float() * factor).to(torch.int8))
        assert torch.equal(scale, (1 / factor)[:, 0])
        difference = (qdata.int() - a5.int()).abs()
        assert difference.max() == 1 and 0 < difference.count_nonzero() < 1e-3 * difference.numel()
        assert ((scale - scale5).abs() <= 2.0**-22 * scale5).all()
        assert ((qdata.double() * scale.double()[:, None] - exact).abs() <= 0.502 * scale[:, None]).all()


@pytest.mark.parametrize("chip", ["a2", "a5"])
def test_a_row_of_zeros_stays_zero(on: Callable[[str], None], chip: str) -> None:
    on(chip)
    qdata, scale = npu.npu_dynamic_quant(torch.zeros(2, 8).bfloat16())
    assert not qdata.any() and scale.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("mode", "shape"), [("pertoken", (2, 5)), ("pertensor", (1,)), ("perchannel", (2, 16))]
)
def test_other_quant_modes(mode: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 5, 16).half()
    qdata, scale = npu.npu_dynamic_quant(x, quant_mode=mode)
    assert tuple(scale.shape) == shape
    full = {"pertoken": scale[..., None] if mode == "pertoken" else None, "pertensor": scale}.get(mode)
    full = scale[:, None] if full is None else full
    assert ((qdata.float() * full - x.float()).abs() <= 0.501 * full).all()


def test_smoothing_multiplies_in_float32() -> None:
    x, smooth = torch.randn(6, 64).bfloat16(), torch.rand(64).bfloat16()
    qdata, scale = npu.npu_dynamic_quant(x, smooth_scales=smooth)
    expected = mx.encode(x.float() * smooth.float(), "int8")
    assert torch.equal(qdata, expected.qdata) and torch.equal(scale, expected.scale[:, 0])


@pytest.mark.parametrize(("target", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_fp8_per_token(target: int, dtype: torch.dtype) -> None:
    x = torch.randn(9, 100).bfloat16()
    qdata, scale = npu.npu_dynamic_quant(x, dst_type=target)
    largest = torch.finfo(dtype).max
    assert qdata.dtype == dtype and torch.equal(scale, x.float().abs().amax(-1) * (1 / largest))
    steps = (x.float() / scale[:, None]).clamp(-largest, largest)
    assert torch.equal(qdata.float(), steps.to(dtype).float())
    if target == E4M3:
        assert torch.equal(qdata.float(), mx.encode(x, "fp8").qdata.float())


def test_fp8_in_tiles_gives_the_dequantizing_scale() -> None:
    x = torch.randn(2, 300, 128).bfloat16()
    qdata, scale = npu.npu_dynamic_block_quant(x, dst_type=E4M3, row_block_size=128, col_block_size=128)
    assert tuple(scale.shape) == (2, 3, 1)
    for i, tile in enumerate(x.split(128, 1)):
        assert torch.allclose(scale[:, i, 0], tile.float().abs().amax((1, 2)) / 448, rtol=1e-7, atol=0)
    full = scale.repeat_interleave(128, 1)[:, :300]
    assert ((qdata.float() * full - x.float()).abs() <= x.float().abs() * 2**-4 + full * 2**-10).all()


def test_int8_in_tiles(on: Callable[[str], None]) -> None:
    x = torch.randn(5, 200).bfloat16()
    on("a2")
    qdata, scale = npu.npu_dynamic_block_quant(x)
    assert tuple(scale.shape) == (5, 2) and qdata.dtype == torch.int8
    full = scale.repeat_interleave(128, 1)[:, :200]
    assert ((qdata.float() * full - x.float()).abs() <= 0.501 * full).all()
    limited = npu.npu_dynamic_block_quant(x, min_scale=1000.0)[1]
    assert limited.eq(1e-3).all()  # the limit is 1 / min_scale


def test_tiles_of_no_rows() -> None:
    qdata, scale = npu.npu_dynamic_block_quant(
        torch.ones(0, 200).bfloat16(), dst_type=1, row_block_size=128, col_block_size=128
    )
    assert tuple(qdata.shape) == (0, 200) and tuple(scale.shape) == (0, 2)


def test_static_int8() -> None:
    x, scales = torch.randn(4, 16).bfloat16(), torch.rand(16) / 20 + 0.01
    zeros = torch.randint(-5, 5, (16,)).float()
    divided = npu.npu_quantize(x, scales, zeros, torch.qint8, -1)
    expected = torch.round(x.float() / scales + zeros).clamp(-128, 127)
    assert torch.equal(divided.float(), expected)
    multiplied = npu.npu_quantize(x, 1 / scales, zeros, torch.qint8, -1, False)
    assert ((multiplied.float() - expected).abs() <= 1).all()
