"""FRACTAL_NZ: the order of the bytes, a tag on the storage, and wrong numbers when read as ND."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from ascendit.twin import nz
from ascendit.twin.contract import TwinError

npu = torch.ops.npu


def cast(t: torch.Tensor) -> torch.Tensor:
    return npu.npu_format_cast(t, 29)


def test_the_order_of_the_bytes_is_the_vendors() -> None:
    """[R, C] of one byte -> [C / 32, R / 16, 16, 32]."""
    w = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    raw = torch.empty(0, dtype=torch.int8).set_(cast(w).untyped_storage()).view(2, 2, 16, 32)
    for r, c in ((0, 0), (0, 33), (17, 5), (31, 63)):
        assert raw[c // 32, r // 16, r % 16, c % 32] == w[r, c]


@pytest.mark.parametrize("shape", [(16, 32), (33, 70), (5, 6), (2, 20, 40)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_a_cast_back_restores_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = (torch.randn(shape) * 20).to(dtype)
    packed = cast(w)
    assert packed.shape == w.shape and packed.stride() == w.stride() and packed.dtype == dtype
    back = npu.npu_format_cast(packed, 2)
    assert torch.equal(back.view(torch.uint8), w.view(torch.uint8)) and npu.get_npu_format(back) != 29


def test_reading_nz_as_nd_gives_other_numbers() -> None:
    w = torch.randn(48, 96).bfloat16()
    packed = cast(w)
    assert not torch.equal(packed, w) and not torch.equal(packed.clone(), w)
    # The same values in another order:
    assert torch.equal(packed.flatten().sort().values, w.flatten().sort().values)
    x = torch.randn(4, 96).bfloat16()
    right, wrong = x.float() @ w.float().t(), x.float() @ packed.float().t()
    assert (right - wrong).norm() > right.norm()


def test_the_tag_is_on_the_storage() -> None:
    packed = cast(torch.randn(16, 64).bfloat16())
    views = [packed.t(), packed.detach(), packed.view(torch.int16), torch.nn.Parameter(packed, False)]
    del packed
    gc.collect()
    assert [npu.get_npu_format(v) for v in views] == [29] * 4
    assert npu.get_npu_format(views[0].clone()) == 2  # and the bytes of a copy are still permuted
    assert [npu.get_npu_format(torch.empty([1] * n)) for n in (2, 3, 4, 5)] == [2, 2, 0, 30]


def test_a_matmul_reads_nz_transposed_and_refuses_slices() -> None:
    w, x = torch.randn(32, 64).bfloat16(), torch.randn(4, 64).bfloat16()
    (q, s), (wq, ws) = npu.npu_dynamic_quant(x), npu.npu_dynamic_quant(w)
    expected = npu.npu_quant_matmul(q, wq.t(), ws, pertoken_scale=s, output_dtype=torch.bfloat16)
    for weight in (cast(wq).t(), cast(wq.t().contiguous())):
        assert torch.equal(expected, npu.npu_quant_matmul(q, weight, ws, pertoken_scale=s, output_dtype=15))
    misread = npu.npu_quant_matmul(q, cast(wq).clone().t(), ws, pertoken_scale=s, output_dtype=15)
    assert (misread - expected).float().norm() > 0.5 * expected.float().norm()
    with pytest.raises(
        TwinError, match=r"a view \(64, 16\).*FRACTAL_NZ.*\n.*whole tensor.*\n.*slice or reshape before"
    ):
        npu.npu_quant_matmul(q, cast(wq)[:16].t(), ws[:16], pertoken_scale=s, output_dtype=15)


def test_mxfp8_and_mxfp4_weights() -> None:
    x, w = torch.randn(4, 128).bfloat16(), torch.randn(32, 128).bfloat16()
    mx = {"scale_dtype": 293, "pertoken_scale_dtype": 293, "group_sizes": [1, 1, 32], "output_dtype": 15}
    (q, s), (wq, ws) = (npu.npu_dynamic_mx_quant(t, dst_type=292) for t in (x, w))
    expected = npu.npu_quant_matmul(q, wq.t(), ws.transpose(0, 1), pertoken_scale=s, **mx)
    blocked = npu.npu_quant_matmul(q, cast(wq).t(), ws.transpose(0, 1), pertoken_scale=s, **mx)
    assert torch.equal(expected, blocked)
    (q, s), (wq, ws) = (npu.npu_dynamic_mx_quant(t) for t in (x, w))
    fp4 = {**mx, "x1_dtype": 296, "x2_dtype": 296, "pertoken_scale": s}
    expected = npu.npu_quant_matmul(q, wq.t(), ws.transpose(0, 1), **fp4)
    weight = npu.npu_format_cast(wq.view(torch.int8), 29, customize_dtype=torch.int8)
    assert torch.equal(expected, npu.npu_quant_matmul(q, weight.t(), ws.transpose(0, 1), **fp4))
    with pytest.raises(TwinError, match=r"cast without customize_dtype"):
        npu.npu_quant_matmul(q, cast(wq).t(), ws.transpose(0, 1), **fp4)


@pytest.mark.parametrize("chip", ["a2", "a3"])
def test_a2_and_a3_need_the_internal_format(on: Callable[[str], None], chip: str) -> None:
    import ascendit.twin

    on(chip)
    w = torch.randn(16, 32).half()
    with pytest.warns(UserWarning, match=r"returns ND.*allow_internal_format"):
        unchanged = cast(w)
    assert npu.get_npu_format(unchanged) == 2 and torch.equal(unchanged, w)
    ascendit.twin.allow_internal_format(True)
    assert npu.get_npu_format(cast(w)) == 29


def test_fake_tensors_have_no_format() -> None:
    meta = torch.empty(16, 32, dtype=torch.int8, device="meta")
    out = npu.npu_format_cast(meta, 29, customize_dtype=torch.int8)
    assert out.shape == meta.shape and nz.fractal(out) is None
