"""Elements against ml_dtypes, over all bit patterns, and the packing of 4-bit elements."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mx.blocks import every_bf16
from torch import Tensor

from ascendit.mx import elements
from ascendit.mx.formats import E2M1, E4M3, E5M2, Element

DTYPES: list[tuple[Element, Any]] = [
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
    (E2M1, ml_dtypes.float4_e2m1fn),
]
each = pytest.mark.parametrize(("element", "dtype"), DTYPES, ids=[e.name for e, _ in DTYPES])


def grid(element: Element) -> Tensor:
    """All non-negative numbers of the element in ascending order, float32."""
    top = elements.encode(torch.tensor([element.max]), element, "rint").item()
    return elements.decode(torch.arange(int(top) + 1, dtype=torch.uint8), element)


def hard_values(element: Element) -> Tensor:
    """All finite bfloat16 numbers, and all numbers and midpoints of the element with four neighbours each."""
    points = grid(element)
    points = torch.cat((points, (points[1:] + points[:-1]) / 2))
    bits = points.view(torch.int32).unsqueeze(0) + torch.arange(-2, 3, dtype=torch.int32).unsqueeze(1)
    near = bits.clamp(min=0).view(torch.float32).flatten()
    bf16 = every_bf16().float()
    return torch.cat((bf16[bf16.isfinite()], near, -near))


@each
def test_every_bit_pattern_decodes_as_in_ml_dtypes(element: Element, dtype: Any) -> None:
    qdata = np.arange(1 << element.bits, dtype=np.uint8)
    decoded = elements.decode(torch.from_numpy(qdata), element).numpy()
    expected = qdata.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded[expected == 0]), np.signbit(expected[expected == 0]))


@each
def test_rint_equals_the_saturated_cast_of_ml_dtypes(element: Element, dtype: Any) -> None:
    values = hard_values(element)
    expected = values.clamp(-element.max, element.max).numpy().astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(elements.encode(values, element, "rint").numpy(), expected)


@each
def test_the_other_roundings_pick_the_right_neighbour(element: Element, dtype: Any) -> None:
    """The neighbours are searched in the sorted numbers, in float64."""
    values = hard_values(element)
    positive = grid(element).double().numpy()
    numbers = np.concatenate((-positive[:0:-1], positive))
    clipped = values.double().numpy().clip(-element.max, element.max)
    below = numbers[np.searchsorted(numbers, clipped, side="right") - 1]
    above = numbers[np.searchsorted(numbers, clipped, side="left")]
    size = np.abs(clipped)
    low, high = np.minimum(np.abs(below), np.abs(above)), np.maximum(np.abs(below), np.abs(above))
    away = np.where(size - low >= high - size, high, low) * np.sign(clipped)
    for rounding, expected in (("floor", below), ("half_away", away)):
        decoded = elements.decode(elements.encode(values, element, rounding), element).double().numpy()
        np.testing.assert_array_equal(decoded, expected, err_msg=rounding)


@each
def test_the_sign_of_zero_is_preserved(element: Element, dtype: Any) -> None:
    tiny = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    sign = 1 << (element.bits - 1)
    assert elements.encode(tiny, element, "rint").tolist() == [0, sign, 0, sign]


@each
def test_infinity_saturates(element: Element, dtype: Any) -> None:
    qdata = elements.encode(torch.tensor([torch.inf, -torch.inf]), element, "rint")
    assert elements.decode(qdata, element).tolist() == [element.max, -element.max]


def test_the_even_index_is_in_the_low_nibble() -> None:
    assert elements.pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]


@given(
    st.lists(st.lists(st.integers(0, 15), min_size=7, max_size=7), min_size=1, max_size=4), st.integers(1, 7)
)
def test_pack_and_unpack_are_inverse(rows: list[list[int]], length: int) -> None:
    qdata = torch.tensor(rows, dtype=torch.uint8)[:, :length]
    packed = elements.pack(qdata)
    assert packed.shape == (len(rows), (length + 1) // 2)
    assert torch.equal(elements.unpack(packed, length), qdata)


def test_every_packed_byte_survives() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert torch.equal(elements.pack(elements.unpack(packed, 128)), packed)


@pytest.mark.parametrize("element", [E4M3, E5M2, E2M1], ids=lambda e: e.name)
def test_the_table_of_values_equals_decode(element: Element) -> None:
    raw = torch.arange(256, dtype=torch.uint8).view(2, 128)
    length = 128 if element.bits == 8 else 255
    unpacked = raw if element.bits == 8 else elements.unpack(raw, length)
    values = elements.decode_stored(raw, element, length)
    assert torch.equal(values.view(torch.int32), elements.decode(unpacked, element).view(torch.int32))
