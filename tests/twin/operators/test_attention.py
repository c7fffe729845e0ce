"""Attention operators against float64 softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ascendit.device.attention_kernels import attention_probabilities
from ascendit.kernels import reference

npu, mindie = torch.ops.npu, torch.ops.mindiesd
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _accurate_probabilities() -> Iterator[None]:
    """`close` allows for the rounding of the output alone."""
    with attention_probabilities("two"):
        yield


def exact(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float64 output and log of the sum of exponentials; [B, N, S, D]."""
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.mT * q.shape[-1] ** -0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


def close(actual: Tensor, expected: Tensor) -> None:
    limit = expected.abs() * STEP[actual.dtype] + 1e-5
    assert ((actual.double() - expected).abs() <= limit).all(), float(
        (actual.double() - expected).abs().max()
    )


def qkv(
    dtype: torch.dtype = torch.bfloat16, b: int = 2, n: int = 3, s: int = 300, keys: int = 70, d: int = 32
) -> Any:
    return [torch.randn(b, n, length, d).to(dtype) for length in (s, keys, keys)]


@pytest.mark.parametrize("dtype", list(STEP))
def test_fusion_attention_and_its_statistics(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype)
    out, top, total, empty, *numbers = npu.npu_fusion_attention(q, k, v, 3, "BNSD", scale=32**-0.5)
    expected, lse = exact(q, k, v)
    close(out, expected)
    assert top.shape == total.shape == (2, 3, 300, 8) and empty.shape == (0,) and numbers == [0, 0, 0]
    assert torch.allclose((top + torch.log(total)).double(), lse[..., None].expand(-1, -1, -1, 8), atol=1e-5)


@pytest.mark.parametrize("layout", ["BSND", "BSH", "SBH"])
def test_layouts(layout: str) -> None:
    q, k, v = qkv(torch.float32)
    order = {"BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3)}[layout]

    def to_layout(t: Tensor) -> Tensor:
        t = t.permute(order)
        return t.flatten(2) if "H" in layout else t

    out = npu.npu_fusion_attention(to_layout(q), to_layout(k), to_layout(v), 3, layout, scale=32**-0.5)[0]
    close(out, to_layout(exact(q, k, v)[0]))
    if layout == "BSND":
        assert torch.allclose(out, reference.attention(to_layout(q), to_layout(k), to_layout(v)), atol=1e-5)


def test_grouped_heads() -> None:
    q, k, v = (torch.randn(1, n, 9, 16).half() for n in (4, 2, 2))
    close(npu.npu_fusion_attention(q, k, v, 4, "BNSD", scale=0.25)[0], exact(q, k, v)[0])
    kwargs = {"num_query_heads": 4, "num_key_value_heads": 2, "softmax_scale": 0.25, "input_layout": "BNSD"}
    close(npu.npu_fused_infer_attention_score_v2(q, k, v, **kwargs)[0], exact(q, k, v)[0])


@pytest.mark.parametrize("shape", ["SS", "11SS", "B1SS", "BNSS"])
def test_a_mask_is_true_where_keys_are_masked_out(shape: str) -> None:
    q, k, v = qkv(torch.float32, s=20, keys=30)
    sizes = {"S": 0, "1": 1, "B": 2, "N": 3}
    keep = torch.rand([*(sizes[c] for c in shape[:-2]), 20, 30]) < 0.5
    keep[..., 0] = True
    out = npu.npu_fusion_attention(q, k, v, 3, "BNSD", atten_mask=~keep, scale=32**-0.5)[0]
    close(out, exact(q, k, v, keep)[0])
    sdpa = F.scaled_dot_product_attention(q, k, v, keep)
    assert torch.allclose(out, sdpa, atol=1e-5)
    kwargs = {"num_query_heads": 3, "softmax_scale": 32**-0.5, "input_layout": "BNSD", "atten_mask": ~keep}
    half = [t.half() for t in (q, k, v)]
    out = npu.npu_fused_infer_attention_score_v2(*half, **kwargs)[0]
    close(out, exact(half[0], half[1], half[2], keep)[0])


def test_packed_sequences_do_not_see_each_other() -> None:
    q, k, v = (torch.randn(n, 2, 16).half() for n in (7, 9, 9))
    ends = {"actual_seq_qlen": [3, 7], "actual_seq_kvlen": [4, 9]}
    out, top, total = npu.npu_fusion_attention(q, k, v, 2, "TND", scale=0.25, **ends)[:3]
    parts = [(slice(0, 3), slice(0, 4)), (slice(3, 7), slice(4, 9))]
    separate = [exact(*(t[None, s].transpose(1, 2) for t, s in ((q, a), (k, b), (v, b)))) for a, b in parts]
    close(out, torch.cat([o[0].transpose(0, 1) for o, _ in separate]))
    assert top.shape == (7, 2, 8)
    lse = torch.cat([x[0].t() for _, x in separate])
    assert torch.allclose((top + torch.log(total))[..., 0].double(), lse, atol=1e-5)
    kwargs = {"num_query_heads": 2, "softmax_scale": 0.25, "input_layout": "TND", "return_softmax_lse": True}
    again, ours = npu.npu_fused_infer_attention_score_v2(q, k, v, **kwargs, **ends)
    close(again, torch.cat([o[0].transpose(0, 1) for o, _ in separate]))
    assert ours.shape == (7, 2, 1) and torch.allclose(ours[..., 0].double(), lse, atol=1e-5)


def test_infer_attention_can_transpose_its_output() -> None:
    q, k, v = qkv()
    kwargs = {"num_query_heads": 3, "softmax_scale": 32**-0.5}
    plain, lse = npu.npu_fused_infer_attention_score_v2(
        q, k, v, input_layout="BNSD", return_softmax_lse=True, **kwargs
    )
    expected, exact_lse = exact(q, k, v)
    close(plain, expected)
    assert lse.shape == (2, 3, 300, 1) and torch.allclose(lse[..., 0].double(), exact_lse, atol=1e-5)
    transposed, no_lse = npu.npu_fused_infer_attention_score_v2(q, k, v, input_layout="BNSD_BSND", **kwargs)
    assert torch.equal(transposed, plain.transpose(1, 2)) and no_lse.shape == (0,)
    first, _ = npu.npu_fused_infer_attention_score(q, k, v, num_heads=3, scale=32**-0.5, input_layout="BNSD")
    assert torch.equal(first, plain)


def test_key_lengths() -> None:
    q, k, v = qkv(torch.float16, s=5, keys=12)
    kwargs = {
        "num_query_heads": 3,
        "softmax_scale": 32**-0.5,
        "input_layout": "BNSD",
        "actual_seq_kvlen": [12, 4],
    }
    keep = torch.arange(12) < torch.tensor([12, 4])[:, None, None, None]
    close(npu.npu_fused_infer_attention_score_v2(q, k, v, **kwargs)[0], exact(q, k, v, keep)[0])


def test_prompt_attention_with_a_mask_is_causal_by_default(on: Callable[[str], None]) -> None:
    on("a2")
    q, k, v = qkv(torch.float16, s=10, keys=10)
    kwargs = {"num_heads": 3, "scale_value": 32**-0.5, "input_layout": "BNSD"}
    close(npu.npu_prompt_flash_attention(q, k, v, **kwargs), exact(q, k, v)[0])
    no_mask = torch.zeros(10, 10, dtype=torch.bool)
    causal = npu.npu_prompt_flash_attention(q, k, v, atten_mask=no_mask, **kwargs)
    close(causal, exact(q, k, v, torch.ones(10, 10).tril().bool())[0])
    full = npu.npu_prompt_flash_attention(q, k, v, atten_mask=no_mask, next_tokens=2147483647, **kwargs)
    close(full, exact(q, k, v)[0])


# ---- quantized -----------------------------------------


def sqnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(a.double().square().sum() / (a.double() - b.double()).square().sum()))


def test_fp8_attention_in_blocks() -> None:
    q, k, v = qkv(b=1, n=2, s=300, keys=520, d=128)
    quantized = [
        npu.npu_dynamic_block_quant(t[0], dst_type=292, row_block_size=rows, col_block_size=128)
        for t, rows in ((q, 128), (k, 256), (v, 256))
    ]
    modes = {f"{n}_quant_mode": 7 for n in ("query", "key", "value")}
    scales = {
        f"dequant_scale_{n}": s[None] for n, (_, s) in zip(("query", "key", "value"), quantized, strict=True)
    }
    kwargs = {
        "num_query_heads": 2,
        "softmax_scale": 128**-0.5,
        "input_layout": "BNSD",
        "out_dtype": torch.bfloat16,
    }
    qdata = [c[None] for c, _ in quantized]
    out = npu.npu_fused_infer_attention_score_v2(*qdata, **modes, **scales, **kwargs)[0]
    decoded = [
        c.double() * s[None].double().repeat_interleave(r, 2)[:, :, : c.shape[2]]
        for (c, (_, s), r) in zip(qdata, quantized, (128, 256, 256), strict=True)
    ]
    close(out, exact(*decoded)[0])
    assert 20 < sqnr(exact(q, k, v)[0], out) < 60
    again = mindie.fused_infer_attention_score_v2(*qdata, **modes, **scales, **kwargs)[0]
    assert torch.equal(out, again)


def test_mxfp8_attention() -> None:
    q, k, v = (torch.randn(t, 2, 64).bfloat16() for t in (40, 64, 64))
    (qc, qs), (kc, ks) = (npu.npu_dynamic_mx_quant(t, dst_type=292) for t in (q, k))
    vc, vs = npu.npu_dynamic_mx_quant(v, dst_type=292, axis=0)
    out = npu.npu_fused_infer_attention_score_v2(
        qc,
        kc,
        vc,
        **{f"dequant_scale_{n}": s for n, s in (("query", qs), ("key", ks), ("value", vs))},
        **{f"dequant_scale_{n}_dtype": 293 for n in ("query", "key", "value")},
        query_quant_mode=6,
        key_quant_mode=6,
        value_quant_mode=8,
        num_query_heads=2,
        softmax_scale=0.125,
        input_layout="TND",
        actual_seq_qlen=[40],
        actual_seq_kvlen=[64],
        out_dtype=15,
    )[0]
    back = [
        npu.npu_anti_mx_quant(c, s, axis=a, dst_type=6)
        for c, s, a in ((qc, qs, -1), (kc, ks, -1), (vc, vs, 0))
    ]
    close(out, exact(*(t[None].transpose(1, 2) for t in back))[0][0].transpose(0, 1))


# ---- sparse -----------------------------------------


def spread(mask: Tensor, s: int, keys: int, rows: int = 128, columns: int = 128) -> Tensor:
    return mask.bool().repeat_interleave(rows, 2)[:, :, :s].repeat_interleave(columns, 3)[..., :keys]


def sparse_mask() -> Tensor:
    mask = torch.randint(0, 2, (1, 2, 3, 3), dtype=torch.int8)
    mask[..., 1] = 1
    return mask


def test_block_sparse_attention(on: Callable[[str], None]) -> None:
    q, k, v = qkv(b=1, n=2, s=300, keys=290, d=64)
    mask = sparse_mask()
    expected, lse = exact(q, k, v, spread(mask, 300, 290))
    kwargs = {"num_key_value_heads": 2, "scale_value": 0.125}
    out, ours = mindie.block_sparse_attention(q, k, v, mask, inner_precise=4, **kwargs)
    close(out, expected)
    assert ours.shape == (1, 2, 300, 1) and torch.allclose(ours[..., 0].double(), lse, atol=1e-5)
    on("a2")
    layouts = {"q_input_layout": "BNSD", "kv_input_layout": "BNSD"}
    again = npu.npu_block_sparse_attention(q, k, v, mask, [128, 128], inner_precise=0, **layouts, **kwargs)[0]
    assert torch.equal(again, out)


def test_rain_fusion_takes_block_indices(on: Callable[[str], None]) -> None:
    on("a2")
    q, k, v = (torch.randn(300, 2, 64).bfloat16() for _ in range(3))
    mask = sparse_mask()
    count = mask[0].sum(-1).transpose(0, 1)
    order = torch.argsort(mask[0], dim=-1, descending=True, stable=True).transpose(0, 1)
    out, lse = mindie.rainfusionattention(q, k, v, order, count, [128, 128], head_num=2, scale=0.125)
    bnsd = [t[None].transpose(1, 2) for t in (q, k, v)]
    expected = exact(bnsd[0], bnsd[1], bnsd[2], spread(mask, 300, 300))
    close(out, expected[0][0].transpose(0, 1))
    assert lse.shape == (300, 2, 1)


def test_laser_attention_ignores_padding(on: Callable[[str], None]) -> None:
    on("a3")
    q, k, v = (torch.randn(1, 2, 256, 128).half() for _ in range(3))
    lse, out = mindie.la(q, k, v, scale_value=128**-0.5, head_num=2, pre_tokens=56)
    keep = torch.arange(256) < 200
    expected, log = exact(q, k, v, keep)
    assert lse.dtype == out.dtype == torch.float32
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.allclose(lse.double(), log, atol=1e-5)


# ---- merging -----------------------------------------


def halves() -> tuple[list[Tensor], list[Any], Tensor, Tensor]:
    """Attention over each half of the keys, and over all keys."""
    q, k, v = qkv(torch.float32, b=1, s=6, keys=40)
    parts = [(k[:, :, :25], v[:, :, :25]), (k[:, :, 25:], v[:, :, 25:])]
    results = [npu.npu_fusion_attention(q, a, b, 3, "BNSD", scale=32**-0.5)[:3] for a, b in parts]
    return [d[0] for d in results], results, *exact(q, k, v)


def test_partial_results_merge_by_lse() -> None:
    outs, results, expected, lse = halves()
    logs = [(top + torch.log(total))[..., 0].flatten() for _, top, total in results]
    merged, log = npu.npu_attention_update(logs, [o.flatten(0, 2) for o in outs], 1)
    close(merged, expected.flatten(0, 2))
    assert torch.allclose(log.double(), lse.flatten(), atol=1e-5)


def test_partial_results_merge_in_a_ring() -> None:
    outs, results, expected, lse = halves()
    sbh = [o.permute(2, 0, 1, 3).flatten(2) for o in outs]
    (_, top0, sum0), (_, top1, sum1) = results
    out, top, total = npu.npu_ring_attention_update(sbh[0], top0, sum0, sbh[1], top1, sum1)
    close(out, expected.permute(2, 0, 1, 3).flatten(2))
    assert torch.allclose((top + torch.log(total))[..., 0].double(), lse, atol=1e-5)
