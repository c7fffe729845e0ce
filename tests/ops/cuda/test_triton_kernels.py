"""The Triton kernels without a GPU: their numbers in Triton's interpreter, and that they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ascendit.ops.cuda import triton_kernels, triton_linear

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton, which PyTorch for CUDA includes"
)


def run(script: str, *args: str, **environment: str) -> str:
    """Standard output of a script of this folder, run in its own process."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    result = subprocess.run(
        [sys.executable, str(HERE / script), *args], capture_output=True, text=True, env=env, timeout=280
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in result.stderr:
        pytest.skip("the interpreter of this Triton cannot loop with this NumPy")
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "check",
    [
        "activations",
        "strided",
        "weights",
        "products",
        "epilogues",
        "layers",
        "dense",
        "attention_rows",
        "attention",
    ],
)
def test_the_kernels_equal_the_pytorch_steps(check):
    run("interpreted.py", check, TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_the_kernels_compile_and_matmuls_use_tensor_cores(capability):
    lines = dict(line.split(": ") for line in run("compiled.py", capability).splitlines())
    assert set(lines) == {
        "quantize_blocks", "quantize_blocks dual", "quantize_blocks qdata", "quantize_rows", "decode_weight",
        "finish", "rms_norm", "layer_norm", "gated_residual", "rope", "matmul e4m3", "matmul e2m1",
        "matmul e2m1 dual", "matmul bf16", "operand int8", "operand fp8", "operand fp8 values",
        "attention int8", "attention int8 64", "attention fp8", "attention fp8 64",
    }  # fmt: skip
    multiply = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05"}[capability]
    for name, instructions in lines.items():
        assert (multiply in instructions) == name.startswith(("matmul", "attention")), name


def test_without_triton_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(triton_kernels, "triton", None)
    triton_linear.triton_steps.cache_clear()
    assert triton_linear.triton_steps() == (None, "Triton is not installed")
    triton_linear.triton_steps.cache_clear()
