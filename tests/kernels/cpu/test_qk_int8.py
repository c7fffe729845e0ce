"""The kernel `qk_int8` against its definition, and both against int8 scores and attention in float64."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ascendit.device.attention_kernels import attention_probabilities
from ascendit.device.device import parse_device
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels import quantized_attention
from ascendit.kernels.cpu import qk_int8
from ascendit.kernels.kernel import Wish
from ascendit.native.build import Built
from ascendit.ops.select import select

RECORDED = Path(__file__).parents[2] / "fixtures/attention/demo.safetensors"
BF16 = 2.4e-3
"""Relative error of an output whose probabilities and values are rounded to BF16."""
SHAPES = [  # queries, keys, heads, d
    (1, 1, 1, 64),
    (47, 31, 2, 128),
    (48, 256, 1, 64),
    (49, 257, 3, 128),
    (130, 609, 2, 64),
    (50, 300, 1, 128),
    (1, 520, 2, 64),
]


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of this machine, with the log-sum-exp."""
    if problem := qk_int8.missing():
        pytest.skip(problem)
    out, lse = qk_int8.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(qk_int8.attention(q, k, v), out, rtol=0, atol=0, equal_nan=True)
    return out, lse


def operands(s: int, length: int, heads: int, d: int, batch: int = 1) -> tuple[Tensor, ...]:
    """Keys have a mean, as those of models."""
    q, k, v = (torch.randn(batch, n, heads, d) for n in (s, length, length))
    return q.bfloat16(), (k + 3 * torch.randn(1, 1, heads, d)).bfloat16(), v.bfloat16()


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [.., d] -> integers and the scale of each row, in float64; divided in float32, for its ties."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale.where(scale > 0, 1)).round().double(), scale.double()


def in_float64(q: Tensor, k: Tensor, v: Tensor, *, int8: bool) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in float64, with scores from int8 or exact ones."""
    pairs = "bshd,blhd->bhsl"
    scores = torch.einsum(pairs, q.double(), k.double())
    if int8:
        mean = k.double().mean(1, keepdim=True).float()
        (qn, qs), (kn, ks) = rows(q.float()), rows(k.float() - mean)
        scores = torch.einsum(pairs, qn, kn) * torch.einsum(pairs, qs, ks)
        scores += torch.einsum(pairs, q.double(), mean.double())
    scores *= q.shape[-1] ** -0.5
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_definition_against_int8_scores_in_float64(shape: tuple[int, int, int, int]) -> None:
    q, k, v = operands(*shape, batch=2)
    expected, lse = in_float64(q, k, v, int8=True)
    definition = quantized_attention.qk_int8(q, k, v, return_lse=True)
    for (out, sums), limit in ((definition, BF16), (attention(q, k, v), 1.3 * BF16)):
        assert out.dtype == torch.bfloat16 and out.shape == q.shape
        assert sums.dtype == torch.float32 and sums.shape == lse.shape
        assert relative(out, expected) < limit
        torch.testing.assert_close(sums.double(), lse, rtol=0, atol=1e-4)


def test_two_numbers_per_probability_leave_the_rounding_of_the_output() -> None:
    q, k, v = operands(130, 600, 2, 128)
    expected = in_float64(q, k, v, int8=True)[0]
    with attention_probabilities("two"):
        out = attention(q, k, v)[0]
    assert relative(out, expected) < 1.02 * relative(expected.bfloat16(), expected)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_error_against_exact_attention(shape: tuple[int, int, int, int]) -> None:
    q, k, v = operands(*shape)
    out, lse = attention(q, k, v)
    expected, exact_lse = in_float64(q, k, v, int8=False)
    assert relative(out, expected) < 1.5e-2
    assert (lse - exact_lse).abs().max() < 2e-2


@pytest.mark.parametrize("call", ["self.step2.block3", "self.step9.block3", "text.step0.block7"])
def test_error_on_recorded_calls_of_the_demo_model(call: str) -> None:
    tensors = load_file(RECORDED)
    q, k, v = (tensors[f"{call}.{name}"] for name in "qkv")
    expected, exact_lse = in_float64(q, k, v, int8=False)
    for out, lse in (attention(q, k, v), quantized_attention.qk_int8(q, k, v, return_lse=True)):
        assert relative(out, expected) < 1e-2  # 2.5e-2 is the limit of this kernel
        assert (lse - exact_lse).abs().max() < 6e-2


def test_keys_far_from_zero_keep_their_precision() -> None:
    """Multiples of 16 around 4096, which BF16 holds; int8 of the keys themselves would equal each other."""
    q, _, v = operands(60, 300, 2, 64)
    far = (4096 + 16 * torch.randn(1, 300, 2, 64).round()).bfloat16()
    q = q / 16
    out = attention(q, far, v)[0]
    assert relative(out, in_float64(q, far, v, int8=False)[0]) < 2e-2


def test_zeros_and_constant_keys_average_the_values() -> None:
    q, k, v = operands(60, 300, 2, 64)
    zero = torch.zeros_like(q)
    mean = v.double().mean(1, keepdim=True).expand(q.shape)
    constant = k[:, :1].expand(k.shape)
    for queries, keys in ((zero, k), (q, torch.zeros_like(k)), (q, constant)):
        out, lse = attention(queries, keys, v)
        assert relative(out, mean) < BF16
        expected = in_float64(queries, keys, v, int8=False)[1]
        torch.testing.assert_close(lse.double(), expected, rtol=0, atol=1e-4)


def test_an_outlier_costs_only_its_own_row_precision() -> None:
    q, k, v = operands(60, 300, 2, 64)
    before = attention(q, k, v)[0]
    q[0, 7, 1, 5] = 2000
    out, lse = attention(q, k, v)
    assert (out != before).any(-1)[0].nonzero().tolist() == [[7, 1]]
    expected, sums = in_float64(q, k, v, int8=True)
    assert relative(out, expected) < 1.3 * BF16
    torch.testing.assert_close(lse.double(), sums, rtol=1e-6, atol=1e-4)


def test_scores_of_several_thousand() -> None:
    q, k, v = operands(60, 600, 2, 128)
    q, k = q * 30, k * 30
    out, lse = attention(q, k, v)
    expected, sums = in_float64(q, k, v, int8=True)
    assert relative(out, expected) < 1e-2
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=0)


def test_nan_stays_in_its_query_or_its_head() -> None:
    q, k, v = operands(9, 40, 2, 64)
    q[0, 3, 1, 7] = torch.nan
    out = attention(q, k, v)[0]
    assert out[0, 3, 1].isnan().all()
    assert out.isnan().sum() == 64
    k[0, 11, 0, 2] = torch.nan
    assert attention(q, k, v)[0][0, :, 0].isnan().all()


def test_reads_views_and_leaves_inputs_alone() -> None:
    whole = torch.randn(2, 70, 3, 3, 64).bfloat16()
    before, views = whole.clone(), tuple(whole.unbind(3))
    out, lse = attention(*views)
    copies = attention(*(t.contiguous() for t in views))
    assert torch.equal(out, copies[0]) and torch.equal(lse, copies[1]) and torch.equal(whole, before)
    alone = attention(*(t[1:] for t in views))
    assert torch.equal(out[1:], alone[0]) and torch.equal(lse[1:], alone[1])


def test_same_bytes_on_any_number_of_threads() -> None:
    q, k, v = operands(200, 300, 3, 64)
    torch.set_num_threads(2)
    many = attention(q, k, v)
    torch.set_num_threads(1)
    one = attention(q, k, v)
    assert torch.equal(one[0], many[0]) and torch.equal(one[1], many[1])


def test_chosen_only_on_request() -> None:
    attention(*operands(1, 1, 1, 64))
    cpu = parse_device("cpu")
    assert select("attention", cpu, Wish()).name != "qk_int8"
    kernel = select("attention", cpu, Wish(names={"attention": "qk_int8"}))
    assert kernel.call is qk_int8.attention and kernel.needs == "native/attention_int8.cpp"


@pytest.mark.parametrize(
    ("d", "length", "dtype"),
    [
        (32, 9, torch.bfloat16),
        (96, 9, torch.bfloat16),
        (320, 9, torch.bfloat16),
        (64, 0, torch.bfloat16),
        (64, 9, torch.float16),
        (64, 9, torch.float32),
    ],
)
def test_other_inputs_are_refused(d: int, length: int, dtype: torch.dtype) -> None:
    q, k = torch.zeros(1, 5, 1, d, dtype=dtype), torch.zeros(1, length, 1, d, dtype=dtype)
    with pytest.raises(UsageError, match=f"{length} keys.*head size {d}") as error:
        qk_int8.attention(q, k, k)
    assert error.value.code == "E-USE-01"


def test_a_machine_without_the_instructions() -> None:
    q, k, v = operands(5, 9, 1, 64)
    absent = Built(None, "this processor has no avx512_vnni")
    with mock.patch.object(qk_int8, "library", lambda: absent):
        with pytest.raises(EnvironmentProblem, match="avx512_vnni"):
            qk_int8.attention(q, k, v)
        with pytest.raises(EnvironmentProblem, match="avx512_vnni"):
            select("attention", parse_device("cpu"), Wish(names={"attention": "qk_int8"}))
