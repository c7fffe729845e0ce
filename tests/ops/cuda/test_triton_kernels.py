"""The Triton kernels, without a card: their numbers in Triton's interpreter, and that they compile."""

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
    find_spec("triton") is None, reason="needs Triton, which PyTorch for CUDA brings"
)


def run(script: str, *words: str, **environment: str) -> str:
    """Standard output of a script in this folder, in a process of its own."""
    given = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    done = subprocess.run(
        [sys.executable, str(HERE / script), *words], capture_output=True, text=True, env=given, timeout=280
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("the interpreter of this Triton cannot loop with this NumPy")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("check", ["tokens", "strided", "weights", "products", "ends", "forms", "dense"])
def test_the_kernels_have_the_numbers_of_the_plain_steps(check):
    run("interpreted.py", check, TRITON_INTERPRET="1")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_the_kernels_compile_and_multiply_on_tensor_cores(capability):
    lines = dict(line.split(": ") for line in run("compiled.py", capability).splitlines())
    assert set(lines) == {
        "quantize_blocks", "quantize_blocks dual", "quantize_blocks qdata", "quantize_rows", "decode_weight",
        "finish", "rms_norm", "layer_norm", "gated_residual", "rope", "matmul e4m3", "matmul e2m1",
        "matmul e2m1 dual", "matmul bf16",
    }  # fmt: skip
    multiply = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05"}[capability]
    for name, instructions in lines.items():
        assert (multiply in instructions) == name.startswith("matmul"), name


def test_without_triton_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(triton_kernels, "triton", None)
    triton_linear.triton_steps.cache_clear()
    assert triton_linear.triton_steps() == (None, "Triton is not installed")
    triton_linear.triton_steps.cache_clear()
