"""Norms, rotations, activations and casts against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.kernels import reference
from ascendit.mx import elements
from ascendit.mx.formats import E2M1 as FP4

npu, mindie = torch.ops.npu, torch.ops.mindiesd
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-6}


def close(actual: Tensor, exact: Tensor) -> None:
    """Rounded once: within half a step of the dtype."""
    limit = exact.abs() * STEP[actual.dtype] + 1e-6
    assert ((actual.double() - exact).abs() <= limit).all(), float((actual.double() - exact).abs().max())


def layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.double(), x.shape[-1:], eps=eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float32_gamma", [False, True])
def test_rms_norm(dtype: torch.dtype, float32_gamma: bool) -> None:
    x, gamma = torch.randn(2, 5, 96).to(dtype), torch.randn(96).to(torch.float32 if float32_gamma else dtype)
    y, rstd = npu.npu_rms_norm(x, gamma, epsilon=1e-5)
    exact = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
    close(y, x.double() * exact * gamma.double())
    assert rstd.shape == (2, 5, 1) and rstd.dtype == torch.float32 and torch.allclose(rstd.double(), exact)
    if dtype == torch.float32:
        assert torch.allclose(y, reference.rms_norm(x, gamma, 1e-5), atol=1e-6)


def test_add_rms_norm_normalizes_the_sum() -> None:
    a, b, gamma = torch.randn(4, 64).half(), torch.randn(4, 64).half(), torch.randn(64).half()
    y, rstd, total = npu.npu_add_rms_norm(a, b, gamma)
    exact = a.double() + b.double()
    close(total, exact)
    close(y, exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * gamma.double())
    assert rstd.shape == (4, 1)


def test_norm_and_quantizer_in_one_launch() -> None:
    x, gamma = torch.randn(4, 96).bfloat16(), torch.randn(96)
    y, scale, rstd = npu.npu_rms_norm_dynamic_mx_quant(x, gamma, dst_type=292)
    normed, expected = npu.npu_rms_norm(x, gamma)
    qdata, scales = npu.npu_dynamic_mx_quant(normed, dst_type=292)
    assert (
        torch.equal(y.float(), qdata.float()) and torch.equal(scale, scales) and torch.equal(rstd, expected)
    )
    y, total, scale, rstd = npu.npu_add_rms_norm_dynamic_mx_quant(x, x, gamma.bfloat16())
    normed, expected, added = npu.npu_add_rms_norm(x, x, gamma.bfloat16())
    qdata, scales = npu.npu_dynamic_mx_quant(normed)
    assert torch.equal(y, qdata) and torch.equal(total, added) and torch.equal(scale, scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaln(on: Callable[[str], None], dtype: torch.dtype) -> None:
    x, scale, shift = (torch.randn(s).to(dtype) for s in ((2, 6, 64), (2, 64), (2, 1, 64)))
    exact = layer_norm(x, 1e-6) * (1 + scale.double()[:, None]) + shift.double()
    y, mean, rstd = mindie.adaln_v2(x, scale, shift, None, None, 1e-6)
    close(y, exact)
    assert mean.shape == rstd.shape == (2, 6, 1) and mean.dtype == dtype
    on("a2")
    assert torch.equal(y, mindie.adaln(x, scale, shift, None, None, 1e-6))


def test_adaln_with_weight_and_bias() -> None:
    x, rows = torch.randn(1, 4, 32).bfloat16(), torch.randn(1, 32).bfloat16()
    weight, bias = torch.randn(32), torch.randn(32)
    y = mindie.adaln_v2(x, rows, rows, weight, bias)[0]
    inner = layer_norm(x, 1e-5) * weight.double() + bias.double()
    close(y, inner * (1 + rows.double()[:, None]) + rows.double()[:, None])


def test_layer_norms(on: Callable[[str], None]) -> None:
    x, weight, bias = torch.randn(3, 4, 32).half(), torch.randn(32), torch.randn(32)
    exact = layer_norm(x, 1e-5) * weight.double() + bias.double()
    y, mean, rstd = mindie.layernorm(x, [32], weight, bias)
    close(y, exact)
    assert mean.shape == rstd.shape == (3, 4, 1) and mean.dtype == rstd.dtype == torch.float16
    assert torch.allclose(mean.double(), x.double().mean(-1, keepdim=True), atol=5e-4)
    gamma = weight.half()
    y, _, rstd, total = npu.npu_add_layer_norm(x, x, gamma, gamma, additional_output=True)
    close(y, layer_norm(x.double() * 2, 1e-5) * gamma.double() + gamma.double())
    close(total, x.double() * 2)
    on("a3")
    close(npu.npu_layer_norm_eval(x, [32], weight, bias), exact)


# ---- rotation -----------------------------------------


def table(length: int, d: int, layout: str = "1S1D") -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin with each value twice, and the angles [S, d / 2]."""
    angle = torch.randn(length, d // 2)
    shape = {
        "1S1D": (1, length, 1, d),
        "11SD": (1, 1, length, d),
        "S11D": (length, 1, 1, d),
        "T1D": (length, 1, d),
    }
    cos, sin = (t.repeat_interleave(2, -1).view(shape[layout]) for t in (angle.cos(), angle.sin()))
    return cos, sin, angle


def test_interleaved_rotation_is_a_complex_product() -> None:
    x = torch.randn(2, 9, 3, 32)
    cos, sin, angle = table(9, 32)
    y = npu.npu_rotary_mul(x, cos, sin, rotary_mode="interleave")
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.polar(torch.ones_like(angle).double(), angle.double())[None, :, None]
    close(y, torch.view_as_real(pairs * turn).flatten(-2))
    assert torch.allclose(y, reference.rope(x, angle.cos(), angle.sin()), atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "order"), [("11SD", (0, 2, 1, 3)), ("S11D", (1, 0, 2, 3)), ("T1D", (1, 2, 3))]
)
def test_rotation_in_every_layout(layout: str, order: tuple[int, ...]) -> None:
    x = torch.randn(1, 9, 3, 32)
    cos, sin, angle = table(9, 32, layout)
    permuted = x[0] if layout == "T1D" else x.permute(order)
    y = npu.npu_rotary_mul(permuted, cos, sin, rotary_mode="interleave")
    expected = reference.rope(x, angle.cos(), angle.sin())
    assert torch.allclose(y, expected[0] if layout == "T1D" else expected.permute(order), atol=1e-6)


def test_tables_are_cast_to_the_dtype_of_the_input() -> None:
    x = torch.randn(1, 5, 2, 16).bfloat16()
    cos, sin, _ = table(5, 16)
    y = npu.npu_rotary_mul(x, cos, sin, "interleave")
    assert torch.equal(y, npu.npu_rotary_mul(x, cos.bfloat16(), sin.bfloat16(), "interleave"))
    in_float32 = npu.npu_rotary_mul(x.float(), cos, sin, "interleave").bfloat16()
    assert not torch.equal(y, in_float32)


def test_rotation_by_halves_and_of_query_and_key() -> None:
    x, cos, sin = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 1, 16), torch.randn(1, 5, 1, 16)
    first, second = x.double().chunk(2, -1)
    exact = x.double() * cos.double() + torch.cat((-second, first), -1) * sin.double()
    close(npu.npu_rotary_mul(x, cos, sin), exact)
    q, k = x.clone(), x.clone()
    npu.npu_apply_rotary_pos_emb(q, k, cos, sin)
    close(q, exact)
    close(k, exact)


def test_interleave_rope_has_another_order_than_wans() -> None:
    x = torch.randn(1, 2, 5, 64)
    cos, sin, _ = table(5, 64, "11SD")
    ours, wans = npu.npu_interleave_rope(x, cos, sin), npu.npu_rotary_mul(x, cos, sin, "interleave")
    assert not torch.allclose(ours, wans, atol=0.1)


# ---- activations -----------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(on: Callable[[str], None], dtype: torch.dtype) -> None:
    x = (torch.randn(5, 64) * 3).to(dtype)
    x64 = x.double()
    close(npu.npu_gelu(x, approximate="tanh"), F.gelu(x64, approximate="tanh"))
    close(npu.npu_gelu(x), F.gelu(x64))
    close(npu.npu_fast_gelu(x), x64 * torch.sigmoid(1.702 * x64))
    assert torch.equal(npu.npu_fast_gelu(x), npu.fast_gelu(x))
    a, b = x64.chunk(2, -1)
    close(npu.npu_swiglu(x), F.silu(a) * b)
    close(npu.npu_geglu(x)[0], a * F.gelu(b, approximate="tanh"))
    close(npu.npu_geglu(x, -1, 0, True)[1], F.gelu(a))
    on("a2")
    close(npu.npu_silu(x), F.silu(x64))


def test_fast_gelu_is_another_function() -> None:
    x = torch.linspace(-6, 6, 4001)
    difference = (npu.npu_fast_gelu(x) - npu.npu_gelu(x, approximate="tanh")).abs().max()
    assert difference.item() == pytest.approx(0.0207, abs=2e-4)


# ---- casts -----------------------------------------


def test_casts_between_torch_dtypes() -> None:
    x = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8):
        assert torch.equal(npu.npu_dtype_cast(x, dtype).float(), x.to(dtype).float())
    assert npu.npu_dtype_cast(x, 292).dtype == torch.float8_e4m3fn
    assert torch.equal(npu._npu_dtype_cast(x, torch.bfloat16), x.bfloat16())


def test_fp4_is_packed_low_nibble_first() -> None:
    x = torch.tensor([[0.0, 0.5, -1.0, 6.0, 0.25, 0.75, 9.0, -0.1]])
    packed = npu.npu_dtype_cast(x, 296)
    assert packed.tolist() == [[0x10, 0x7A, 0x20, 0x87]]  # ties to even, saturated, minus zero
    back = npu.npu_dtype_cast(packed, torch.float32, input_dtype=296)
    assert back.tolist() == [[0.0, 0.5, -1.0, 6.0, 0.0, 1.0, 6.0, -0.0]]


def test_fp4_in_fp8_is_packed() -> None:
    """MindIE-SD converts MXFP4 weights with one element per byte in this way."""
    qdata = torch.randint(0, 16, (4, 32), dtype=torch.uint8)
    unpacked = elements.decode(qdata, FP4).to(torch.float8_e4m3fn)
    assert torch.equal(npu.npu_dtype_cast(unpacked, 296), elements.pack(qdata))


def test_int4_is_packed_eight_to_an_int32() -> None:
    weight = torch.tensor([[1, -1, 7, -8, 0, 0, 0, 2]], dtype=torch.int32)
    assert npu.npu_convert_weight_to_int4pack(weight).tolist() == [[0x200087F1]]


def test_quant_parameters_hold_19_bits_and_an_offset() -> None:
    scale = torch.tensor([1.0, 0.1, 3.7])
    out = npu.npu_trans_quant_param(scale)
    low = (out & 0xFFFFFFFF).to(torch.int32).view(torch.float32)
    assert ((scale - low) >= 0).all() and ((scale - low) < scale * 2**-10).all() and ((out >> 46) == 1).all()
    rounded = npu.npu_trans_quant_param(scale, round_mode=1) & 0xFFFFE000
    assert ((rounded.to(torch.int32).view(torch.float32) - scale).abs() <= scale * 2**-11).all()
    nine = (npu.npu_trans_quant_param(scale, torch.tensor([-3.0])) >> 37) & 0x1FF
    assert nine.tolist() == [512 - 3] * 3
