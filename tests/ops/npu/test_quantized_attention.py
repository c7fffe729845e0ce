"""Quantized attention of an NPU on the twin: the CPU's bytes, numbers against float64, refused inputs."""

from __future__ import annotations

import pytest
import torch
from ops.recorder import Recorder
from torch import Tensor

from ascendit.device.device import parse_device
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels.kernel import Kernel, Wish
from ascendit.ops.npu import kernels
from ascendit.ops.open_device import open_device
from ascendit.ops.select import select

pytestmark = pytest.mark.usefixtures("twin")
NATIVE, EMULATE = Wish(), Wish(emulate="decode-on-use")
SHAPES = [(2, 33, 33, 64), (1, 131, 300, 128), (1, 70, 1, 32)]
E4M3 = torch.float8_e4m3fn


def kernel(scheme: str, device: str = "twin:a5", wish: Wish = NATIVE) -> Kernel:
    parsed = parse_device("cpu") if device == "cpu" else open_device(device)
    return select(f"attention_{scheme}", parsed, wish)


def qkv(b: int, s: int, keys: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.randn(b, n, 2, d).to(dtype) for n in (s, keys, keys)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("scheme", "chip", "wish"),
    [
        ("fp8", "a5", Wish()),
        ("fp8", "a5", Wish(names={"attention_fp8": "npu"})),
        ("mxfp8", "a5", Wish()),
        ("int8", "a5", EMULATE),
        ("int8", "a2", EMULATE),
        ("fp8", "a2", EMULATE),
        ("mxfp8", "a3", EMULATE),
        ("mxfp4", "a5", EMULATE),
    ],
)
def test_the_twin_gives_the_bytes_of_the_cpu(
    scheme: str, chip: str, wish: Wish, shape: tuple[int, int, int, int]
) -> None:
    q, k, v = qkv(*shape)
    on_twin = kernel(scheme, f"twin:{chip}", wish).call
    out, lse = on_twin(q, k, v, return_lse=True)
    expected = kernel(scheme, "cpu")
    assert torch.equal(out, expected.call(q, k, v)) and torch.equal(out, on_twin(q, k, v))
    exact = kernel(scheme, "cpu", Wish(reference=True)).call(q, k, v, return_lse=True)[1]
    assert out.dtype == q.dtype and lse.shape == exact.shape and torch.allclose(lse, exact, atol=1e-5)


def tiles(t: Tensor, rows: int) -> Tensor:
    """t [H, S, d] in e4m3 with a scale amax / 448 per head and `rows` tokens, as float64."""
    parts = []
    for part in t.float().split(rows, 1):
        scale = part.abs().amax((1, 2), keepdim=True) / 448
        parts.append((part / scale).to(E4M3).double() * scale.double())
    return torch.cat(parts, 1)


def blocks(t: Tensor, axis: int) -> Tensor:
    """t [H, S, d] in e4m3 with a power of two per 32 values along `axis`, as float64."""
    parts = []
    for part in t.double().split(32, axis):
        amax = part.abs().amax(axis, keepdim=True)
        scale = torch.exp2(torch.floor(torch.log2(amax)) - 8)
        parts.append((part / scale).clamp(-448, 448).float().to(E4M3).double() * scale)
    return torch.cat(parts, axis)


@pytest.mark.parametrize("scheme", ["fp8", "mxfp8"])
def test_native_attention_against_float64(scheme: str) -> None:
    q, k, v = qkv(1, 300, 301, 64)
    out, lse = kernel(scheme).call(q, k, v, return_lse=True)
    heads = [t[0].transpose(0, 1) for t in (q, k, v)]
    values = (
        [tiles(t, rows) for t, rows in zip(heads, (128, 256, 256), strict=True)]
        if scheme == "fp8"
        else [blocks(t, axis) for t, axis in zip(heads, (2, 2, 1), strict=True)]
    )
    scores = values[0] @ values[1].mT / 8
    expected = (torch.softmax(scores, -1) @ values[2]).transpose(0, 1)
    assert ((out[0].double() - expected).abs() <= expected.abs() * 2.0**-8 + 1e-5).all()
    assert torch.allclose(lse[0].double(), torch.logsumexp(scores, -1), atol=1e-5)


def test_fp8_calls_have_one_sample_and_its_scales() -> None:
    call, (q, k, v) = kernel("fp8").call, qkv(2, 129, 257, 64)
    with torch.no_grad(), Recorder() as recorder:
        call(q, k, v)
    assert recorder.launched["mindiesd::fused_infer_attention_score_v2"] == 2
    assert [args["row_block_size"] for args in recorder.named("npu_dynamic_block_quant")] == [
        128,
        256,
        256,
    ] * 2
    args = recorder.named("mindiesd::fused_infer_attention_score_v2")[1]
    assert args["query"].shape == (1, 2, 129, 64) and args["input_layout"] == "BNSD"
    roles = ("query", "key", "value")
    assert [args[f"dequant_scale_{role}"].shape for role in roles] == [(1, 2, 2, 1)] * 3
    assert [args[f"{role}_quant_mode"] for role in roles] == [7, 7, 7]
    assert args["out_dtype"] == torch.bfloat16


def test_mxfp8_calls_have_one_sample_and_lengths_of_the_host() -> None:
    call, (q, k, v) = kernel("mxfp8").call, qkv(2, 33, 70, 64)
    with torch.no_grad(), Recorder() as recorder:
        call(q, k, v)
    assert [args.get("axis", -1) for args in recorder.named("npu_dynamic_mx_quant")] == [-1, -1, 0] * 2
    args = recorder.named("npu_fused_infer_attention_score_v2")[0]
    assert args["query"].shape == (33, 2, 64) and args["input_layout"] == "TND"
    assert list(args["actual_seq_qlen"]) == [33] and list(args["actual_seq_kvlen"]) == [70]
    assert all(type(n) is int for n in (*args["actual_seq_qlen"], *args["actual_seq_kvlen"]))
    assert args["dequant_scale_value"].shape == (2, 2, 64, 2) and args["dequant_scale_value_dtype"] == 293
    assert not {"item", "_local_scalar_dense"} & set(recorder.launched)


def test_samples_are_quantized_separately() -> None:
    q, k, v = qkv(2, 33, 33, 64)
    k[1] *= 100
    for scheme in ("fp8", "mxfp8"):
        call = kernel(scheme).call
        separate = [call(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(2)]
        assert torch.equal(call(q, k, v), torch.cat(separate))


def test_without_mindiesd_the_operator_of_torch_npu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = kernels.missing
    monkeypatch.setattr(
        kernels, "missing", lambda call, *rest: "not here" if "mindiesd" in call else installed(call, *rest)
    )
    chosen = kernel("fp8")
    assert chosen.needs == "npu_fused_infer_attention_score_v2" and "not here" in chosen.reason


@pytest.mark.parametrize(
    ("scheme", "chip", "needs"),
    [
        ("fp8", "a2", "Atlas 350 (Ascend 950), a5; a2 has bf16"),
        ("mxfp8", "a3", "Atlas 350 (Ascend 950), a5; a3 has bf16"),
        ("int8", "a5", "another scheme; a5 has bf16, fp8, mxfp8"),
        ("mxfp4", "a5", "another scheme; a5 has bf16, fp8, mxfp8"),
    ],
)
def test_a_scheme_without_a_kernel_is_refused_unless_emulated(scheme: str, chip: str, needs: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"attention in {scheme} on twin:{chip}") as e:
        kernel(scheme, f"twin:{chip}")
    assert e.value.code == "E-CAP-01" and e.value.needs == needs
    assert e.value.fix.startswith('emulate="decode-on-use"')
    assert kernel(scheme, f"twin:{chip}", EMULATE).reason.startswith("emulated")


@pytest.mark.parametrize(("d", "dtype"), [(40, torch.bfloat16), (160, torch.float16), (64, torch.float32)])
@pytest.mark.parametrize("scheme", ["fp8", "mxfp8"])
def test_other_heads_and_dtypes_are_refused(scheme: str, d: int, dtype: torch.dtype) -> None:
    call, tensors = kernel(scheme).call, qkv(1, 3, 3, d, dtype)
    limit = "not float32" if dtype == torch.float32 else f"not {d}"
    with pytest.raises(UsageError, match=f"attention {scheme} of .*: it takes .*, {limit}"):
        call(*tensors)
