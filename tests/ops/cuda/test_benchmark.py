"""`benchmarks/cuda_attention.py` without a GPU: its numbers and its exit status."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ascendit.kernels import quantized_attention as definition
from ascendit.kernels import reference
from ascendit.kernels.kernel import Kernel

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "cuda_attention.py"
SDPA = Kernel("attention", "cuda", reference.attention, "", name="sdpa")


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("cuda_attention", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernels = {
        "sdpa": SDPA,
        "qk_int8": replace(SDPA, name="qk_int8", on_request=True, call=definition.qk_int8),
    }
    for scheme in ("int8", "fp8", "mxfp8"):
        call = definition.emulated(scheme, reference.attention)
        kernels[scheme] = Kernel(f"attention_{scheme}", "cuda", call, "")
    monkeypatch.setattr(module, "usable", lambda device: kernels)
    monkeypatch.setattr(module, "select", lambda *_: SDPA)
    return module


def run(benchmark, *arguments):
    with torch.random.fork_rng():
        return benchmark.main(["--dry", "--device", "cpu", *arguments])


def test_it_measures_every_kernel(benchmark, capsys):
    assert run(benchmark) == 0
    text = capsys.readouterr().out
    for name in ("sdpa", "qk_int8", "int8", "fp8", "mxfp8"):
        assert text.count(f"\n| {name} |") == 2
    assert "| 72 x 72, 2 heads |" in text and "| 72 x 40, 2 heads |" in text
    assert "choice sdpa against the fastest: 1.00, goal 0.95" in text
    quantized = {row[1].strip(): row[7] for line in text.splitlines() if len(row := line.split("|")) == 9}
    assert float(quantized["sdpa"]) < 3e-3 < 1e-2 < float(quantized["fp8"]) < 0.2


def test_a_wrong_kernel_sets_the_exit_status(benchmark, capsys):
    def base2(q, k, v, *, return_lse=False):
        out = reference.attention(q, k, v, return_lse=True)
        return (out[0], out[1] * 1.4427) if return_lse else out[0]

    benchmark.usable = lambda device: {"sdpa": replace(SDPA, call=base2)}
    assert run(benchmark) == 1
    assert "WRONG: sdpa 72 x 72, 2 heads: error" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert "device cuda" in capsys.readouterr().err
