"""Dense attention kernels of an NPU on the twin: numbers against float64, arguments, refused inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.recorder import Recorder
from torch import Tensor

from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels.kernel import Wish
from ascendit.ops.open_device import open_device
from ascendit.ops.select import select

pytestmark = pytest.mark.usefixtures("twin")
STEP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-20}


def kernel(name: str, chip: str = "a5") -> Any:
    return select("attention", open_device(f"twin:{chip}"), Wish(names={"attention": name})).call


def qkv(
    s: int, keys: int, d: int, dtype: torch.dtype = torch.bfloat16, b: int = 1, h: int = 2
) -> list[Tensor]:
    return [torch.randn(b, n, h, d).to(dtype) for n in (s, keys, keys)]


def check(actual: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Output within rounding of float64 attention, probabilities included, and its log-sum-exp."""
    out, lse = actual
    heads = [t.double().transpose(1, 2) for t in (q, k, v)]
    scores = heads[0] @ heads[1].mT * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, -1)
    expected, size = ((weights @ values).transpose(1, 2) for values in (heads[2], heads[2].abs()))
    assert out.shape == q.shape and out.dtype == q.dtype
    assert ((out.double() - expected).abs() <= STEP[q.dtype] * (expected.abs() + size) + 1e-6).all()
    assert lse.shape == scores.shape[:3] and lse.dtype == torch.float32
    assert torch.allclose(lse.double(), torch.logsumexp(scores, -1), atol=2e-5)


@pytest.mark.parametrize("name", ["fusion", "fused_infer"])
@pytest.mark.parametrize(("s", "keys", "d"), [(1, 1, 64), (131, 131, 128), (257, 77, 64), (66, 515, 128)])
def test_dense_kernels_against_float64(name: str, s: int, keys: int, d: int) -> None:
    call, (q, k, v) = kernel(name), qkv(s, keys, d, b=2)
    check(call(q, k, v, return_lse=True), q, k, v)
    assert torch.equal(call(q, k, v), call(q, k, v, return_lse=True)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fusion_in_other_dtypes(dtype: torch.dtype) -> None:
    q, k, v = qkv(37, 90, 64, dtype)
    check(kernel("fusion")(q, k, v, return_lse=True), q, k, v)


@pytest.mark.parametrize(
    ("s", "d", "dtype"), [(2048, 128, torch.bfloat16), (2051, 64, torch.bfloat16), (2049, 40, torch.float16)]
)
def test_laser_attention_against_float64(s: int, d: int, dtype: torch.dtype) -> None:
    q, k, v = qkv(s, s, d, dtype, h=1)
    out, lse = kernel("laser", "a2")(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 1, s)
    check((out[:, ::31], lse[..., ::31]), q[:, ::31], k, v)


def test_laser_attention_gets_padded_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs, calls = kernel("laser", "a3"), (qkv(2051, 2051, 64), qkv(2048, 2048, 128)), []

    def la(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        calls.append({"qkv": (query, key, value), **options})
        return query[..., 0].float(), query.float()

    monkeypatch.setattr(torch.ops.mindiesd, "la", la)
    for tensors, tokens in zip(inputs, (2304, 2048), strict=True):
        with torch.no_grad(), Recorder() as recorder:
            out = call(*tensors)
        padded = calls[-1]["qkv"]
        assert {t.dtype for t in padded} == {torch.float16} and all(t.is_contiguous() for t in padded)
        assert {tuple(t.shape) for t in padded} == {(1, 2, tokens, 128)}
        assert torch.equal(out, tensors[0].half().to(out.dtype)) and recorder.launched["copy_"] == 3
        assert recorder.launched["zeros"] == (3 if tokens == 2304 else 0)
    first, second = calls
    assert first["scale_value"] == 64**-0.5 and first["pre_tokens"] == 2304 - 2051
    assert second["pre_tokens"] == 2**31 - 1 and second["head_num"] == 2
    assert not first["qkv"][1][:, :, 2051:].any() and not first["qkv"][1][..., 64:].any()


def test_laser_attention_overflows_beyond_float16() -> None:
    """The check of the finished latents refuses such a video."""
    q, k, v = qkv(2048, 2048, 64, h=1)
    v[0, 5] = 7e4
    assert not kernel("laser", "a2")(q, k, v).isfinite().all() and kernel("fusion")(q, k, v).isfinite().all()


@pytest.mark.parametrize(
    ("s", "keys", "d", "dtype", "got"),
    [
        (2048, 2049, 64, torch.bfloat16, "self-attention only"),
        (2047, 2047, 64, torch.bfloat16, "at least 2048 tokens, not 2047"),
        (2048, 2048, 136, torch.bfloat16, "up to 128, not 136"),
        (2048, 2048, 64, torch.float32, "not float32"),
    ],
)
def test_laser_attention_refuses(s: int, keys: int, d: int, dtype: torch.dtype, got: str) -> None:
    call, tensors = kernel("laser", "a2"), qkv(s, keys, d, dtype, h=1)
    with Recorder() as recorder, pytest.raises(UsageError, match=f"attention laser of .*{got}") as e:
        call(*tensors)
    assert not recorder.named("mindiesd::la")
    assert e.value.fix == 'attention="fusion", which takes it'
    assert kernel("fusion", "a2")(*tensors).shape == tensors[0].shape


def test_laser_attention_is_refused_on_a5() -> None:
    with pytest.raises(EnvironmentProblem, match="mindiesd::la does not run on a5") as e:
        kernel("laser", "a5")
    assert e.value.code == "E-CAP-01"
