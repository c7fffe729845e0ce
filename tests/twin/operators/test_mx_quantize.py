"""The MX quantizers against an oracle in plain Python, against `mx`, and against the vendor's examples."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ascendit import mx
from ascendit.mx import layouts

npu = torch.ops.npu
E5M2, E4M3, E2M1, E1M2 = 291, 292, 296, 297


# ---- an independent oracle: magnitudes by bit pattern, one block at a time ----------------------


def magnitudes(target: int) -> list[float]:
    """Values of the bit patterns 0, 1, 2, .. without sign, ascending."""
    if target == E2M1:
        return [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    if target == E1M2:
        return [k / 4 for k in range(8)]
    dtype, count = (torch.float8_e4m3fn, 127) if target == E4M3 else (torch.float8_e5m2, 124)
    return torch.arange(count, dtype=torch.uint8).view(dtype).float().tolist()


EMAX = {E4M3: 8, E5M2: 15, E2M1: 2, E1M2: 0}
SIGN = {E4M3: 0x80, E5M2: 0x80, E2M1: 8, E1M2: 8}


def bits_of(value: float, target: int, rounding: str) -> int:
    """The bit pattern of a scaled value."""
    table = magnitudes(target)
    negative, size = math.copysign(1, value) < 0, min(abs(value), table[-1])
    above = next(i for i, m in enumerate(table) if m >= size)
    below = above if table[above] == size else above - 1
    if rounding == "floor":
        index = above if negative else below
    else:
        up, down = table[above] - size, size - table[below]
        even = above if above % 2 == 0 else below
        index = above if up < down else below if down < up else even if rounding == "rint" else above
    return index | (SIGN[target] if negative else 0)


def biased(value: float) -> int:
    """The exponent field of a float32, 0 for zero and subnormals."""
    return max(math.frexp(value)[1] + 126, 0) if value else 0


def oracle(
    block: list[float], target: int, algorithm: int, top: float, rounding: str
) -> tuple[int, list[int]]:
    """Scale byte and bit patterns of one block of finite values."""
    amax = max(abs(v) for v in block)
    if algorithm == 0:
        byte = max(biased(amax) - EMAX[target], 0)
        zero = byte == 0
    elif algorithm == 2 and top in (0.0, 6.0, 7.0):
        over = amax > (top or 6.0) * 2.0 ** (biased(amax) - 127 - 2)
        byte = max(biased(amax) - 2 + over, 0)
        zero = byte == 0
    else:
        quotient = amax / (top or magnitudes(target)[-1])
        byte = 0 if amax == 0 else max(math.ceil(math.log2(quotient)) + 127, 0)
        zero = amax == 0
    scale = 0.0 if zero else 2.0 ** (127 - byte)
    return byte, [bits_of(v * scale, target, rounding) for v in block]


def bytes_of(y: Tensor, target: int) -> Tensor:
    """One bit pattern per element."""
    raw = y.contiguous().view(torch.uint8)
    return torch.stack((raw & 15, raw >> 4), -1).flatten(-2) if target in (E2M1, E1M2) else raw


def blocks(dtype: torch.dtype, count: int = 24, spread: int = 20, seed: int = 0) -> Tensor:
    """[1, count x 32] with exponents up to +-spread; coarse mantissas so that ties occur."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-64, 65, (count, 32), generator=generator).float() / 8
    power = torch.randint(-spread, spread + 1, (count, 1), generator=generator)
    share = torch.randint(0, 9, (count, 32), generator=generator)
    return (base * torch.exp2((power - share).float())).to(dtype).view(1, -1)


RULES: list[tuple[int, dict[str, Any]]] = [
    (E4M3, {}),
    (E4M3, {"scale_alg": 1}),
    (E5M2, {}),
    (E5M2, {"scale_alg": 1}),
    (E2M1, {}),
    (E2M1, {"round_mode": "floor"}),
    (E2M1, {"round_mode": "round"}),
    (E2M1, {"scale_alg": 2}),
    (E2M1, {"scale_alg": 2, "dst_type_max": 6.0}),
    (E2M1, {"scale_alg": 2, "dst_type_max": 7.0, "round_mode": "round"}),
    (E2M1, {"scale_alg": 2, "dst_type_max": 7.25}),
    (E2M1, {"scale_alg": 2, "dst_type_max": 12.0}),
    (E1M2, {}),
    (E1M2, {"round_mode": "round"}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("target", "kwargs"), RULES, ids=str)
def test_elements_and_scales_equal_the_oracles(
    target: int, kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    x = blocks(dtype, spread=8 if dtype == torch.float16 else 20)
    y, scale = npu.npu_dynamic_mx_quant(x, dst_type=target, **kwargs)
    qdata = bytes_of(y, target).view(-1, 32)
    algorithm, top = kwargs.get("scale_alg", 0), kwargs.get("dst_type_max", 0.0)
    for i, block in enumerate(x.view(-1, 32).double().tolist()):
        byte, expected = oracle(block, target, algorithm, top, kwargs.get("round_mode", "rint"))
        assert scale.flatten()[i].item() == byte, i
        assert qdata[i].tolist() == expected, i


@pytest.mark.parametrize(
    ("target", "kwargs", "format", "rule"),
    [
        (E4M3, {}, "mxfp8", "floor"),
        (E4M3, {"scale_alg": 1}, "mxfp8", "ceil"),
        (E5M2, {}, "mxfp8_e5m2", "floor"),
        (E5M2, {"scale_alg": 1}, "mxfp8_e5m2", "ceil"),
        (E2M1, {}, "mxfp4", "floor"),
        (E2M1, {"scale_alg": 2}, "mxfp4", "max:6"),
        (E2M1, {"scale_alg": 2, "dst_type_max": 7.0}, "mxfp4", "max:7"),
        (E2M1, {"scale_alg": 2, "dst_type_max": 7.25}, "mxfp4", "max:7.25"),
    ],
    ids=str,
)
def test_bits_are_those_of_mx_for_every_mantissa_of_the_maximum(
    target: int, kwargs: dict[str, Any], format: str, rule: str
) -> None:
    exponents = torch.tensor([*range(20), 100, 126, 127, 128, 200, *range(250, 255)])
    bits = (exponents[:, None] * 128 + torch.arange(128)).flatten()  # every mantissa
    amax = bits.to(torch.int16).view(torch.bfloat16)
    share = torch.rand(amax.numel(), 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = (share * amax.float()[:, None]).to(torch.bfloat16)
    x[:, 5] = amax
    y, scale = npu.npu_dynamic_mx_quant(x, dst_type=target, **kwargs)
    expected = mx.encode(x, format, scale_rule=rule)
    if rule == "max:7.25":  # unlike algorithm 1, it has no rule for subnormal quotients
        rows = expected.scale[:, 0] > 1
        y, scale = y[rows], scale[rows]
        expected = mx.encode(x[rows], format, scale_rule=rule)
    assert torch.equal(layouts.from_pairs(scale, 1), expected.scale)
    qdata, expected_qdata = bytes_of(y, target), bytes_of(expected.qdata, target)
    if kwargs.get("scale_alg") == 1 or kwargs.get("dst_type_max") == 7.25:
        assert torch.equal(qdata, expected_qdata)
    else:  # a block of byte 0 is multiplied by 0
        tiny = expected.scale[:, 0] == 0
        assert torch.equal(qdata[~tiny], expected_qdata[~tiny])
        assert not (qdata[tiny] & (SIGN[target] - 1)).any() and tiny.any()


@pytest.mark.parametrize(("shape", "axis"), [((3, 96), -1), ((70, 96), 0), ((2, 160, 6), 1), ((2, 33), -1)])
@pytest.mark.parametrize("target", [E4M3, E2M1])
def test_scales_come_in_pairs_along_any_axis(shape: tuple[int, ...], axis: int, target: int) -> None:
    if target == E2M1 and shape[-1] % 2:
        shape = (2, 34)
    x = torch.randn(shape).bfloat16()
    y, scale = npu.npu_dynamic_mx_quant(x, dst_type=target, axis=axis)
    moved = x.movedim(axis, -1)
    if moved.shape[-1] % 2:
        moved = torch.nn.functional.pad(moved, (0, 1))
    whole, plain = npu.npu_dynamic_mx_quant(moved, dst_type=target)
    at, count = axis % x.dim(), math.ceil(x.shape[axis] / 32)
    assert tuple(scale.shape) == (*shape[:at], math.ceil(count / 2), *shape[at + 1 :], 2)
    for j in range(count):
        pair = scale.select(at, j // 2)[..., j % 2]
        assert torch.equal(pair, plain.flatten(-2)[..., j])
    if count % 2:
        assert not scale.select(at, count // 2)[..., 1].any()  # padding
    ours = bytes_of(y, target).movedim(axis, -1)
    assert torch.equal(ours, bytes_of(whole, target)[..., : x.shape[axis]])


def test_a_block_that_is_not_finite_affects_only_itself() -> None:
    x = torch.ones(4, 96).bfloat16()
    x[0, 0], x[1, 40], x[2, 95] = math.inf, -math.inf, math.nan
    for target in (E4M3, E2M1):
        y, scale = npu.npu_dynamic_mx_quant(x, dst_type=target)
        plain = layouts.from_pairs(scale, 3)
        bad = torch.eye(4, 3, dtype=torch.bool)
        assert torch.equal(plain == 255, bad)
        qdata = bytes_of(y, target).view(4, 3, 32)
        assert not qdata[bad].any() and (qdata[~bad] != 0).all()


def test_zeros_and_subnormal_blocks_become_zeros() -> None:
    x = torch.zeros(1, 64).bfloat16()
    x[0, 32:] = -(2.0**-125)  # below 2^(emax - 126)
    for target, kwargs in ((E4M3, {}), (E2M1, {}), (E2M1, {"scale_alg": 2})):
        y, scale = npu.npu_dynamic_mx_quant(x, dst_type=target, **kwargs)
        assert scale.flatten().tolist() == [0, 0]
        assert set(bytes_of(y, target).flatten()[32:].tolist()) == {SIGN[target]}  # minus zero
    y, scale = npu.npu_dynamic_mx_quant(x, dst_type=E4M3, scale_alg=1)
    assert y.float()[0, 32:].eq(-4.0).all() and scale.flatten().tolist() == [0, 0]


def test_algorithm_0_saturates_between_the_largest_value_and_the_next_power() -> None:
    x = torch.full((1, 32), 7.5).bfloat16()
    y, scale = npu.npu_dynamic_mx_quant(x, dst_type=E2M1)
    assert set(bytes_of(y, E2M1)[0].tolist()) == {7} and scale[0, 0, 0] == 127
    y, scale = npu.npu_dynamic_mx_quant(x * 64, dst_type=E4M3)  # 480
    assert y.float().eq(448).all() and scale[0, 0, 0] == 127


def test_float16_is_rounded_to_bfloat16_before_algorithm_2() -> None:
    value = 1.5 + 0.75 * 2**-7  # bfloat16: rounded up to 1.5 + 2^-7, or truncated to 1.5
    x = torch.full((1, 32), value, dtype=torch.float16)
    kwargs = {"dst_type": E2M1, "scale_alg": 2}
    assert npu.npu_dynamic_mx_quant(x, **kwargs)[1][0, 0, 0] == 126
    assert npu.npu_dynamic_mx_quant(x.float(), **kwargs)[1][0, 0, 0] == 125


def test_the_example_of_the_vendors_document() -> None:
    """aclnnDynamicMxQuantV3: bfloat16 (0, 8, 64, 512), e4m3, algorithm 1, max_low_bound 0.5."""
    x = torch.tensor([[0.0, 8.0, 64.0, 512.0]]).bfloat16()
    y, scale = npu.npu_dynamic_mx_quant(x, dst_type=E4M3, scale_alg=1, max_low_bound=0.5)
    assert y.view(torch.uint8).tolist() == [[0, 72, 96, 120]] and scale.tolist() == [[[128, 0]]]
    bound = npu.npu_dynamic_mx_quant(x / 512, dst_type=E4M3, scale_alg=1, max_low_bound=448.0)[1]
    assert bound.tolist() == [[[127, 0]]]


def test_larger_blocks() -> None:
    x = torch.randn(2, 200).bfloat16()
    y, scale = npu.npu_dynamic_mx_quant(x, dst_type=E4M3, block_size=64)
    assert tuple(scale.shape) == (2, 2, 2)
    for j in range(4):
        expected = npu.npu_dynamic_mx_quant(x[:, 64 * j : 64 * j + 64], dst_type=E4M3, block_size=64)
        assert torch.equal(y[:, 64 * j : 64 * j + 64].float(), expected[0].float())
        assert torch.equal(scale.flatten(1)[:, j], expected[1][:, 0, 0])


@pytest.mark.parametrize(("target", "format"), [(E4M3, "mxfp8"), (E2M1, "mxfp4"), (E5M2, "mxfp8_e5m2")])
def test_dequantization_gives_the_values_of_mx(target: int, format: str) -> None:
    x = torch.randn(3, 160).bfloat16()
    y, scale = npu.npu_dynamic_mx_quant(x, dst_type=target)
    back = npu.npu_anti_mx_quant(y, scale, src_type=target, dst_type=6)
    assert torch.equal(back, mx.decode(mx.encode(x, format, scale_rule="floor")))
    quantized = npu.npu_dynamic_mx_quant(x.t(), dst_type=E4M3, axis=0)
    back = npu.npu_anti_mx_quant(*quantized, axis=0, dst_type=6)
    assert torch.equal(back.t(), mx.decode(mx.encode(x, "mxfp8", scale_rule="floor")))


# ---- two levels -----------------------------------------


def test_dual_level_is_the_vendors_vector() -> None:
    """The test of op-plugin: 8.0 everywhere."""
    y, coarse, fine = npu.npu_dynamic_dual_level_mx_quant(torch.full((1, 512), 8.0).bfloat16())
    assert set(y.flatten().tolist()) == {0x77} and set(fine.flatten().tolist()) == {127}
    assert coarse.tolist() == [[pytest.approx(4 / 3)]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [512, 640, 96, 1536])
def test_dual_level_bits_are_those_of_mx(length: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, length) * torch.exp2(torch.randn(5, length) * 2)).to(dtype)
    y, coarse, fine = npu.npu_dynamic_dual_level_mx_quant(x)
    expected = mx.encode(x, "mxfp4_dualscale", scale_rule="floor")
    assert expected.dual_scale is not None
    assert torch.equal(coarse, expected.dual_scale.squeeze(-1))
    assert torch.equal(layouts.from_pairs(fine, math.ceil(length / 32)), expected.scale)
    assert torch.equal(y, expected.qdata)


def test_dual_level_smooths_in_the_dtype_of_the_input() -> None:
    x, smooth = torch.randn(3, 640).bfloat16(), torch.rand(640).bfloat16()
    ours = npu.npu_dynamic_dual_level_mx_quant(x, smooth_scale=smooth)
    expected = npu.npu_dynamic_dual_level_mx_quant(x * smooth)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_dual_level_of_zeros_and_of_infinities() -> None:
    x = torch.zeros(1, 1024).bfloat16()
    x[0, 512:] = 1.0
    x[0, 600] = math.inf
    y, coarse, fine = npu.npu_dynamic_dual_level_mx_quant(x)
    assert coarse[0].tolist() == [0.0, pytest.approx(1 / 6)]
    assert fine.flatten()[:16].eq(0).all() and not y[0, :256].any()
    assert (fine.flatten()[16:] == 255).nonzero().flatten().tolist() == [2]  # 600 = 512 + 88
