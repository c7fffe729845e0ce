"""Checks of stored values, with torch as the oracle of finite, positive and zero."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascendit.checkpoint.layer_format import check_float_scale, check_positive, check_scale_bytes, check_zero
from ascendit.errors import CheckpointError

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def refused(check: object, *args: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as e:
        check(*args)  # type: ignore[operator]
    assert e.value.code == "E-CKP-08"
    return e.value


def test_scale_bytes() -> None:
    check_scale_bytes(bytes(range(255)), "x.weight_scale")
    check_scale_bytes(b"", "x.weight_scale")
    e = refused(check_scale_bytes, bytes([0, 254, 255, 1, 255]), "x.weight_scale")
    assert e.got == "x.weight_scale has 2 NaN scales (byte 255), the first at byte 2"
    refused(check_scale_bytes, memoryview(bytearray(b"\xff")), "x")


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero(dtype: str) -> None:
    size = DTYPES[dtype].itemsize
    zeros = bytearray(8 * size)
    check_zero(zeros, dtype, "x.weight_offset")
    zeros[3 * size - 1] = 0x80  # -0
    check_zero(memoryview(zeros), dtype, "x.weight_offset")
    for index in (0, size - 1):
        bad = bytearray(zeros)
        bad[5 * size + index] |= 0x01
        assert (
            "x.weight_offset is not zero (element 5)"
            in refused(check_zero, bad, dtype, "x.weight_offset").got
        )


def test_zero_of_integers() -> None:
    check_zero(bytes(4), "I8", "x")
    assert "(element 2)" in refused(check_zero, b"\0\0\x80\0", "I8", "x").got


@pytest.mark.parametrize("dtype", DTYPES)
def test_positive(dtype: str) -> None:
    info = torch.finfo(DTYPES[dtype])
    good = [info.tiny, info.max, 1.0, info.smallest_normal]
    bad = [0.0, -0.0, -1.0, math.inf, -math.inf, math.nan, -info.tiny]

    def raw(values: list[float]) -> bytes:
        return torch.tensor(values, dtype=DTYPES[dtype]).view(torch.uint8).numpy().tobytes()

    check_positive(raw(good), dtype, "x.mul_scale")
    check_positive(b"", dtype, "x.mul_scale")
    for value in bad:
        e = refused(check_positive, memoryview(raw([1.0, value, value])), dtype, "x.mul_scale")
        assert "x.mul_scale has 2 values" in e.got
        assert "first at element 1" in e.got


@given(st.lists(st.integers(0, 2**32 - 1), max_size=8))
def test_positive_agrees_with_torch(bits: list[int]) -> None:
    raw = struct.pack(f"<{len(bits)}I", *bits)
    values = torch.tensor(bits, dtype=torch.int64).to(torch.uint32).view(torch.float32)
    if bool((values.isfinite() & (values > 0)).all()):
        check_positive(raw, "F32", "x")
    else:
        refused(check_positive, raw, "F32", "x")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_invalid_scales_are_refused(value: float) -> None:
    data = struct.pack("<4f", 0.0, -0.0, 1.5, value)
    with pytest.raises(
        CheckpointError, match="a_scale has 1 scales that are negative or not finite, the"
    ) as e:
        check_float_scale(data, "F32", "a_scale")
    assert e.value.code == "E-CKP-08" and "element 3" in e.value.got
    check_float_scale(data[:12], "F32", "a_scale")
    check_float_scale(b"", "F32", "a_scale")
