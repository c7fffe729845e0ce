"""Containers of FP4, and wider floats. Oracle: ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendit.errors import CheckpointError
from ascendit.weights.tensor_steps import recode, to_float32

NUMBERS = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32))
def test_every_container_holds_the_same_numbers(rows: int, length: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 16, (rows, length)).astype(np.uint8)
    values = NUMBERS[codes]
    e4m3 = values.astype(ml_dtypes.float8_e4m3fn).tobytes()
    bf16 = values.astype(ml_dtypes.bfloat16).tobytes()
    padded = np.pad(codes, ((0, 0), (0, length % 2)))
    packed = (padded[:, ::2] | padded[:, 1::2] << 4).tobytes()
    assert recode(e4m3, length, "e4m3", "packed") == packed == recode(bf16, length, "bf16", "packed")
    assert recode(packed, length, "packed", "e4m3") == e4m3 == recode(bf16, length, "bf16", "e4m3")


@pytest.mark.parametrize(
    ("container", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("bf16", ml_dtypes.bfloat16)]
)
def test_all_other_numbers_are_refused(container: str, dtype: type) -> None:
    bits = np.arange(256, dtype=np.uint8) if container == "e4m3" else np.arange(65536, dtype=np.uint16)
    values = bits.view(dtype).astype(np.float32)
    bad = ~np.isin(values, NUMBERS)
    for pattern in np.flatnonzero(bad)[:: 1 if container == "e4m3" else 997]:
        with pytest.raises(CheckpointError, match="x holds 1 numbers that are not in FP4") as e:
            recode(bits[[pattern, 0]].tobytes(), 2, container, "packed", "x")
        assert e.value.code == "E-CKP-04"
    good = bits[~bad]
    assert len(good) == 16 and len(recode(good.tobytes(), 16, container, "packed")) == 8


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_floats_are_widened_exactly(dtype: str) -> None:
    kinds = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
    bits = np.arange(65536, dtype=np.uint16)
    values = bits.view(np.float16 if dtype == "F16" else ml_dtypes.bfloat16)
    values = values[np.isfinite(values.astype(np.float32))].astype(kinds[dtype])
    found = np.frombuffer(to_float32(values.tobytes(), dtype, "x"), np.float32)
    assert np.array_equal(found, values.astype(np.float32))
    assert np.array_equal(np.signbit(found), np.signbit(values))


@pytest.mark.parametrize("value", [0.1, 1e300, 1e-60])
def test_float64_that_does_not_fit(value: float) -> None:
    with pytest.raises(CheckpointError, match="scale holds float64 numbers that float32 cannot hold") as e:
        to_float32(np.array([1.0, value]).tobytes(), "F64", "scale")
    assert e.value.code == "E-CKP-04"
