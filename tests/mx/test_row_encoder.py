"""Encoding a weight in pieces: the same bits and constant as in one piece, and the error measured."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from mx import encoders
from mx.blocks import raw
from mx.encoders import reference_encode
from torch import Tensor

from ascendit.errors import UsageError
from ascendit.mx import msmodelslim
from ascendit.mx.codec import Encoded, decode, encode, sqnr
from ascendit.mx.formats import FORMATS
from ascendit.mx.row_encoder import RowEncoder, ScaleSearch, first_bad_row


@pytest.fixture(params=["native", "x86-64", "aarch64", "pytorch"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    encoders.use(request.param, monkeypatch)
    yield request.param
    encoders.forget()


RULES = [
    (fmt.name, rule + ("7.25" if rule.endswith(":") else ""), dtype)
    for fmt in FORMATS.values()
    for rule in fmt.rules
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    if not (rule.startswith("msms:") and dtype == torch.float16)
]


def weight(rows: int = 70, length: int = 1111, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(rows, length) * 0.02).to(dtype)


def tensors(encoded: Encoded) -> list[Tensor]:
    parts = (encoded.qdata, encoded.scale, encoded.dual_scale)
    return [raw(t).clone() for t in parts if t is not None]


@pytest.mark.parametrize("fmt", FORMATS)
def test_pieces_equal_the_complete_weight(variant: str, fmt: str) -> None:
    size = FORMATS[fmt].tile or 32
    x = weight(2 * size + 6)
    encoder = RowEncoder(fmt, 1111, max_rows=size)
    pieces = [tensors(encoder(piece)) for piece in x.split(size)]
    for pieces_of_tensor, expected in zip(zip(*pieces, strict=True), tensors(encode(x, fmt)), strict=True):
        assert torch.equal(torch.cat(pieces_of_tensor), expected)


def uneven_weight(rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different size, a row and a block of zeros, subnormals."""
    drawn = torch.randn(rows, length) * torch.exp2(torch.linspace(-20, 10, rows)).unsqueeze(1)
    drawn[3] = 0
    drawn[4, :32] = 0
    drawn[5] *= 1e-30
    return drawn.to(dtype)


@pytest.mark.parametrize("length", [32, 100, 33, 1030])
@pytest.mark.parametrize(("fmt", "rule", "dtype"), RULES)
def test_every_rule_equals_encode(fmt: str, rule: str, dtype: torch.dtype, length: int) -> None:
    encoder = RowEncoder(
        fmt, length, dtype=dtype, max_rows=64, scale_rule=rule, measure=True, buffers=3, threads=1
    )
    rows = uneven_weight(50, length, dtype)
    for count in (50, 7):  # reuses each buffer
        encoded = [encoder(rows[:count]) for _ in range(4)][-1]
        assert first_bad_row(encoded, rows[:count]) is None
        for actual, expected in zip(
            tensors(encoded), tensors(encode(rows[:count], fmt, scale_rule=rule)), strict=True
        ):
            assert torch.equal(actual, expected)
    encoder.restart()
    encoder(rows)
    decoded = decode(encode(rows, fmt, scale_rule=rule))
    assert encoder.sqnr == pytest.approx(sqnr(rows, decoded), abs=1e-3)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4", "mxfp4_dualscale", "int8", "fp8", "fp8_128x128"])
def test_a_row_that_is_not_finite_is_detected(variant: str, fmt: str, value: float) -> None:
    rows = uneven_weight(50, 100, torch.bfloat16)
    rows[17, 99] = rows[30, 0] = value
    encoded = RowEncoder(fmt, 100, max_rows=64)(rows)
    assert first_bad_row(encoded, rows) == 17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS)
def test_signal_and_noise(variant: str, fmt: str, dtype: torch.dtype) -> None:
    size = FORMATS[fmt].tile or 32
    x = weight(2 * size + 6, dtype=dtype)
    encoder = RowEncoder(fmt, 1111, max_rows=size, dtype=dtype, measure=True)
    for piece in x.split(size):
        encoder(piece)
    exact, back = x.double(), decode(reference_encode(x, fmt)).double()
    assert encoder.sums[0].item() == pytest.approx(float(exact.square().sum()), rel=1e-12)
    assert encoder.sums[1].item() == pytest.approx(float((exact - back).square().sum()), rel=1e-12)
    assert encoder.sqnr == pytest.approx(sqnr(x, back), abs=1e-4)


def test_signal_and_noise_of_unusual_values(variant: str) -> None:
    encoder = RowEncoder("mxfp4", 40, max_rows=2, measure=True)
    assert encoder.sqnr == math.inf
    encoder(torch.zeros(2, 40, dtype=torch.bfloat16))
    assert encoder.sums.tolist() == [0, 0]
    encoder(torch.full((2, 40), 1.5, dtype=torch.bfloat16))
    assert encoder.sums[0].item() == 180 and encoder.sqnr == math.inf
    tiny = torch.full((1, 40), 1e-30, dtype=torch.bfloat16)  # its square underflows in float32
    error = tiny.double() - decode(encoder(tiny)).double()
    assert 0 < encoder.sums[1].item() == pytest.approx(float(error.square().sum()), rel=1e-9)
    encoder(torch.full((1, 40), torch.nan, dtype=torch.bfloat16))
    assert math.isnan(encoder.sqnr)


def test_restart_resets_the_measurement() -> None:
    encoder = RowEncoder("mxfp8", 32, max_rows=8, measure=True)
    encoder(uneven_weight(8, 32, torch.bfloat16))
    assert encoder.sums[1].item() > 0
    encoder.restart()
    encoder(torch.ones(8, 32, dtype=torch.bfloat16))
    assert encoder.sqnr == torch.inf


def test_results_are_valid_while_the_other_buffers_are_filled() -> None:
    encoder = RowEncoder("mxfp4_dualscale", 1111, max_rows=32, buffers=3)
    results = [encoder(weight(32)) for _ in range(3)]
    copies = [tensors(result) for result in results]
    assert len({result.qdata.data_ptr() for result in results}) == 3
    last = encoder(weight(32))
    assert last.qdata.data_ptr() == results[0].qdata.data_ptr()
    for result, before in zip(results[1:], copies[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(result), before, strict=True))


def test_buffers_are_reused_and_nothing_is_written_past_the_rows() -> None:
    encoder = RowEncoder("mxfp4_dualscale", 1111, max_rows=32)
    first = encoder(weight(32))
    assert first.dual_scale is not None
    before = tensors(first)
    second = encoder(weight(3))
    assert second.dual_scale is not None
    for a, b in zip(
        (first.qdata, first.scale, first.dual_scale),
        (second.qdata, second.scale, second.dual_scale),
        strict=True,
    ):
        assert a.data_ptr() == b.data_ptr()
    for current, old in zip(tensors(first), before, strict=True):
        assert torch.equal(current[3:], old[3:]) and not torch.equal(current[:3], old[:3])


def test_rows_of_a_view() -> None:
    x = weight(64, 96)
    encoder = RowEncoder("mxfp8", 64, max_rows=96)
    assert tensors(encoder(x.t()))[0].equal(tensors(encode(x.t(), "mxfp8"))[0])


# ---- the search ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_the_search_in_pieces_equals_that_of_the_complete_weight(
    variant: str, spread: float, dtype: torch.dtype
) -> None:
    x = (torch.randn(60, 1111) * torch.exp(spread * torch.randn(60, 1)) * 0.02).to(dtype)
    x[7, 100] = torch.nan
    search = ScaleSearch()
    for piece in x.split(7):
        search.add(piece)
    assert search._sums.tolist() == pytest.approx(msmodelslim.ceil_x_sums(x), rel=1e-12)
    complete = reference_encode(x, "mxfp4", scale_rule="msms:ceil_x:search")
    expected = reference_encode(x, "mxfp4", scale_rule=search.best())
    assert torch.equal(complete.qdata, expected.qdata) and torch.equal(complete.scale, expected.scale)


def test_the_first_of_equal_errors_wins(variant: str) -> None:
    """One block has only two possible scales, and all constants with the same scale have the same error."""
    search = ScaleSearch()
    search.add(torch.tensor([[3.4] + [0.7] * 31]).bfloat16())
    sums = search._sums.tolist()
    assert len(set(sums)) == 2
    assert search.best() == f"msms:ceil_x:{msmodelslim.CEIL_X_CANDIDATES[sums.index(min(sums))]:g}"


def test_the_best_without_rows() -> None:
    assert ScaleSearch().best() == "msms:ceil_x:6"


# ---- errors -------------------------------------------------------------------------------------


def test_the_search_is_not_a_rule_for_rows() -> None:
    with pytest.raises(UsageError, match="mx.row_encoder.ScaleSearch") as caught:
        RowEncoder("mxfp4", 64, max_rows=2, scale_rule="msms:ceil_x:search")
    assert caught.value.code == "E-USE-01"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (torch.zeros(3, 64).bfloat16(), r"rows of shape \(3, 64\) and dtype torch.bfloat16"),
        (torch.zeros(0, 64).bfloat16(), r"needs  torch.bfloat16 \[1 to 2, 64\]"),
        (torch.zeros(2, 64), r"rows of shape \(2, 64\) and dtype torch.float32"),
        (torch.zeros(64).bfloat16(), r"rows of shape \(64,\) and dtype torch.bfloat16"),
        (torch.zeros(2, 32).bfloat16(), "needs  rows of 64"),
    ],
)
def test_wrong_rows(rows: Tensor, text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        RowEncoder("mxfp8", 64, max_rows=2)(rows)
    assert caught.value.code == "E-USE-01"


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("nf4", {}),
        ("mxfp8", {"scale_rule": "best"}),
        ("mxfp8", {"dtype": torch.float64}),
    ],
)
def test_wrong_encoders(fmt: str, options: dict) -> None:
    with pytest.raises(UsageError) as caught:
        RowEncoder(fmt, 64, max_rows=2, **options)
    assert caught.value.code == "E-USE-01"
