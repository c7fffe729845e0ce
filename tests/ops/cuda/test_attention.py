"""CUDA's attention kernels without a GPU: shapes and arguments of PyTorch's operators, trials, lists.

`test_triton_kernels.py` tests the numbers of the Triton kernels.
"""

from __future__ import annotations

import ast
import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from ascendit.device.attention_kernels import ATTENTION_KERNELS
from ascendit.device.device import parse_device
from ascendit.errors import EnvironmentProblem, UsageError
from ascendit.kernels import quantized_attention as definition
from ascendit.kernels import reference
from ascendit.kernels.kernel import Wish
from ascendit.ops import select as selection
from ascendit.ops.cuda import attention, kernels, quantized_attention
from ascendit.ops.cuda.attention import Trial, problem_of_attention
from ascendit.ops.cuda.linear import CudaCard
from ascendit.ops.select import select
from ascendit.quant.attention_schemes import ATTENTION_FORMATS

BACKENDS = {
    "_scaled_dot_product_flash_attention": attention.sdpa_flash,
    "_scaled_dot_product_cudnn_attention": attention.sdpa_cudnn,
    "_scaled_dot_product_efficient_attention": attention.sdpa_efficient,
}


def inputs(queries=45, keys=70, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, n, 3, 64, generator=generator).to(dtype) for n in (queries, keys, keys)]


def exact(q, k, v):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def unused(*args, **options):
    raise AssertionError("another kernel serves these inputs")


@pytest.fixture
def called(monkeypatch):
    """PyTorch's operators with log-sum-exp on a CPU, with the output shapes of a GPU; the names called."""
    names = []

    def replace(name):
        def operator(q, k, v, *rest):
            names.append(name)
            assert rest == (() if "flash" in name else (None, True))
            out, lse = (t.float() for t in exact(*(t.transpose(1, 2) for t in (q, k, v))))
            if "cudnn" in name:
                lse = lse[..., None]
            elif "efficient" in name:
                lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
            return out.transpose(1, 2), lse, None, None

        monkeypatch.setattr(torch.ops.aten, name, operator)

    for name in BACKENDS:
        replace(name)
    return names


@pytest.mark.parametrize("name", BACKENDS)
def test_log_sum_exp_of_pytorchs_backends(name, called):
    q, k, v = inputs()
    out, lse = BACKENDS[name](q, k, v, return_lse=True)
    assert called == [name] and lse.shape == (2, 3, 45)
    for actual, expected in zip((out, lse), exact(q, k, v), strict=True):
        assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_shapes_of_pytorchs_operators(name):
    """PyTorch's own shape functions: a change in a later version fails here."""
    q, k, v = (t.to("meta", torch.bfloat16) for t in inputs())
    out, lse = BACKENDS[name](q, k, v, return_lse=True)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert lse.shape == (2, 3, 45) and lse.dtype == torch.float32


def test_sdpa_uses_the_backend_that_pytorch_prefers(monkeypatch, called):
    q, k, v = inputs()
    assert torch.allclose(attention.sdpa(q, k, v), reference.attention(q, k, v), atol=1e-5)
    for backend, call in attention._WITH_LSE.items():
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, b=backend: int(b.value))
        attention.sdpa(q, k, v, return_lse=True)
        assert BACKENDS[called.pop()] is call and not called
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: SDPBackend.MATH.value)
    out, lse = attention.sdpa(q, k, v, return_lse=True)
    assert not called
    assert torch.equal(lse, reference.attention(q, k, v, return_lse=True)[1])


def test_a_backend_is_not_replaced_in_silence():
    for call in (attention.sdpa_cudnn, attention.sdpa_efficient):
        with pytest.raises(RuntimeError):
            call(*inputs())  # a CPU has neither


def test_the_flash_attn_package(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False):
        calls.append((dropout_p, softmax_scale, causal))
        out, lse = reference.attention(q, k, v, return_lse=True)
        return (out, lse, None) if return_attn_probs else out

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    q, k, v = inputs()
    out, lse = attention.flash(q, k, v, return_lse=True)
    assert torch.equal(attention.flash(q, k, v), out) and lse.shape == (2, 3, 45)
    assert calls == [(0.0, None, False)] * 2


# ---- trials -------------------------------------------------------------------------------------

SM90 = CudaCard("H100", (9, 0), True)
TRIAL = Trial(reference.attention)


def test_trials_check_the_gpu_first():
    old, amd = CudaCard("T4", (7, 5), True), CudaCard("MI300", (9, 4), True, hip=True)
    assert TRIAL.problem(unused, old, "cpu") == "needs compute capability 8.0"
    assert Trial(reference.attention, nvidia=True).problem(unused, amd, "cpu") == "needs an NVIDIA GPU"
    assert TRIAL.problem(unused, None, "cuda") == ""


def test_trials_detect_missing_triton(monkeypatch):
    monkeypatch.setattr(attention, "triton_steps", lambda: (None, "Triton is not installed"))
    assert (
        Trial(reference.attention, triton=True).problem(reference.attention, SM90, "cpu")
        == "Triton is not installed"
    )


def test_trials_accept_the_reference_and_detect_errors(caplog):
    def base2(q, k, v, *, return_lse=False):
        out = reference.attention(q, k, v, return_lse=True)
        return (out[0], out[1] / 0.6931) if return_lse else out[0]

    def wrong(q, k, v, *, return_lse=False):
        return reference.attention(q * 1.02, k, v, return_lse=return_lse)

    before = torch.get_rng_state()
    assert TRIAL.problem(reference.attention, SM90, "cpu") == ""
    with caplog.at_level("INFO", logger="ascendit"):
        for call in (base2, wrong):
            assert "relative error" in problem_of_attention(call, reference.attention, "cpu")
    assert "attention kernel on cpu is not used: base2: relative error" in caplog.text
    assert torch.equal(torch.get_rng_state(), before)
    assert "No module named 'flash_attn'" in TRIAL.problem(attention.flash, SM90, "cpu")


# ---- quantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4"])
def test_mx_values_are_exact_in_bfloat16(scheme):
    q, k, v = inputs(dtype=torch.bfloat16)
    call = quantized_attention.decoded(scheme, reference.attention, unused)
    expected, lse = definition.emulated(scheme, reference.attention)(q, k, v, return_lse=True)
    out, sums = call(q, k, v, return_lse=True)
    assert torch.equal(out, expected) and torch.equal(sums, lse)


def test_other_dtypes_and_head_sizes_are_emulated_or_refused():
    slow = definition.emulated("fp8", reference.attention)
    for q, k, v in (inputs(), [t[..., :48] for t in inputs(dtype=torch.bfloat16)]):
        call = quantized_attention.quantized("fp8", True, slow)
        assert torch.equal(call(q, k, v), slow(q, k, v))
        with pytest.raises(UsageError, match="qk_int8 on .* with heads of") as e:
            quantized_attention.qk_int8(q, k, v)
        assert e.value.code == "E-USE-01"
    call = quantized_attention.decoded("mxfp8", unused, definition.emulated("mxfp8", reference.attention))
    assert call(*inputs()).dtype == torch.float32


# ---- lists --------------------------------------------------------------------------------------

CUDA = parse_device("cuda")


@pytest.fixture
def listed(monkeypatch):
    """Capability -> the listed kernels."""

    def kernels_of(capability, **properties):
        card = CudaCard("GPU", capability, True, **properties)
        monkeypatch.setattr(CudaCard, "from_device", lambda device: card)
        return attention.list_kernels(CUDA, Wish())

    return kernels_of


def test_kernels_are_those_of_the_table(listed):
    names = [k.name for k in listed((9, 0)) if k.operator == "attention"]
    assert set(names) == {n for n, k in ATTENTION_KERNELS.items() if "cuda" in k.backends} - {"reference"}
    assert names[0] == "sdpa"
    assert [k.name for k in listed((9, 0)) if k.on_request] == ["qk_int8"]


def test_schemes_by_capability(listed):
    def reasons(*args, **properties):
        return {k.operator: k.reason for k in reversed(listed(*args, **properties))}

    h100, a100 = reasons((9, 0)), reasons((8, 0))
    assert {f"attention_{s}" for s in ATTENTION_FORMATS} < set(h100)
    assert h100["attention_fp8"].startswith("native: e4m3 scores by Triton")
    assert a100["attention_fp8"].startswith("native: scores of e4m3 values in BF16 by Triton")
    assert h100["attention_int8"] == a100["attention_int8"]
    assert h100["attention_mxfp8"].startswith("emulated: q, k and v decoded to BF16")


def test_kernels_that_fail_are_skipped_with_their_reason(listed, monkeypatch):
    monkeypatch.setattr(attention, "problem_of_attention", lambda call, expected, device: "wrong")
    rows = listed((9, 0))
    monkeypatch.setattr(selection, "kernels_of", lambda device, wish: rows)
    chosen = select("attention_fp8", CUDA, Wish())
    assert chosen.name == "emulated" and chosen.reason.startswith("emulated: ")
    assert select("attention", CUDA, Wish()).backend == "reference"
    with pytest.raises(EnvironmentProblem, match="attention=qk_int8: ") as e:
        select("attention", CUDA, Wish(names={"attention": "qk_int8"}))
    assert e.value.code == "E-CAP-01"


def test_without_a_gpu_there_is_only_sdpa(monkeypatch):
    monkeypatch.setattr(CudaCard, "from_device", lambda device: None)
    rows = attention.list_kernels(CUDA, Wish())
    assert [k.name for k in rows if k.operator == "attention"] == ["sdpa"]
    assert all(k.missing() == "" for k in rows)
    assert select("attention", CUDA, Wish()).call is attention.sdpa


def test_no_attention_of_the_cpu_is_used():
    for module in (attention, kernels, quantized_attention):
        tree = ast.parse(inspect.getsource(module))
        names = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert "ascendit.kernels.cpu.attention" not in names


# ---- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_every_kernel_is_correct_on_a_gpu():
    problems = {(k.operator, k.name): k.missing() for k in attention.list_kernels(CUDA, Wish())}
    assert {k: p for k, p in problems.items() if p and k[1] != "flash"} == {}
